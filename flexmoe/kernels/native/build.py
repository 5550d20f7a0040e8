"""Compiles the native library and keeps it in a private cache, one for each set of sources, compiler, flags and CPU.

The library is one translation unit without torch headers behind a C ABI: `attention.cpp` and the headers beside it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from flexmoe.errors import StorageError
from flexmoe.system.machine import cpu_flags
from policies.common.directories import cache_directory

SOURCE = Path(__file__).with_name("attention.cpp")
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-pthread", "-w")
#: Flags of each set of instructions, by the name behind its functions' names.
SETS = {
    "base": ("-march=x86-64",),
    "avx2": ("-march=x86-64-v3",),
    "avx512": ("-march=x86-64-v4",),
    "bf16": ("-march=x86-64-v4", "-mavx512bf16"),
    "amx": ("-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
}


class BuildError(Exception):
    """Why there is no library; becomes one warning."""


def _cache_directory() -> Path:
    """Return the directory for compiled libraries, created private; refuse one that others could write to."""
    try:
        directory = cache_directory()
    except StorageError as error:
        raise BuildError(str(error)) from error
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if status.st_uid != os.geteuid() or status.st_mode & stat.S_IWOTH:
        raise BuildError(
            f"{directory} belongs to another user or is writable by everyone; set FLEXMOE_CACHE to a private directory"
        )
    return directory


def compiler() -> str:
    """The command of the C++ compiler.

    Raises:
        BuildError: there is none.
    """
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        if found := shutil.which(name):
            return found
    raise BuildError("no C++ compiler was found; install g++ or clang++, or set CXX")


def _machine_flag() -> str:
    return "-mcpu=native" if os.uname().machine == "aarch64" else "-march=native"


def sources_digest(*circumstances: str) -> str:
    """A name for the library of these sources, and of what else it depends on."""
    digest = hashlib.sha256("\0".join(circumstances).encode())
    # attention.cpp includes the headers beside it, so a change in any of them is another library.
    for path in sorted((*SOURCE.parent.glob("*.cpp"), *SOURCE.parent.glob("*.h"))):
        content = path.read_bytes()
        digest.update(f"\0{path.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:24]


def build(instructions: str | None = None) -> Path:
    """Compile the library unless the cache has it for these sources, compiler, flags and CPU; return its path.

    Args:
        instructions: one of `SETS` instead of what this CPU has.

    Raises:
        BuildError: no compiler, a failed compilation, or no safe cache directory.
    """
    command, flags = compiler(), (*FLAGS, *(SETS[instructions] if instructions else (_machine_flag(),)))
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout
    target = _cache_directory() / f"attention-{sources_digest(version, *flags, *sorted(cpu_flags()))}.so"
    with _alone_in(target.parent):
        if not target.exists():
            _compile(target, command, flags)
    return target


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Processes that start together wait for the one that compiles; without locks (some network drives) each compiles."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _compile(target: Path, command: str, flags: tuple[str, ...]) -> None:
    # Under a name of its own: if there are two of them, the last rename wins, and both are equal.
    handle, temporary = tempfile.mkstemp(prefix=".building-", suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        result = subprocess.run(
            [command, *flags, str(SOURCE), "-o", temporary], capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise BuildError(f"{command} failed: {result.stderr.strip()[:1000]}")
        os.chmod(temporary, 0o700)
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
