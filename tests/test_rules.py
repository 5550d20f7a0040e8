"""The rules of the sources: which way imports point, what a folder holds, and what each package may use."""

import re
import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT
from tests.support.source_tree import (
    PACKAGES,
    WITH_SCRIPTS,
    all_imports,
    cycle,
    folders,
    imports,
    is_module,
    modules,
    path_of,
    private_names,
    source,
)

#: Lowest first: a module imports from its own line and from those above it. A name without a line of its own belongs to the
#: line of the folder that it lies in.
ORDER = (
    ("policies.common",),
    ("policies.units",),
    ("policies.workload", "policies.placement", "policies.policy", "policies.schedule"),
    ("policies",),
    ("policies.admission",),
    ("cost_model.hardware",),
    ("cost_model.model",),
    ("cost_model.memory",),
    ("cost_model.routing",),
    ("cost_model.timing",),
    ("cost_model.simulation",),
    ("cost_model.planner",),
    ("cost_model",),
    ("cost_model.cli",),
    ("flexmoe.errors",),
    ("flexmoe.vllm_arguments",),
    ("flexmoe.outputs",),
    ("flexmoe.structured",),
    ("flexmoe.params",),
    ("flexmoe.system",),
    ("flexmoe.checkpoint",),
    ("flexmoe.formats",),
    ("flexmoe.weights",),
    ("flexmoe.kernels",),
    ("flexmoe.sampling",),
    ("flexmoe.models.common",),
    ("flexmoe.models.sparse", "flexmoe.models.dense"),
    ("flexmoe.models",),
    ("flexmoe.kv",),
    ("flexmoe.prefixes",),
    ("flexmoe.debugging",),
    ("flexmoe.engine",),
    ("flexmoe.text",),
    ("flexmoe.openai",),
    ("flexmoe.inputs",),
    ("flexmoe.progress",),
    ("flexmoe.quantizing",),
    ("flexmoe.probing",),
    ("flexmoe.planning",),
    ("flexmoe.calls",),
    ("flexmoe.llm",),
    ("flexmoe.preflight",),
    ("flexmoe.job",),
    ("flexmoe.inspecting",),
    ("flexmoe.batch",),
    ("flexmoe.ray", "flexmoe.lm_eval"),
    ("flexmoe.serving",),
    ("flexmoe.serving.store",),
    ("flexmoe.serving.work",),
    ("flexmoe.serving.endpoints",),
    ("flexmoe.serving.http",),
    ("flexmoe",),
    ("flexmoe.cli",),
    (
        "flexmoe.run",
        "flexmoe.serve",
        "flexmoe.merge",
        "flexmoe.probe",
        "flexmoe.quantize",
        "flexmoe.inspect",
        "cost_model.__main__",
    ),
    ("scripts",),
)
LINES = {name: line for line, names in enumerate(ORDER) for name in names}
MOST_MODULES = 12
STDLIB = set(sys.stdlib_module_names)
#: What only one flag needs, imported where it is used: a plot, and the lengths of a requests file.
OPTIONAL = {"cost_model.cli.plot": {"matplotlib"}, "cost_model.__main__": {"flexmoe"}}
MAY_PRINT = {"flexmoe.cli.run", "flexmoe.cli.merge", "flexmoe.cli.probe", "cost_model.cli.plan"}
#: Folders within a package that are packages for users: their `__init__` gives what they are for.
PUBLIC = {"flexmoe.ray", "flexmoe.lm_eval"}
#: Folders of tests that mirror none of the sources.
OWN_FOLDERS = {Path("tests/support"), Path("tests/system")}


def none_of(rule, offenders):
    """Fails with a sentence that names all offenders."""
    found = sorted(set(map(str, offenders)))
    assert not found, "\n  ".join([f"{rule}; {len(found)} break this:", *found])


def rank(module):
    """The line of `ORDER` of the longest name there that the module lies below."""
    parts = module.split(".")
    return next(LINES[name] for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in LINES)


def folder_of(module):
    return str(path_of(module).parent.relative_to(ROOT))


def test_imports_point_one_way_only():
    own = (i for i in all_imports(*WITH_SCRIPTS) if is_module(i.target))
    none_of(
        "A module imports from its own folder and from those before it in ORDER",
        (i for i in own if i.top == "tests" or rank(i.target) > rank(i.module)),
    )


def test_no_folders_import_each_other():
    pairs = {(folder_of(i.module), folder_of(i.target)) for i in all_imports(*WITH_SCRIPTS) if is_module(i.target)}
    tops = set(WITH_SCRIPTS)  # their modules lie at several heights of ORDER
    found = cycle((a, b) for a, b in pairs if a != b and not tops & {a, b})
    assert not found, "Folders import each other in a circle: " + " -> ".join(found)


def test_no_modules_that_run_import_each_other():
    running = (i for i in all_imports(*WITH_SCRIPTS) if is_module(i.target) and not i.for_types)
    found = cycle((i.module, i.target) for i in running)
    assert not found, "Modules import each other in a circle: " + " -> ".join(found)


def test_a_folder_holds_twelve_modules_at_most():
    counts = {
        folder: sum(path.name != "__init__.py" for path in (ROOT / folder).glob("*.py"))
        for folder in folders(*WITH_SCRIPTS)
    }
    none_of(
        f"A folder holds {MOST_MODULES} modules at most, beside its __init__",
        (f"{folder} holds {count}" for folder, count in counts.items() if count > MOST_MODULES),
    )


def test_an_init_holds_a_docstring_at_most():
    inits = (
        m for m in modules(*WITH_SCRIPTS) if path_of(m).name == "__init__.py" and m not in {*WITH_SCRIPTS, *PUBLIC}
    )
    none_of(
        "The __init__ of a folder within a package holds a docstring at most",
        (m for m in inits if not source(m).documented_only),
    )


def test_only_command_lines_parse_arguments():
    none_of(
        "argparse is for the folders named cli, policies.common.command_line, __main__ and scripts",
        (
            i
            for i in all_imports(*PACKAGES)
            if i.top == "argparse"
            and i.module != "policies.common.command_line"
            and not {"cli", "__main__"} & set(i.module.split("."))
        ),
    )


def test_modules_import_public_names_only():
    none_of(
        "A name with an underscore is its own module's",
        (use for module in modules(*WITH_SCRIPTS) for use in private_names(module)),
    )


def test_tests_import_public_names_and_nothing_from_each_other():
    found = [i for i in all_imports("tests") if is_module(i.target) and i.module != i.target]
    none_of(
        "What tests share is in tests.support, and what they import is public",
        (i for i in found if (i.name or "").startswith("_") or i.target.split(".")[-1].startswith("test_")),
    )


def test_policies_know_the_standard_library_only():
    known = STDLIB | {"policies"}
    none_of("policies imports the standard library only", (i for i in all_imports("policies") if not {i.top} <= known))


def test_cost_model_knows_no_torch_and_no_runtime():
    known = STDLIB | {"numpy", "pulp", "policies", "cost_model"}
    none_of(
        "cost_model imports numpy, pulp and policies only",
        (i for i in all_imports("cost_model") if i.top not in known | OPTIONAL.get(i.module, set())),
    )


def test_runtime_never_imports_pulp():
    none_of("flexmoe never imports pulp", (i for i in all_imports("flexmoe") if i.top == "pulp"))


def test_executor_knows_no_model_and_no_json():
    none_of(
        "The executor knows no model and no JSON",
        (i for i in imports("flexmoe.engine.executor") if i.target.startswith("flexmoe.models") or i.top == "json"),
    )


def test_models_do_not_know_the_executor():
    unknown = ("flexmoe.engine", "flexmoe.weights.stream")
    none_of(
        "Models know neither the engine nor the weight stream",
        (i for i in all_imports("flexmoe/models") if i.target.startswith(unknown)),
    )


def test_no_assert_outside_the_tests():
    none_of(
        "Nothing but tests asserts",
        (f"{m}:{line}" for m in modules(*WITH_SCRIPTS) for line in source(m).asserts),
    )


def test_only_command_lines_print():
    none_of(
        "Only command lines print",
        (
            f"{m}:{line}"
            for m in modules(*PACKAGES)
            if m not in MAY_PRINT and not m.endswith("__main__")
            for line in source(m).prints
        ),
    )


def test_no_pickle_is_read_or_written():
    pickles = {"pickle", "dill", "shelve", "marshal"}
    none_of("Nothing is pickled", (i for i in all_imports(*WITH_SCRIPTS) if i.top in pickles))


def test_no_remote_code_is_trusted():
    none_of(
        "No code of a checkpoint is run",
        (m for m in modules(*WITH_SCRIPTS) if "trust_remote_code=True" in path_of(m).read_text("utf-8")),
    )


def test_folders_of_tests_mirror_those_of_the_sources():
    own = OWN_FOLDERS | {Path("tests")}
    none_of(
        "A folder of tests has the name of a folder of the sources",
        (f for f in folders("tests") if f not in own and not (ROOT / f.relative_to("tests") / "__init__.py").exists()),
    )


def loaded_by(statement):
    """Top-level modules in a fresh interpreter after ``statement``."""
    code = f"import sys; {statement}; print(*sorted({{m.split('.')[0] for m in sys.modules if sys.modules[m]}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_planning_loads_neither_torch_nor_the_runtime():
    planning = [m for m in modules("policies", "cost_model") if not m.endswith("__main__")]
    unwanted = {"torch", "transformers", "flexmoe"}.union(*OPTIONAL.values())
    assert not loaded_by(f"import {', '.join(planning)}") & unwanted


def test_policies_load_no_third_party_package():
    every = ", ".join(modules("policies"))
    assert not loaded_by(f"import {every}") & {"numpy", "torch", "pulp", "cost_model"}


def test_the_package_alone_loads_no_library():
    assert not loaded_by("import flexmoe") & {"torch", "numpy", "transformers", "pulp", "cost_model"}


def test_the_processes_that_prepare_rows_need_no_torch():
    """Not even for what they import within a function."""
    blocked = "sys.modules['torch'] = None"
    every = ", ".join(sorted(reached_from("flexmoe.preflight.worker")))
    assert "torch" not in loaded_by(f"{blocked}; import {every}")


def reached_from(start):
    """Modules of the project that a module imports when it runs, and those that they import."""
    reached, ahead = set(), [start]
    while ahead:
        module = ahead.pop()
        if module not in reached:
            reached.add(module)
            ahead += [i.target for i in imports(module) if is_module(i.target) and not i.for_types]
    return reached


#: Texts with a flag that are commands for other programs.
FLAGS_OF_OTHERS = {
    ("flexmoe.kernels.native.build", "--version"),
    ("flexmoe.probing.cache", "--device"),
    ("flexmoe.probing.cache", "--dir"),
    ("flexmoe.job.shards", "--array"),
    ("policies.common.option_names", "--checkpoint-interval"),
    ("policies.common.option_names", "--dir"),
}


def test_messages_call_options_by_the_name_that_the_caller_knows():
    """Whoever calls from Python has arguments, not flags: `option` of `policies.common.option_names` knows which."""
    none_of(
        "Outside the command lines a message names an option with option()",
        (
            f"{module}:{line} says {flag}"
            for module in modules(*PACKAGES)
            if not {"cli", "__main__", "command_line"} & set(module.split("."))
            for line, text in source(module).texts
            for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)
            if (module, flag) not in FLAGS_OF_OTHERS
        ),
    )
