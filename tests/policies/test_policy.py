import json
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest

import policies
from cost_model.memory.allocation import residency
from cost_model.model.arch import ModelArch
from policies.common.errors import DataError, InfeasibleError, InputMissingError, StorageError, UsageError
from policies.policy import Policy, PolicyFile, Workload

jsonschema = pytest.importorskip("jsonschema")

SCHEMA = json.loads((Path(policies.__file__).parent / "policy.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def make_policy(**changes):
    values = dict(gpu_batch_size=16, num_gpu_batches=4, prompt_len=512, gen_len=32) | changes
    return Policy.from_percent([10, 20, 0, 100, 100, 0], **values)


def document(**policy_changes):
    emitted = PolicyFile(make_policy()).to_json()
    emitted["policy"] |= policy_changes
    return emitted


def load_text(tmp_path, text):
    path = tmp_path / "policy.json"
    path.write_text(text)
    return PolicyFile.load(path)


def test_six_numbers_are_weight_cache_and_activation():
    policy = make_policy(cpu_attention_percent=50)
    assert (policy.w_gpu_percent, policy.w_cpu_percent) == (10, 20)
    assert (policy.cache_gpu_percent, policy.cache_cpu_percent) == (0, 100)
    assert (policy.act_gpu_percent, policy.act_cpu_percent) == (100, 0)
    assert policy.cpu_attention_percent == 50
    assert policy.block_size == 64
    assert type(policy.w_gpu_percent) is float


def test_prefill_tokens_keep_the_block_full_unless_given():
    assert make_policy().prefill_tokens == 64 * 512 // 32
    assert make_policy(gen_len=100).prefill_tokens == 328
    assert make_policy(schedule="static").prefill_tokens == 64 * 512
    assert make_policy(gpu_batch_size=1, num_gpu_batches=1, prompt_len=1, gen_len=1000).prefill_tokens == 1
    assert make_policy(prefill_tokens=7).prefill_tokens == 7
    with pytest.raises(UsageError, match="prefill_tokens is 0"):
        make_policy(prefill_tokens=0)


def test_a_policy_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        make_policy().gpu_batch_size = 2


@pytest.mark.parametrize("name", ["gpu_batch_size", "num_gpu_batches", "prefill_tokens"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "4", None, float("nan")])
def test_a_count_is_a_whole_number_of_at_least_one(name, value):
    with pytest.raises(UsageError, match=name):
        replace(make_policy(), **{name: value})


@pytest.mark.parametrize("name", [field.name for field in fields(Policy) if field.name.endswith("_percent")])
@pytest.mark.parametrize("value", [-0.1, 100.1, True, "10", None, float("nan"), float("inf"), 10**400])
def test_a_percent_is_a_number_from_0_to_100(name, value):
    with pytest.raises(UsageError, match=name):
        replace(make_policy(), **{name: value})


@pytest.mark.parametrize("pair", ["w", "cache", "act"])
def test_a_pair_sums_to_at_most_a_hundred(pair):
    with pytest.raises(UsageError, match="add up to 100.1 %"):
        replace(make_policy(), **{f"{pair}_gpu_percent": 60, f"{pair}_cpu_percent": 40.1})
    replace(make_policy(), **{f"{pair}_gpu_percent": 60, f"{pair}_cpu_percent": 40.0000005})


@pytest.mark.parametrize("name", ["overlap", "pin_weight", "compress_cache"])
def test_a_switch_is_true_or_false(name):
    with pytest.raises(UsageError, match=name):
        replace(make_policy(), **{name: 1})


def test_a_format_of_weights_is_one_that_a_run_can_pack():
    for name in ("int4", "int8", "fp8", "mxfp4", None):
        assert make_policy(compress_weight=name).compress_weight == name
    for bad in (True, "int3", "", 4):
        with pytest.raises(UsageError, match="compress_weight.* int4, int8, fp8, mxfp4"):
            make_policy(compress_weight=bad)


def test_a_file_of_before_formats_had_names_loads(tmp_path):
    path = tmp_path / "policy.json"
    document = PolicyFile(make_policy()).to_json()
    document["policy"]["compress_weight"] = False
    path.write_text(json.dumps(document))
    assert PolicyFile.load(path).policy == make_policy()


@pytest.mark.parametrize("value", [0, 3, True, 1.5, "2", None])
def test_other_numbers_of_half_blocks_are_refused(value):
    with pytest.raises(UsageError, match="half_blocks is .*; it must be 1, or 2"):
        make_policy(half_blocks=value)


def test_buffers_of_two_half_blocks_are_for_a_batchs_share_of_fetched_rows():
    def policy(half_blocks, attended, kv=(10, 80)):
        return Policy.from_percent(
            (0, 100, *kv, 100, 0),
            gpu_batch_size=100,
            num_gpu_batches=4,
            prompt_len=32,
            gen_len=16,
            half_blocks=half_blocks,
            cpu_attention_percent=attended,
        )

    assert policy(1, 75).fetched_rows == policy(2, 0).fetched_rows == 100
    assert policy(1, 75).most_fetched(tails=0) is None
    two = policy(2, 75)  # a quarter of 80, and 10 on disk
    assert two.fetched_rows == 31 and two.most_fetched(tails=40) == 4 * 31 - 40
    assert policy(2, 100, (20, 80)).fetched_rows == 1


def test_an_unknown_schedule_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="'lazy'.*rolling, static"):
        make_policy(schedule="lazy")


@pytest.mark.parametrize("percent", [[10, 20], [10] * 7, "101010", None, 50])
def test_percent_is_six_numbers(percent):
    with pytest.raises(UsageError, match="six numbers"):
        Policy.from_percent(percent, gpu_batch_size=1, num_gpu_batches=1, prompt_len=1, gen_len=1)


def test_an_unknown_field_beside_percent_is_named():
    for name in ("colour", "w_gpu_percent"):
        with pytest.raises(UsageError, match=name):
            make_policy(**{name: 1})


def test_a_workload_has_at_least_one_token_each_way():
    assert Workload(prompt_len=1, gen_len=1).gen_len == 1
    for bad in (dict(prompt_len=0, gen_len=1), dict(prompt_len=1, gen_len=0), dict(prompt_len=1.5, gen_len=1)):
        with pytest.raises(UsageError):
            Workload(**bad)


def test_a_saved_policy_loads_as_itself(tmp_path):
    policy = replace(make_policy(), w_gpu_percent=100 / 7, overlap=False, schedule="static")
    model = ModelArch.from_name("mixtral-8x7b").fingerprint()
    saved = PolicyFile(policy, model, {"gpus": []}, {"prompt_len": 512}, {"tokens_per_s": 1.5})
    saved.save(tmp_path / "policy.json")
    assert PolicyFile.load(tmp_path / "policy.json") == saved
    assert [path.name for path in tmp_path.iterdir()] == ["policy.json"]


def test_an_order_of_experts_is_saved_and_loaded(tmp_path):
    policy = replace(make_policy(), expert_order=[[1, 0, 2], [2, 1, 0]])
    assert policy.expert_order == ((1, 0, 2), (2, 1, 0)) and hash(policy) == hash(replace(policy))
    PolicyFile(policy).save(tmp_path / "policy.json")
    VALIDATOR.validate(json.loads((tmp_path / "policy.json").read_text()))
    assert PolicyFile.load(tmp_path / "policy.json").policy == policy


@pytest.mark.parametrize("order", [((0, 2),), ((1, 2),), ((-1, 0),), ((0, 1.5),)])
def test_an_order_that_does_not_name_each_unit_once_is_refused(order):
    with pytest.raises(UsageError, match="expert_order has .* for layer 0"):
        make_policy(expert_order=order)


def test_an_order_of_another_model_is_refused_where_it_is_placed():
    with pytest.raises(InfeasibleError, match="another model or other units of experts: expert_order is of 2 layers"):
        residency(ModelArch.from_name("mixtral-8x7b"), ((0, 1), (1, 0)))


def test_an_empty_section_is_none():
    assert PolicyFile(make_policy(), {}, {}) == PolicyFile(make_policy())


def test_emitted_json_satisfies_the_schema():
    VALIDATOR.check_schema(SCHEMA)
    model = ModelArch.from_name("mixtral-8x22b").fingerprint()
    for emitted in (PolicyFile(make_policy()), PolicyFile(make_policy(), model, {}, {"gen_len": 3}, {"a": 1.5})):
        VALIDATOR.validate(json.loads(json.dumps(emitted.to_json())))


def test_schema_and_dataclass_have_the_same_fields_and_defaults():
    described = SCHEMA["properties"]["policy"]
    required = [field.name for field in fields(Policy) if field.name in described["required"]]
    assert set(described["properties"]) == {field.name for field in fields(Policy)}
    assert set(required) == set(described["required"])
    minimal = Policy(**dict.fromkeys(required, 1))
    for name, entry in described["properties"].items():
        assert name in required or getattr(minimal, name) == entry["default"]


BAD_POLICIES = [
    {"gpu_batch_size": 0},
    {"gpu_batch_size": True},
    {"gpu_batch_size": 1.5},
    {"w_gpu_percent": 101},
    {"w_gpu_percent": "10"},
    {"overlap": 1},
    {"schedule": "lazy"},
    {"colour": "red"},
    {"prefill_tokens": None},
    {"expert_order": []},
    {"expert_order": [[]]},
    {"expert_order": [[0, 0]]},
    {"expert_order": [[0, "1"]]},
    {"expert_order": [[0, True]]},
    {"expert_order": [0, 1]},
    {"expert_order": "01"},
]


@pytest.mark.parametrize("changes", BAD_POLICIES)
def test_schema_and_load_refuse_the_same_policies(tmp_path, changes):
    bad = document(**changes)
    assert not VALIDATOR.is_valid(bad)
    with pytest.raises(DataError, match=next(iter(changes))):
        load_text(tmp_path, json.dumps(bad))


@pytest.mark.parametrize("changes", [{"kind": "other"}, {"schema_version": 0}, {"model": []}, {"policy": 3}, {"x": 1}])
def test_schema_and_load_refuse_the_same_files(tmp_path, changes):
    bad = document() | changes
    assert not VALIDATOR.is_valid(bad)
    with pytest.raises(DataError):
        load_text(tmp_path, json.dumps(bad))


def test_percents_that_do_not_add_up_are_refused_in_a_file(tmp_path):
    with pytest.raises(DataError, match="add up to 120 %"):
        load_text(tmp_path, json.dumps(document(w_gpu_percent=100)))


def test_a_missing_field_is_named(tmp_path):
    bad = document()
    del bad["policy"]["act_cpu_percent"]
    with pytest.raises(DataError, match="lacks act_cpu_percent"):
        load_text(tmp_path, json.dumps(bad))


def test_a_newer_file_says_so(tmp_path):
    with pytest.raises(DataError, match="schema_version 2.*newer"):
        load_text(tmp_path, json.dumps(document() | {"schema_version": 2}))


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(tmp_path, literal):
    text = json.dumps(document()).replace('"w_gpu_percent": 10.0', f'"w_gpu_percent": {literal}')
    with pytest.raises(DataError, match="not a finite number"):
        load_text(tmp_path, text)


def test_a_key_given_twice_is_refused(tmp_path):
    text = json.dumps(document()).replace('"overlap": true', '"overlap": true, "overlap": false')
    with pytest.raises(DataError, match="'overlap' is given more than once"):
        load_text(tmp_path, text)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"kind": ', "[" * 100_000, "9" * 10_000])
def test_what_is_no_policy_file_is_refused(tmp_path, text):
    with pytest.raises(DataError, match="policy.json"):
        load_text(tmp_path, text)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "policy.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        PolicyFile.load(tmp_path / "policy.json")


def test_a_missing_file_is_missing_input(tmp_path):
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(InputMissingError):
            PolicyFile.load(path)


def test_a_failed_save_leaves_nothing_behind(tmp_path):
    (tmp_path / "taken").mkdir()
    for path in (tmp_path / "absent" / "policy.json", tmp_path / "taken"):
        with pytest.raises(StorageError):
            PolicyFile(make_policy()).save(path)
    with pytest.raises(ValueError):
        PolicyFile(make_policy(), predicted={"rate": float("nan")}).save(tmp_path / "policy.json")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_another_model_is_refused_with_what_differs():
    small = ModelArch.from_name("mixtral-8x7b").fingerprint()
    large = ModelArch.from_name("mixtral-8x22b").fingerprint()
    PolicyFile(make_policy(), small).check_model(small)
    PolicyFile(make_policy()).check_model(small)
    with pytest.raises(InfeasibleError) as caught:
        PolicyFile(make_policy(), small).check_model(large)
    assert "num_layers is 32 in the policy and 56 in the model" in str(caught.value)
    assert "hidden is 4096" in str(caught.value) and "top_k" not in str(caught.value)
