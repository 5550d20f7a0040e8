"""`docs/adding-a-family.md` is true: its blocks, done to a copy of the sources, add a family whose ids are the reference's."""

import re
import shutil
import sys
from pathlib import Path

from tests.support.forked import Forked
from tests.support.paths import ROOT

PACKAGES = ("policies", "cost_model", "flexmoe")
GUIDE = ROOT / "docs" / "adding-a-family.md"
_BLOCK = re.compile(r"^```python\n# ([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def follow(sources):
    """Does to a copy of the sources what the guide says; returns the program that it ends with."""
    program = None
    for where, code in _BLOCK.findall(GUIDE.read_text("utf-8")):
        if where.startswith("file "):
            (sources / where.removeprefix("file ")).write_text(code)
        elif where.startswith("in "):
            name, _, line = where.removeprefix("in ").partition(", before: ")
            text = (sources / name).read_text("utf-8")
            assert text.count(f"\n{line}") == 1, f"{name} has no line of its own {line!r}"
            (sources / name).write_text(text.replace(f"\n{line}", f"\n{code}{line}"))
        else:
            program = code
    return program


def test_the_guide_adds_a_family_whose_ids_are_those_of_the_reference(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__", "presets")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / "sources" / package, ignore=ignored)
    program = follow(tmp_path / "sources")

    def run():
        """With the modules of the copy; what others have imported of the project is forgotten."""
        for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
            del sys.modules[name]
        sys.path.insert(0, str(tmp_path / "sources"))
        sys.argv = ["-c", str(tmp_path / "toy")]
        exec(compile(program, "the guide", "exec"), {"__name__": "__main__"})
        assert Path(sys.modules["flexmoe"].__file__).is_relative_to(tmp_path)

    code, out, err = Forked(run, tmp_path, tmp_path / "sources").wait(300)
    assert code == 0 and out.splitlines()[-1] == "equal", err[-3000:]


def test_the_guide_has_every_kind_of_block():
    kinds = [where.split(" ")[0] for where, _ in _BLOCK.findall(GUIDE.read_text("utf-8"))]
    assert kinds == ["in", "in", "file", "in", "in", "run"]
