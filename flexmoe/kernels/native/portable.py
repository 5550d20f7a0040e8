"""One library for every x86-64 CPU, for wheels: the sources compiled for several sets of instructions (`dispatch.cpp` chooses).

It lies in the package under a name that has the digest of the sources, so one of other sources is not taken for it.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path

from flexmoe.kernels.native.build import FLAGS, SETS, SOURCE, BuildError, compiler, sources_digest

_DIRECTORY = SOURCE.with_name("prebuilt")
_FUNCTION = re.compile(r"^(?:int|void) (flexmoe_\w+)\(", re.MULTILINE)


def prebuilt() -> Path | None:
    """The library that came with the package; None where there is none for these sources and this machine."""
    path = _path()
    return path if path.exists() and os.uname().machine == "x86_64" else None


def functions() -> list[str]:
    """Names of the library's C functions."""
    sources = sorted((*SOURCE.parent.glob("*.h"), SOURCE))
    return sorted({name for path in sources for name in _FUNCTION.findall(path.read_text(encoding="utf-8"))})


def build_portable(sets: dict[str, tuple[str, ...]] = SETS) -> Path:
    """Compile the library into the package; return its path.

    Args:
        sets: flags of each of `SETS`.

    Raises:
        BuildError: no compiler, or a failed compilation.
    """
    command, names, target = compiler(), functions(), _path()
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        objects = []
        for name, flags in sets.items():
            renamed = [f"-D{function}={function}_{name}" for function in names]
            objects.append(f"{directory}/{name}.o")
            _run(command, *FLAGS, *flags, *renamed, "-c", str(SOURCE), "-o", objects[-1])
        listed = "-DFLEXMOE_FUNCTIONS=" + "".join(f"X({function})" for function in names)
        library = f"{directory}/library.so"
        _run(command, *FLAGS, listed, str(SOURCE.with_name("dispatch.cpp")), *objects, "-o", library)
        os.replace(library, target)
    return target


def _path() -> Path:
    return _DIRECTORY / f"flexmoe-{sources_digest()}.so"


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise BuildError(f"{command[0]} failed: {result.stderr.strip()[:1000]}")
