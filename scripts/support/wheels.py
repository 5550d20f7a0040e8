"""Packages that travel with the sources as wheels, for a machine that has none of them and cannot fetch any.

python -m pip download --no-deps --only-binary=:all: -d build/wheels pulp
"""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path


def use_wheels(directory: Path) -> list[str]:
    """Unpack the wheels of a directory beside them, and let this process and those that it starts import from there.

    Returns:
        list[str]: their names.
    """
    wheels, site = sorted(directory.glob("*.whl")), (directory / "site").resolve()
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                path = Path(archive.extract(member, site))
                mode = member.external_attr >> 16
                if mode and path.is_file():  # pulp brings a solver, which is run
                    path.chmod(mode & 0o777)
    if wheels:
        sys.path.insert(0, str(site))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    return [wheel.name for wheel in wheels]
