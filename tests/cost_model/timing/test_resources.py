"""How the lanes share the link, host memory, the disk and the cores."""

from dataclasses import replace

import pytest

from cost_model.hardware.hardware import Hardware
from cost_model.memory.allocation import allocate
from cost_model.model.arch import ModelArch
from cost_model.timing.contention import USERS, Resources
from cost_model.timing.op_costs import Costs
from policies import Policy, Workload

ARCH = ModelArch.from_name("mixtral-8x7b")


def resources(machine="rtx4090", gpu=None, **hardware):
    there = Hardware.preset(machine)
    there = replace(there, gpus=(replace(there.gpu, **(gpu or {})),), **hardware)
    workload = Workload(prompt_len=64, gen_len=32)
    policy = Policy.from_percent(
        (10, 90, 0, 100, 100, 0), gpu_batch_size=8, num_gpu_batches=2, prompt_len=64, gen_len=32
    )
    allocation = allocate(ARCH, policy, workload, device=there.device)
    return Resources(Costs(ARCH, there, policy, allocation, 2))


LINK = {
    "h2d_bytes_per_s": 10e9,
    "d2h_bytes_per_s": 10e9,
    "h2d_duplex_bytes_per_s": 8e9,
    "d2h_duplex_bytes_per_s": 8e9,
    "kv_load_bytes_per_s": 5e9,
    "kv_store_bytes_per_s": 5e9,
}
WIDE = {"gpu": LINK, "host_bytes_per_s": 1e15}


@pytest.mark.parametrize("machine", ["rtx4090", "cpu"])
@pytest.mark.parametrize("user", USERS)
def test_who_is_alone_is_never_slowed(machine, user):
    assert resources(machine).speeds([user]) == {user: 1.0}


def test_the_link_is_shared_by_what_each_asks_for():
    there = resources(**WIDE)
    assert there.speeds(["h2d", "h2d/act"]) == {"h2d": 0.5, "h2d/act": 0.5}
    # Scattered KV takes half of the link while it is gathered, so both together ask for one and a half of it.
    assert there.speeds(["h2d", "h2d/kv"])["h2d"] == pytest.approx(2 / 3)
    assert there.speeds(["h2d/kv"]) == {"h2d/kv": 1.0}


def test_both_directions_at_once_run_at_their_duplex_rates():
    there = resources(**WIDE)
    assert there.speeds(["h2d", "d2h/act"]) == pytest.approx({"h2d": 0.8, "d2h/act": 0.8})


def test_weights_and_kv_share_the_disk_and_reads_do_not_wait_for_writes():
    there = resources(**WIDE, disk_busy_latency_s=0.0)
    assert there.speeds(["disk_read", "disk_read/kv"]) == {"disk_read": 0.5, "disk_read/kv": 0.5}
    assert there.speeds(["disk_read", "disk_write"]) == {"disk_read": 1.0, "disk_write": 1.0}


def test_kv_pages_on_disk_wait_behind_the_weights_that_are_read():
    page_bytes = 16 * 4096  # of Mixtral's KV in a layer
    there = resources(
        **WIDE,
        disk_read_bytes_per_s=1e9,
        disk_write_bytes_per_s=1e9,
        kv_block_read_s=0.0,
        kv_block_write_s=0.0,
        disk_busy_latency_s=8 * 500e-6,
    )
    written = page_bytes / 1e9 / 500e-6
    assert there.speeds(["disk_read", "disk_write"]) == pytest.approx({"disk_read": 1.0, "disk_write": written})
    both = there.speeds(["disk_read", "disk_read/kv"])
    assert both["disk_read/kv"] < 0.5 and sum(both.values()) == pytest.approx(1.0)
    assert there.speeds(["disk_read/kv", "disk_write"]) == {"disk_read/kv": 1.0, "disk_write": 1.0}


def test_copies_and_attention_share_host_memory():
    there = resources(gpu=LINK, host_bytes_per_s=40e9, cpu_attention_bytes_per_s=40e9)
    assert there.speeds(["cpu", "h2d"]) == pytest.approx({"cpu": 0.8, "h2d": 0.8})
    assert there.speeds(["cpu", "h2d", "gpu"])["gpu"] == 1.0


def test_computing_shares_the_cores_by_threads():
    there = resources("cpu", cores=4, disk_read_core_s_per_byte=0.0)
    assert there.speeds(["gpu", "h2d"]) == pytest.approx({"gpu": 0.8, "h2d": 0.8})
    assert there.speeds(["gpu", "cpu"]) == pytest.approx({"gpu": 0.5, "cpu": 0.5})


def test_a_copy_takes_the_cores_that_it_was_found_to_take():
    there = resources("cpu", cores=4, h2d_core_s_per_byte=2 / 10e9, gpu=LINK)
    assert there.speeds(["gpu", "h2d"]) == pytest.approx({"gpu": 4 / 6, "h2d": 4 / 6})


@pytest.mark.parametrize("machine", ["rtx4090", "cpu"])
def test_small_transfer_waits_behind_the_weights_and_slows_nobody(machine):
    there = resources(machine, disk_latency_s=1e-4, disk_busy_latency_s=4e-4)
    assert there.speeds(["disk_read", "disk_read/wait"]) == {"disk_read": 1.0, "disk_read/wait": 0.25}
    assert there.speeds(["disk_write/wait", "disk_write"]) == {"disk_write/wait": 1.0, "disk_write": 1.0}
    assert there.seconds({"disk_read/wait": 3.0})["disk_read"] == 0.0


def test_a_disk_reader_that_mostly_sleeps_is_not_slowed_and_takes_its_cores_from_the_rest():
    rate = 1e9
    there = resources("cpu", cores=4, disk_read_bytes_per_s=rate, disk_read_core_s_per_byte=0.8 / rate)
    speeds = there.speeds(["gpu", "disk_read"])
    assert speeds["disk_read"] == 1.0
    assert speeds["gpu"] == pytest.approx((4 - 0.8) / 4)


def test_the_disk_is_read_more_slowly_while_all_cores_compute():
    rate = 1e9
    disk = {"disk_read_bytes_per_s": rate, "disk_read_core_s_per_byte": 1.6 / rate, "disk_read_beside_compute": 0.6}
    there = resources("cpu", cores=2, **disk)
    assert there.speeds(["gpu", "disk_read"]) == pytest.approx({"gpu": 1 - 0.6 * 1.6 / 2, "disk_read": 0.6})
    assert there.speeds(["h2d", "disk_read"])["disk_read"] == pytest.approx(1.0)
    cuda = resources(disk_read_beside_compute=0.6)
    assert cuda.speeds(["gpu", "disk_read"]) == {"gpu": 1.0, "disk_read": 1.0}
    assert cuda.speeds(["cpu", "disk_read"])["disk_read"] == 0.6


def test_readers_on_busy_cores_share_them_though_the_disk_could_serve_more():
    rate = 1e9
    disk = {"disk_read_bytes_per_s": rate, "disk_read_core_s_per_byte": 8 / rate, "disk_read_beside_compute": 0.9}
    speeds = resources("cpu", cores=4, **disk).speeds(["gpu", "disk_read"])
    assert speeds == pytest.approx({"gpu": 4 / 12, "disk_read": 4 / 12 * 8 / 8})


def test_seconds_that_reads_lose_while_cores_compute():
    rate = 1e9
    disk = {"disk_read_bytes_per_s": rate, "disk_read_core_s_per_byte": 1.6 / rate, "disk_read_beside_compute": 0.6}
    there = resources("cpu", cores=2, **disk)
    # What computes has 0.52 of its speed beside reads that have 0.6 of theirs.
    assert there.read_lost_s({"gpu": 1.04, "disk_read": 9.0}) == pytest.approx(0.4 * 2.0)
    assert there.read_lost_s({"gpu": 99.0, "disk_read": 9.0}) == pytest.approx(0.4 * 15.0)
    assert there.read_lost_s({"gpu": 99.0, "disk_read/routed": 9.0}) == there.read_lost_s({"gpu": 1.0}) == 0.0
    assert resources().read_lost_s({"cpu": 1.0, "disk_read": 1.0}) == 0.0


def test_seconds_of_a_resource_are_those_in_which_it_serves_all():
    there = resources(gpu=LINK, host_bytes_per_s=20e9)
    found = there.seconds(
        {"h2d": 4.0, "h2d/kv": 2.0, "d2h/act": 1.0, "disk_read": 3.0, "disk_read/kv": 1.0, "gpu": 9.0}
    )
    assert found["pcie"] == pytest.approx(5.0 + 1.0 * (1 / 0.8 - 1))
    assert found["disk_read"] == pytest.approx(4.0)
    assert found["host memory"] == pytest.approx((4.0 * 10 + 2.0 * 3 * 5 + 1.0 * 10) / 20)
    on_cpu = resources("cpu", cores=4, disk_read_core_s_per_byte=0.0)
    assert on_cpu.seconds({"gpu": 3.0, "h2d": 2.0})["cores"] == pytest.approx(3.5)
