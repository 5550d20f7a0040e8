"""The machine's rates, measured once: kept in the user's cache for as long as nothing changes that they depend on."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from cost_model.hardware.cache import PATTERN
from cost_model.hardware.hardware import Gpu, Hardware
from flexmoe.errors import FlexMoEError, InfeasibleError, InputMissingError, StorageError, UsageError
from flexmoe.probing.facts import MEASURING, capacities, child_environment, circumstances
from flexmoe.progress import Steps
from flexmoe.system.device import Device
from policies.common.directories import cache_directory, resolved
from policies.common.option_names import option

log = logging.getLogger(__name__)

#: What is measured, and how; another number makes what was kept before worthless.
_EDITION = "12"
#: Names beside a kept measurement: what was found otherwise, and what it was for that it was measured again.
_STALE, _MEASURED_AGAIN = ".stale", ".again"
_FRESH_S = 86_400.0
_COMMAND = (sys.executable, "-m", "flexmoe.probe")
_ERRORS = {kind.exit_code: kind for kind in (UsageError, InfeasibleError, StorageError)}


def cached_probe(device: str, directory: str | Path) -> Hardware:
    """This machine: rates from the cache, or measured (one to seven minutes) and kept; capacities as they are now.

    A cache that cannot be read or written costs a warning and the minute, not the run. It is measured in a process of its
    own: what libraries keep (the GPU's context, compiled kernels) is then not missing from the memory of the run.

    Args:
        device: ``auto``, ``cuda`` or ``cpu``.
        directory: on the disk whose rate counts.

    Raises:
        FlexMoEError: as `flexmoe.probe.probe`.
    """
    dev, directory = Device(device), resolved(directory).absolute()
    path = cache_path(dev, directory)
    hardware, stale = _load(path), path.with_suffix(_STALE)
    if hardware is None or stale.exists():
        why = "has not been measured yet" if hardware is None else "was not as measured in the last run"
        log.warning("this machine %s: one to seven minutes, once; the result is kept in %s", why, path)
        hardware = _measured_apart(str(dev.torch), directory)
        _save(hardware, path)
        if stale.exists():
            stale.replace(path.with_suffix(_MEASURED_AGAIN))
    return _with_capacities(hardware, dev, directory)


def mark_stale(device: str, directory: str | Path, lanes: Collection[str]) -> None:
    """A run has found lanes otherwise than measured: the next one measures again.

    Not so where they were found otherwise less than a day after they were measured again for that reason: then it is the
    prediction that is off, or a machine that is never the same.

    Args:
        device, directory: as for `cached_probe`.
        lanes: by name.
    """
    path = cache_path(Device(device), resolved(directory).absolute())
    again = path.with_suffix(_MEASURED_AGAIN)
    try:
        is_fresh = again.exists() and time.time() - again.stat().st_mtime < _FRESH_S
        if is_fresh and set(lanes) <= set(again.read_text(encoding="utf-8").split()):
            log.info("%s: measured again less than a day ago, and kept", ", ".join(sorted(lanes)))
        elif path.exists():
            path.with_suffix(_STALE).write_text("\n".join(sorted(lanes)), encoding="utf-8")
    except OSError as error:
        log.warning("the next run cannot be told to measure this machine again: %s", error)


def cache_path(device: Device, directory: Path) -> Path:
    """The file for this machine, compute device and disk."""
    key = "\0".join((_EDITION, *circumstances(device, directory)))
    return cache_directory() / PATTERN.replace("*", hashlib.sha256(key.encode()).hexdigest()[:16])


def _measured_apart(device: str, directory: Path) -> Hardware:
    """What `python -m flexmoe.probe` finds; its progress is logged, its error is raised."""
    with tempfile.TemporaryDirectory(prefix="flexmoe-probe-") as scratch:
        out = Path(scratch) / "machine.json"
        command = [*_COMMAND, "-o", str(out), "--device", device, "--dir", str(directory)]
        last, steps = "", Steps(MEASURING, bar=sys.stderr.isatty())
        with (
            steps,
            subprocess.Popen(
                command,
                env=child_environment(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            ) as child,
        ):
            for line in child.stderr or ():
                last = line.strip() or last
                steps.relay(last)
        if child.returncode != 0:
            kind = _ERRORS.get(child.returncode, FlexMoEError)
            said = last.removeprefix("flexmoe: ").replace("another --dir", f"another {option('offload_dir')}")
            raise kind(f"this machine could not be measured: {said}")
        return Hardware.load(out)


def _with_capacities(hardware: Hardware, device: Device, directory: Path) -> Hardware:
    now = capacities(device, directory)
    of_gpu = {each.name for each in fields(Gpu)}
    of_the_gpu: dict[str, Any] = {name: value for name, value in now.items() if name in of_gpu}
    of_the_host: dict[str, Any] = {name: value for name, value in now.items() if name not in of_gpu}
    return replace(hardware, gpus=(replace(hardware.gpu, **of_the_gpu),), **of_the_host)


def _load(path: Path) -> Hardware | None:
    try:
        return Hardware.load(path)
    except InputMissingError as error:
        if path.exists():
            log.warning("the rates that were kept cannot be read: %s", error)
    except FlexMoEError as error:
        log.warning("the rates that were kept are measured again: %s", error)
    return None


def _save(hardware: Hardware, path: Path) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        hardware.save(path)
    except (OSError, StorageError) as error:
        log.warning("the rates cannot be kept, so the next run measures again: %s", error)
