"""What a server takes, and whom it answers: what the process has to know that clients talk to, which loads no model."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from policies.common.checks import check_count, check_number

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a server takes; what exceeds it is refused with a status code of its own.

    Args:
        upload_bytes: of one file (413).
        body_bytes: of every other request body (413).
        header_bytes: names and values of a request's headers (431).
        free_disk_bytes: what an upload leaves free on the disk of the data (507).
        open_batches: batches that have not ended (429).
        rows: of one batch (the batch fails).
        concurrent_requests: completions that wait or run (429).
        uploads: that run at one time (429).
        idle_s: seconds that a client may let pass between two pieces of a request (408), for its headers (408), and without
            reading any of its answer (it is hung up on).
    """

    upload_bytes: int = 200 * MIB
    body_bytes: int = 4 * MIB
    header_bytes: int = 16 << 10
    free_disk_bytes: int = 512 * MIB
    open_batches: int = 100
    rows: int = 50_000
    concurrent_requests: int = 256
    uploads: int = 32
    idle_s: float = 30.0

    def __post_init__(self) -> None:
        for name in (
            "upload_bytes",
            "body_bytes",
            "header_bytes",
            "open_batches",
            "rows",
            "concurrent_requests",
            "uploads",
        ):
            check_count(name, getattr(self, name))
        check_count("free_disk_bytes", self.free_disk_bytes, 0)
        check_number("idle_s", self.idle_s)


def is_loopback(host: str) -> bool:
    """Whether a host, by name or by address, is this machine for itself alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
