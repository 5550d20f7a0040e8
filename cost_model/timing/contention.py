"""What the lanes share: cores, the link to the compute device, host memory, the disk. How fast each runs beside others.

A user is one kind of work on a lane; its lane is the part of its name before the slash. Bandwidth that is asked for
more than it yields is split in proportion to what each user asks for. KV pages on disk get less: a drive serves bytes in the order
in which they are asked for, and more of weights are. All that is read is slower while the cores compute, by what was measured.
Cores are split as an operating system does it: by threads, and a thread that asks for less than its fair part (a disk reader that
mostly sleeps) gets all it asks for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from cost_model.timing.op_costs import Costs

#: ``host``: the main thread between operations. ``wait``: a small transfer waits for the disk. ``h2d/attended``:
#: results of the CPU's attention, up. ``routed``: experts on demand. ``stage``: host weights that are not pinned, copied to a
#: pinned buffer first.
USERS = (
    *("gpu", "host", "cpu", "h2d", "h2d/kv", "h2d/attended", "h2d/act", "d2h", "d2h/act"),
    *(
        "disk_read",
        "disk_read/kv",
        "disk_read/act",
        "disk_read/wait",
        "disk_write",
        "disk_write/act",
        "disk_write/wait",
    ),
    *("stage", "h2d/routed", "disk_read/routed"),
)
#: Threads of the runtime that read or write disk at once; with how many the cores are shared when they all work.
_DISK_THREADS = 4
#: Bytes of host memory that pass for a byte of KV: it is gathered (read, written), then copied (read); or backwards.
_PASSES_OF_KV = 3
_WAITS = ("disk_read/wait", "disk_write/wait")
#: Users that keep all cores computing: attention in host memory, and on device cpu the compute lane.
_COMPUTING = {"cuda": ("cpu",), "cpu": ("gpu", "cpu")}


class Resources:
    """Shares of a machine.

    Args:
        costs: whose lanes they are.

    Attributes:
        kv_speed: how fast KV pages on disk are read and written while weights are read, by user; 1 is the speed alone.
    """

    def __init__(self, costs: Costs):
        self._hardware, gpu = costs.hardware, costs.hardware.gpu
        self._on_cpu = costs.hardware.device == "cpu"
        self._threads = {user: self._core_threads(costs, user) for user in USERS} if self._on_cpu else {}
        both = min(gpu.h2d_duplex_bytes_per_s / gpu.h2d_bytes_per_s, gpu.d2h_duplex_bytes_per_s / gpu.d2h_bytes_per_s)
        self._duplex_extra = 1 / min(1.0, both) - 1  # 1 / r - 1 of `_link_used`
        link = {
            "h2d/kv": gpu.kv_load_bytes_per_s / gpu.h2d_bytes_per_s,
            "d2h": gpu.kv_store_bytes_per_s / gpu.d2h_bytes_per_s,
        }
        up_down = [user for user in USERS if _lane(user) in ("h2d", "d2h")]
        self._link = {user: min(1.0, link.get(user, 1.0)) for user in up_down}
        self._memory = {} if self._on_cpu else _host_memory(costs)
        busy_s = self._hardware.disk_busy_latency_s
        self._wait_speed = min(1.0, self._hardware.disk_latency_s / busy_s) if busy_s else 1.0
        self.kv_speed = costs.kv_speed_beside_weights
        self._computing = _COMPUTING[self._hardware.device]
        reading = self.speeds([self._computing[0], "disk_read"])
        self._read_speed_beside, self._compute_speed_beside = reading["disk_read"], reading[self._computing[0]]

    def speeds(self, active: Collection[str]) -> dict[str, float]:
        """How fast each of the active users gets on, 1 being its speed when it is alone."""
        found = dict.fromkeys(active, 1.0)
        for users, speed in self._slowed(active):
            for user in users:
                found[user] = min(found[user], speed)
        beside = self._read_speed(active)
        if self._on_cpu:
            asked = {user: self._asked(user, beside) for user in active}
            level = self._level(asked.values())
            for user, (_, part) in asked.items():
                found[user] = min(found[user], level / part if part else 1.0)
        for user in active:
            found[user] *= beside if _is_read(user) else 1.0
        return found

    def seconds(self, busy: Mapping[str, float]) -> dict[str, float]:
        """The fewest seconds in which each shared resource serves users that are so many seconds busy when alone."""
        found = {"disk_read": sum(seconds for user, seconds in busy.items() if _is_read(user))}
        if self._on_cpu:
            used = sum(threads * part * busy.get(user, 0.0) for user, (threads, part) in self._threads.items())
            return found | {"cores": used / self._hardware.cores}
        return found | {"pcie": self._link_used(busy), "host memory": _weighted(self._memory, busy)}

    def _read_speed(self, active: Collection[str]) -> float:
        """The part of its rate that reading from disk has beside those that compute."""
        computing = any(user in active for user in self._computing)
        return self._hardware.disk_read_beside_compute if computing else 1.0

    def _asked(self, user: str, read_speed: float) -> tuple[float, float]:
        """(threads, part of a core that each asks for), of readers that have a part of their speed."""
        threads, part = self._threads[user]
        return threads, part * (read_speed if _is_read(user) else 1.0)

    def read_lost_s(self, busy: Mapping[str, float]) -> float:
        """Seconds that the disk's reads take longer as cores compute meanwhile.

        Those compute for longer too, at what the readers leave them of the cores. For experts on demand they mostly wait.
        """
        read_s = sum(busy.get(user, 0.0) for user in USERS if _is_read(user) and user != "disk_read/routed")
        computed_s = sum(busy.get(user, 0.0) for user in self._computing) / self._compute_speed_beside
        return lost_s(read_s, self._read_speed_beside, computed_s)

    def _slowed(self, active: Collection[str]) -> list[tuple[list[str], float]]:
        """(users, their speed) of each bandwidth that is asked for more than it yields."""
        alone = dict.fromkeys(active, 1.0)
        writers = [user for user in active if _lane(user) == "disk_write" and user not in _WAITS]
        asked: list[tuple[list[str], float]] = [(writers, len(writers))]
        if not self._on_cpu:
            asked.append(([user for user in active if user in self._link], self._link_used(alone)))
            asked.append(([user for user in active if user in self._memory], _weighted(self._memory, alone)))
        found = [(users, 1 / times) for users, times in asked if times > 1] + self._reads(active)
        if "disk_read" not in active:
            return found
        waiting, written = ([user for user in users if user in active] for users in (_WAITS, ("disk_write",)))
        return [*found, (waiting, self._wait_speed), (written, self.kv_speed["disk_write"])]

    def _reads(self, active: Collection[str]) -> list[tuple[list[str], float]]:
        """(users, their speed) of those who read the disk, where they are several."""
        readers = [user for user in active if _is_read(user)]
        if len(readers) < 2:
            return []
        even, kv = 1 / len(readers), "disk_read/kv"
        if kv not in readers or "disk_read" not in readers:
            return [(readers, even)]
        speed = min(even, self.kv_speed[kv])
        return [([kv], speed), ([user for user in readers if user != kv], (1 - speed) / (len(readers) - 1))]

    def _link_used(self, busy: Mapping[str, float]) -> float:
        """Seconds of the link: while both directions run, each has the part r of its speed.

        Of a and b seconds up and down, a the longer, both run for b / r, in which b seconds of a are done too: a - b + b / r.
        """
        directions = {"h2d": 0.0, "d2h": 0.0}
        for user, seconds in busy.items():
            if user in self._link:
                directions[_lane(user)] += self._link[user] * seconds
        return max(directions.values()) + min(directions.values()) * self._duplex_extra

    def _level(self, asked_parts: Collection[tuple[float, float]]) -> float:
        """The part of a core that a thread gets which asks for all of it.

        Max-min fairness: those that ask for least are served in full, as long as the rest would get no less than they ask for
        if all that is left were split evenly.
        """
        room, asked = float(self._hardware.cores), sorted(asked_parts, key=lambda each: each[1])
        threads = sum(count for count, _ in asked)
        for count, part in asked:
            if part * threads > room:
                return room / threads
            room, threads = room - part * count, threads - count
        return 1.0

    @staticmethod
    def _core_threads(costs: Costs, user: str) -> tuple[float, float]:
        """(threads, part of a core that each of them asks for)."""
        cores = costs.hardware.cores
        if user in ("host", "stage"):
            return 1.0, 1.0
        if user in _WAITS:
            return 1.0, 0.0
        shares = costs.lane_share
        alike = "h2d/kv" if user == "h2d/attended" else user
        wanted = shares.get(alike, shares[_lane(user)]) * cores
        threads = max(_DISK_THREADS, wanted) if user.startswith("disk") else max(1.0, wanted)
        return threads, wanted / threads


_LANES = {user: user.partition("/")[0] for user in USERS}


def _lane(user: str) -> str:
    return _LANES[user]


def _is_read(user: str) -> bool:
    return _lane(user) == "disk_read" and user not in _WAITS


def lost_s(alone_s: float, speed: float, beside_s: float) -> float:
    """Seconds that work of so many loses to others that run for ``beside_s``, while it has a part of its speed."""
    return (1 - speed) * min(alone_s / speed, beside_s)


def _weighted(weights: Mapping[str, float], busy: Mapping[str, float]) -> float:
    return sum(weight * busy.get(user, 0.0) for user, weight in weights.items())


def _host_memory(costs: Costs) -> dict[str, float]:
    """The part of host memory's rate that each user takes; device cuda."""
    hw, gpu = costs.hardware, costs.hardware.gpu
    rates = {
        "cpu": costs.cpu_attention_bytes_per_s,
        "h2d": costs.stream_bytes_per_s["h2d"],
        "h2d/kv": _PASSES_OF_KV * gpu.kv_load_bytes_per_s,
        "h2d/attended": gpu.h2d_bytes_per_s,
        "h2d/act": gpu.h2d_bytes_per_s,
        "h2d/routed": gpu.h2d_bytes_per_s,
        "d2h": _PASSES_OF_KV * gpu.kv_store_bytes_per_s,
        "d2h/act": gpu.d2h_bytes_per_s,
        "stage": _PASSES_OF_KV * gpu.h2d_bytes_per_s,
    }
    return {user: min(1.0, rate / hw.host_bytes_per_s) for user, rate in rates.items()}  # measured alone, each fits
