"""The layering of DESIGN §4, read off the sources."""

import ast
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

PACKAGES = ("policies", "cost_model", "flexmoe")
STDLIB = set(sys.stdlib_module_names)
#: What only one flag needs, imported where it is used: a plot, and the tokens of prompts that are text.
OPTIONAL = {"plot.py": {"matplotlib"}, "prompts.py": {"tokenizers"}}
MAY_PRINT = {"run.py", "merge.py", "plan.py", "probe.py", "__main__.py"}


def sources(*packages):
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def nodes(path, *kinds):
    return [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, kinds)]


def imports(path):
    """Full names of the modules that a file imports, wherever in the file."""
    names = set()
    for node in nodes(path, ast.Import, ast.ImportFrom):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif node.level:
            here = path.relative_to(ROOT).with_suffix("").parts[: -node.level]
            names.add(".".join((*here, *filter(None, [node.module]))))
        else:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def packages_of(path):
    return {name.split(".")[0] for name in imports(path)}


def named(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", sources("policies"), ids=named)
def test_policies_know_the_standard_library_only(path):
    assert packages_of(path) <= STDLIB | {"policies"}


@pytest.mark.parametrize("path", sources("cost_model"), ids=named)
def test_cost_model_knows_no_torch_and_no_runtime(path):
    assert packages_of(path) <= STDLIB | {"numpy", "pulp", "policies", "cost_model"} | OPTIONAL.get(path.name, set())


@pytest.mark.parametrize("path", sources("flexmoe"), ids=named)
def test_runtime_never_imports_pulp(path):
    assert "pulp" not in packages_of(path)


def test_executor_knows_no_model_and_no_json():
    names = imports(ROOT / "flexmoe" / "engine" / "executor.py")
    assert not {n for n in names if n.startswith("flexmoe.models") or n.split(".")[0] == "json"}


def test_models_do_not_know_the_executor():
    for path in sources("flexmoe/models"):
        assert not {
            n
            for n in imports(path)
            if n.startswith(("flexmoe.engine.executor", "flexmoe.engine.engine", "flexmoe.weights.stream"))
        }


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=named)
def test_no_assert_outside_the_tests(path):
    assert not nodes(path, ast.Assert)


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=named)
def test_only_command_lines_print(path):
    calls = [n for n in nodes(path, ast.Call) if isinstance(n.func, ast.Name) and n.func.id == "print"]
    assert not calls or path.name in MAY_PRINT


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=named)
def test_no_pickle_is_read_or_written(path):
    assert not packages_of(path) & {"pickle", "dill", "shelve", "marshal"}
    assert "trust_remote_code=True" not in path.read_text("utf-8")


def loaded_by(statement):
    """Top-level modules in a fresh interpreter after ``statement``."""
    code = f"import sys; {statement}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    return set(done.stdout.split())


def test_planning_loads_neither_torch_nor_the_runtime():
    modules = ", ".join(
        str(p.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        for p in sources("policies", "cost_model")
        if p.name != "__main__.py"
    )
    assert not loaded_by(f"import {modules}") & {"torch", "transformers", "flexmoe"}.union(*OPTIONAL.values())


def test_policies_load_no_third_party_package():
    assert not loaded_by("import policies.policy, policies.schedule") & {"numpy", "torch", "pulp", "cost_model"}
