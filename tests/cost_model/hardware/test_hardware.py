import json
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest

import cost_model
from cost_model.hardware.gemm_rates import GemmRates
from cost_model.hardware.hardware import MACHINES, Gpu, Hardware
from flexmoe.engine import engine_plan
from flexmoe.engine.config import EngineConfig
from flexmoe.system.device import Device
from policies.common.errors import DataError, InputMissingError, StorageError, UsageError
from policies.common.memory_units import GIB
from policies.policy import Policy, Workload
from scripts.machines.derived import all_machines

jsonschema = pytest.importorskip("jsonschema")

SCHEMA = json.loads((Path(cost_model.__file__).parent / "hardware" / "hardware.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
PRESETS = ("a100", "a5000", "cpu", "h100", "h200", "l4", "rtx3090", "rtx4090", "t4", "t4-flexllmgen")


ROOFLINE = GemmRates(tokens=(1, 4), weight_elements=(100,), flops_per_s=((100, 400),))


def test_budgets_of_a_gpu_machine_are_what_tensors_may_take():
    t4 = Hardware.preset("t4")
    gpu = t4.gpu.memory_bytes - t4.gpu.reserved_bytes
    assert t4.budgets() == {"gpu": gpu, "cpu": 192 * GIB, "disk": 1500 * GIB}
    smaller = t4.with_budgets(gpu_mem=8.5, cpu_mem=0, nvme_mem=2000)
    assert smaller.budgets() == {"gpu": int(8.5 * GIB) - t4.gpu.reserved_bytes, "cpu": 0, "disk": 2000 * GIB}
    assert t4.with_budgets(gpu_mem=0).budgets()["gpu"] == 0
    assert t4.with_budgets() == t4


def test_on_device_cpu_both_tiers_share_the_host_memory():
    cpu = Hardware.preset("cpu")
    assert cpu.budgets() == {"gpu": None, "cpu": None, "gpu+cpu": 32 * GIB, "disk": 1800 * GIB}
    assert cpu.with_budgets(gpu_mem=16, cpu_mem=0, nvme_mem=1).budgets() == {
        "gpu": 16 * GIB,
        "cpu": cpu.process_bytes,  # not a part of what is placed in the tier
        "gpu+cpu": 32 * GIB,
        "disk": GIB,
    }


@pytest.mark.parametrize(
    "asked",
    [{}, {"gpu_mem": 4.0}, {"gpu_mem": 4, "cpu_mem": 0.5, "nvme_mem": 0.0}, {"cpu_mem": 1, "memory_limit": 2.5}],
)
def test_budgets_on_device_cpu_are_those_that_the_runtime_checks(monkeypatch, asked):
    monkeypatch.setattr(engine_plan, "process_limit_bytes", lambda limit: int((limit or 32) * GIB))
    policy = Policy.from_percent([0, 100, 0, 100, 0, 100], gpu_batch_size=1, num_gpu_batches=1, prompt_len=1, gen_len=1)
    own = Hardware.preset("cpu").process_bytes
    config = EngineConfig(
        policy=policy, workload=Workload(prompt_len=1, gen_len=1), device="cpu", process_bytes=own, **asked
    )
    checked = engine_plan.budgets_of(config, Device("cpu"))
    planned = Hardware.preset("cpu").with_budgets(**asked).budgets()
    if "nvme_mem" not in asked:
        planned["disk"] = None  # the runtime asks the file system instead
    assert planned == checked


def test_a_limit_of_memory_is_that_of_the_whole_process():
    t4, cpu = Hardware.preset("t4"), Hardware.preset("cpu")
    assert t4.with_budgets(memory_limit=100).budgets()["cpu"] == 100 * GIB
    assert t4.with_budgets(memory_limit=100, cpu_mem=60).budgets()["cpu"] == 60 * GIB
    assert t4.with_budgets(memory_limit=50, cpu_mem=60).budgets()["cpu"] == 50 * GIB
    limited = cpu.with_budgets(memory_limit=8, cpu_mem=2).budgets()
    assert limited == {"gpu": None, "cpu": 2 * GIB + cpu.process_bytes, "gpu+cpu": 8 * GIB, "disk": 1800 * GIB}


@pytest.mark.parametrize("name", ["gpu_mem", "cpu_mem", "nvme_mem", "memory_limit"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), True, "16"])
def test_a_budget_that_is_no_size_is_refused_by_its_name(name, value):
    with pytest.raises(UsageError, match=f"^{name} is"):
        Hardware.preset("t4").with_budgets(**{name: value})


def test_a_fingerprint_says_which_machine_and_how_large():
    assert Hardware.preset("t4").with_budgets(cpu_mem=100).fingerprint() == {
        "name": "t4",
        "device": "cuda",
        "gpu": "NVIDIA T4",
        "gpu_memory_bytes": 16 * GIB,
        "host_memory_bytes": 100 * GIB,
        "disk_bytes": 1500 * GIB,
    }


def test_a_saved_machine_loads_as_itself(tmp_path):
    for machine in (Hardware.preset("t4"), Hardware.preset("cpu").with_budgets(cpu_mem=3), all_machines()[0]):
        machine.save(tmp_path / "machine.json")
        assert Hardware.load(tmp_path / "machine.json") == machine
    assert [path.name for path in tmp_path.iterdir()] == ["machine.json"]


def test_a_failed_save_and_a_missing_file_have_their_own_errors(tmp_path):
    with pytest.raises(StorageError, match="could not be written"):
        Hardware.preset("t4").save(tmp_path / "absent" / "machine.json")
    with pytest.raises(InputMissingError, match="absent.json"):
        Hardware.load(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("device", "tpu"),
        ("name", ""),
        ("cores", 0),
        ("cores", 1.5),
        ("host_memory_bytes", -1),
        ("host_bytes_per_s", 0),
        ("row_s", -1e-6),
        ("disk_read_core_s_per_byte", float("nan")),
        ("kv_block_read_s", -1e-6),
        ("kv_block_core_s", None),
        ("kv_block_write_s", float("inf")),
        ("cpu_budget_bytes", GIB),
        ("gpus", ()),
        ("gpus", (Hardware.preset("t4").gpu,) * 2),
        ("sources", {"cores": 3}),
        ("sources", "none"),
    ],
)
def test_a_value_that_no_machine_has_is_refused_by_name(field, value):
    with pytest.raises(UsageError, match=field.rstrip("s")):
        replace(Hardware.preset("t4"), **{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("op_s", -1),
        ("h2d_bytes_per_s", 0),
        ("memory_bytes", 1.0),
        ("experts", {}),
        ("dense", {2: ROOFLINE}),
        ("dense", {2: 1.0, 4: 1.0}),
        ("grouped_experts", {2: 1.0}),
        ("grouped_experts", {8: ROOFLINE}),
        ("grouped_experts", ()),
    ],
)
def test_a_value_that_no_gpu_has_is_refused_by_name(field, value):
    with pytest.raises(UsageError, match=f"{field} of the GPU"):
        replace(Hardware.preset("t4").gpu, **{field: value})


def test_device_cpu_reserves_no_context():
    cpu = Hardware.preset("cpu")
    with pytest.raises(UsageError, match="reserved_bytes"):
        replace(cpu, gpus=(replace(cpu.gpu, reserved_bytes=1),))


def changed(path, value):
    """The T4's document with the value at `path` replaced, or taken out where that is None."""
    document = Hardware.preset("t4").to_json()
    at = document
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    if value is None:
        del at[path[-1]]
    return document


GPU, CURVE = ("gpus", 0), ("gpus", 0, "experts", "2")
BAD_DOCUMENTS = [
    (("kind",), "flexmoe.policy"),
    (("schema_version",), None),
    (("schema_version",), 0),
    (("cores",), None),
    (("cores",), "24"),
    (("cores",), True),
    (("colour",), "red"),
    (("host_bytes_per_s",), -1),
    (("disk_bytes",), 0.5),
    (("kv_block_read_s",), None),
    (("kv_block_core_s",), -1e-6),
    (("kv_block_write_s",), "0"),
    (("sources",), []),
    (("gpus",), {}),
    (("gpus",), []),
    (("gpus",), [3]),
    ((*GPU, "op_s"), None),
    ((*GPU, "colour"), 1),
    ((*GPU, "experts"), 3),
    ((*GPU, "experts", "4"), None),
    ((*GPU, "experts", "8"), {}),
    ((*CURVE, "tokens"), None),
    ((*CURVE, "tokens"), [0.5]),
    ((*CURVE, "flops_per_s"), [[0] * 7]),
    ((*CURVE, "flops_per_s"), [3]),
    (("disk_read_curve",), 3),
    (("disk_read_curve",), [[4096]]),
    (("disk_read_curve",), [4096, 1e9]),
    ((*GPU, "h2d_curve"), [[0, 1e9]]),
    ((*GPU, "h2d_curve"), [[4096.5, 1e9]]),
    ((*GPU, "h2d_curve"), [[4096, 0]]),
    ((*GPU, "grouped_experts"), 3),
    ((*GPU, "grouped_experts"), {"8": {}}),
    ((*GPU, "grouped_experts"), {"2": {"tokens": [1]}}),
]


@pytest.mark.parametrize(("path", "value"), BAD_DOCUMENTS, ids=str)
def test_schema_and_load_refuse_the_same_files(tmp_path, path, value):
    document = changed(path, value)
    assert not VALIDATOR.is_valid(document)
    (tmp_path / "machine.json").write_text(json.dumps(document))
    named = [key for key in path if isinstance(key, str)][-1]
    with pytest.raises(DataError, match=f"machine.json.*({named}|JSON object)"):
        Hardware.load(tmp_path / "machine.json")


def test_a_newer_file_says_so(tmp_path):
    (tmp_path / "machine.json").write_text(json.dumps(changed(("schema_version",), 2)))
    with pytest.raises(DataError, match="schema_version 2.*newer"):
        Hardware.load(tmp_path / "machine.json")


@pytest.mark.parametrize("literal", ["NaN", "1e999"])
def test_numbers_that_are_none_are_refused(tmp_path, literal):
    text = json.dumps(Hardware.preset("t4").to_json()).replace('"cores": 24', f'"cores": {literal}')
    (tmp_path / "machine.json").write_text(text)
    with pytest.raises(DataError, match=f"machine.json.*{literal} is not a finite number"):
        Hardware.load(tmp_path / "machine.json")


def test_what_is_optional_may_be_absent(tmp_path):
    document = Hardware.preset("t4").to_json()
    del document["sources"], document["cpu_budget_bytes"], document["disk_read_curve"]
    del document["gpus"][0]["h2d_curve"], document["gpus"][0]["grouped_experts"]
    VALIDATOR.validate(document)
    (tmp_path / "machine.json").write_text(json.dumps(document))
    assert Hardware.load(tmp_path / "machine.json") == replace(Hardware.preset("t4"), sources={})


def test_schema_and_classes_have_the_same_fields():
    VALIDATOR.check_schema(SCHEMA)
    described = {Hardware: SCHEMA, Gpu: SCHEMA["$defs"]["gpu"], GemmRates: SCHEMA["$defs"]["gemm_rates"]}
    for kind, schema in described.items():
        assert set(schema["properties"]) - {"kind", "schema_version"} == {field.name for field in fields(kind)}


def test_curves_of_links_go_through_a_file(tmp_path):
    t4, curve = Hardware.preset("t4"), ((1 << 20, 1e9), (4 << 20, 2e9))
    measured = replace(t4, disk_read_curve=curve, gpus=(replace(t4.gpu, h2d_curve=list(curve)),))
    VALIDATOR.validate(measured.to_json())
    measured.save(tmp_path / "machine.json")
    again = Hardware.load(tmp_path / "machine.json")
    assert again == measured and again.disk_read_curve == again.gpu.h2d_curve == curve


@pytest.mark.parametrize("sizes", [(), (2,), (2, 4)])
def test_rates_of_grouped_experts_go_through_a_file_as_far_as_they_were_measured(sizes, tmp_path):
    t4 = Hardware.preset("t4")
    measured = replace(t4, gpus=(replace(t4.gpu, grouped_experts=dict.fromkeys(sizes, ROOFLINE)),))
    VALIDATOR.validate(measured.to_json())
    measured.save(tmp_path / "machine.json")
    again = Hardware.load(tmp_path / "machine.json")
    assert again == measured and set(again.gpu.grouped_experts) == set(sizes)


def test_sizes_of_a_links_curve_rise():
    with pytest.raises(UsageError, match="disk_read_curve of the machine has the sizes 8, 8; they must rise"):
        replace(Hardware.preset("t4"), disk_read_curve=((8, 1.0), (8, 2.0)))


def test_an_unknown_machine_is_refused_with_the_known_ones():
    assert Hardware.preset_names() == PRESETS
    assert Hardware.preset("RTX4090").name == "rtx4090"
    with pytest.raises(UsageError, match="'t5'.*a100.*t4-flexllmgen"):
        Hardware.preset("t5")
    with pytest.raises(UsageError, match="no machine"):
        Hardware.preset("../machines/t4")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_satisfies_the_schema_and_names_its_sources(name):
    VALIDATOR.validate(json.loads((MACHINES / f"{name}.json").read_text()))
    machine = Hardware.preset(name)
    assert machine.name == name
    numbers = {field.name for kind in (Hardware, Gpu) for field in fields(kind)}
    numbers -= {
        "name",
        "device",
        "gpus",
        "sources",
        "cpu_budget_bytes",
        "disk_read_curve",
        "h2d_curve",
        "grouped_experts",
    }
    assert set(machine.sources) - {"without a field"} == numbers
    assert all(len(source) > 3 for source in machine.sources.values())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_consistent_machines(name):
    machine = Hardware.preset(name)
    gpu = machine.gpu
    assert gpu.h2d_duplex_bytes_per_s <= gpu.h2d_bytes_per_s
    assert gpu.d2h_duplex_bytes_per_s <= gpu.d2h_bytes_per_s
    assert gpu.kv_load_bytes_per_s <= gpu.h2d_bytes_per_s
    assert machine.cpu_attention_bytes_per_s < machine.host_bytes_per_s
    assert machine.budgets()["disk"] == machine.disk_bytes
    assert machine.kv_block_write_s <= machine.kv_block_read_s < 1e-3 and machine.kv_block_core_s < 1e-3
    for curves in (gpu.experts, gpu.dense):
        times = [curves[2].seconds(tokens, 1e8) for tokens in range(1, 5000, 7)]
        assert times == sorted(times)
        assert all(curves[2].seconds(t, 1e8) <= curves[4].seconds(t, 1e8) for t in (1, 10, 100, 1000))


def test_shipped_machines_are_what_the_script_makes():
    made = {machine.name: machine for machine in all_machines()}
    assert made == {name: Hardware.preset(name) for name in PRESETS}
    for name, machine in made.items():
        assert json.loads((MACHINES / f"{name}.json").read_text()) == machine.to_json()


def test_flexllmgens_t4_has_its_fitted_constants():
    machine, gpu = Hardware.preset("t4-flexllmgen"), Hardware.preset("t4-flexllmgen").gpu
    assert gpu.h2d_bytes_per_s == pytest.approx(12.89 * GIB)
    assert (gpu.d2h_bytes_per_s, gpu.kv_store_bytes_per_s) == pytest.approx((4.82 * GIB, 0.97 * GIB))
    assert machine.disk_read_bytes_per_s == pytest.approx(0.473 * GIB)
    assert (machine.kv_block_read_s, machine.kv_block_core_s, machine.kv_block_write_s) == (0, 0, 0)
    assert machine.cpu_attention_bytes_per_s == pytest.approx(0.0123e12)
    assert 2 * 64 * 1e8 / gpu.experts[2].seconds(64, 1e8) == pytest.approx(4.3e12)
    assert 2 * 8192 * 1e8 / gpu.experts[2].seconds(8192, 1e8) == pytest.approx(21.24e12)


def test_a_machine_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        Hardware.preset("a5000").cores = 1
