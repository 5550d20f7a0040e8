"""Shared by all tests: OpenMP's settings have to be in place before anything loads torch."""

import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import flexmoe  # noqa: F401
from policies import schedule

ROOT = Path(__file__).parents[1]
#: What is kept between runs of the tests (the compiled library), apart from what the user's own runs keep.
CACHE = ROOT / "build" / "cache"
os.environ["FLEXMOE_CACHE"] = str(CACHE)
if "PYTEST_XDIST_WORKER" in os.environ:  # the tests have the cores among them, one each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

#: Modules whose fixtures all tests may ask for.
FIXTURES = ("tests.support.command_lines", "tests.support.jobs", "tests.support.pretend_cuda")


def pytest_configure(config):
    if _runs_tests(config):
        for name in FIXTURES:
            config.pluginmanager.import_plugin(name)


def pytest_sessionstart(session):
    if not hasattr(session.config, "workerinput"):  # plans of an earlier run would hide what the planner does
        shutil.rmtree(CACHE / "plans", ignore_errors=True)
    if not _runs_tests(session.config):
        # Compiled while the others load and collect; a test that needs the library waits for it.
        command, quiet = [sys.executable, "-m", "flexmoe.kernels.native"], subprocess.DEVNULL
        session.config.native_build = subprocess.Popen(command, cwd=ROOT, stdout=quiet, stderr=quiet)


def pytest_unconfigure(config):
    if build := getattr(config, "native_build", None):
        build.wait()


def _runs_tests(config):
    """Whether this process does: one that leaves them to others need not load torch."""
    return hasattr(config, "workerinput") or not config.getoption("numprocesses", None)


def pytest_collection(session):
    if _runs_tests(session.config):
        gc.disable()  # until all tests are there: what is imported stays


def pytest_collection_finish():
    """What has been imported stays: the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def in_common(tmp_path_factory):
    """The folder that the processes of one run have in common: what one of them computed need not be computed by another."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, in_common):
    """`tiny(name)`: the variant of that name from `tests.support.tiny`, made once in a process."""
    from tests.support.tiny import RECIPES

    return _made_once(RECIPES, tmp_path_factory, in_common)


@pytest.fixture(scope="session")
def variants(tmp_path_factory, in_common):
    """`variants(name)`: likewise from `tests.support.tiny_families` and `tiny_models`."""
    from tests.support import tiny_families, tiny_models

    return _made_once(tiny_families.RECIPES | tiny_models.RECIPES, tmp_path_factory, in_common)


def _made_once(recipes, tmp_path_factory, common):
    from tests.support.tiny import make

    made = {}

    def get(name="gqa-8-to-2"):
        if name not in made:
            made[name] = make(recipes[name], tmp_path_factory.mktemp(name), known=common / f"greedy-{name}.json")
        return made[name]

    return get


@pytest.fixture
def loads_cost_their_bytes(monkeypatch):
    """Tiny experts stand for large ones, of which a load costs no more than its bytes: few rows bring them on demand."""
    from cost_model.routing import on_demand

    monkeypatch.setattr(on_demand, "LOAD_BYTES", {"cpu": 0, "disk": 0})


@pytest.fixture(scope="module")
def planned_soon():
    """The search ends early: the tests are about what becomes of a plan, and not about how good it is."""
    from cost_model.planner import search

    optimum = search.optimum
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "optimum", lambda *about: optimum(*about[:3], effort=0.01))
        yield


@pytest.fixture
def one_thread():
    """Tiny operations on busy cores: several threads would spend most of their time waiting for each other."""
    yield from _threads(1)


@pytest.fixture
def two_threads():
    """What is divided among threads is so wherever the tests run."""
    yield from _threads(2)


def _threads(count):
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_halves(monkeypatch):
    """Two half-blocks march on device cpu with however few tokens."""
    monkeypatch.setattr(schedule, "LEAST_HALF_TOKENS", 0)
