"""Float32 greedy ids and logits of the families in `tests.support.tiny_models` are transformers'; see `test_family_parity`."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cost_model.model.weight_units import units_of
from flexmoe.errors import DataError
from flexmoe.models.loader import load_model
from tests.support.exactness import CHOICES, Case, check, make_llm
from tests.support.tiny import GEN_LEN, make
from tests.support.tiny_models import RECIPES, drawn

pytestmark = pytest.mark.usefixtures("one_thread", "loads_cost_their_bytes")

#: Prompts of the quick tests; the slow ones have all.
FEW = (5, 65, 33, 1)


#: Prompts of the drawn configs: of one token, around the switch of the LongRoPE, and longer than a chunk.
LENGTHS = (1, 5, 58, 64, 17, 65, 33, 100)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """`few(name)`: a checkpoint that is made when it is asked for, with few prompts."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = make(RECIPES[name], tmp_path_factory.mktemp(name), FEW)
        return made[name]

    return get


def cases(count, seed):
    """Random ways to run; `CHOICES` has the values of every field."""
    rng = random.Random(seed)
    names = [name for name in CHOICES if name != "variant"]
    return [Case(variant="", **{name: rng.choice(CHOICES[name]) for name in names}) for _ in range(count)]


WAYS = [(name, case) for at, name in enumerate(RECIPES) for case in cases(6, 50 + at)]
#: One way of each family is quick.
QUICK = [(name, Case(variant="", kv_tokens=480)) for name in RECIPES if not name.endswith("-packed")]


@pytest.mark.parametrize("name, case", QUICK, ids=str)
def test_greedy_ids_of_a_family_equal_transformers(name, case, few, tmp_path, monkeypatch):
    check(few(name), case, "cpu", tmp_path, monkeypatch, longest=max(FEW) + GEN_LEN)


@pytest.mark.slow
@pytest.mark.parametrize("name, case", WAYS, ids=str)
def test_greedy_ids_of_a_family_equal_transformers_wherever_things_live(name, case, variants, tmp_path, monkeypatch):
    check(variants(name), case, "cpu", tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_logits_of_every_position_are_transformers(name, variants, tmp_path, monkeypatch):
    variant = variants(name)
    llm = make_llm(variant, Case(placement=(0, 50, 0, 0, 0, 0), prefill_tokens=37), "cpu", tmp_path, monkeypatch)
    try:
        for prompt in variant.prompts[:8]:
            with torch.no_grad():
                wanted = variant.model(torch.tensor([prompt])).logits[0]
            torch.testing.assert_close(llm.logits(prompt), wanted, atol=2e-3, rtol=1e-4)
    finally:
        llm.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(96))
def test_greedy_ids_of_random_configs_equal_transformers(seed, tmp_path, monkeypatch):
    variant = make(drawn(seed), tmp_path / "checkpoint", LENGTHS)
    (case,) = cases(1, 2000 + seed)
    check(variant, case, "cpu", tmp_path, monkeypatch, longest=max(LENGTHS) + GEN_LEN)


def _edited(directory, tmp_path, edit):
    """A checkpoint whose tensors are edited, in one file."""
    tensors = {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}
    target = tmp_path / "edited"
    target.mkdir()
    save_file(edit(tensors), target / "model.safetensors", {"format": "pt"})
    shutil.copy(directory / "config.json", target)
    return target


def _with_further_layer(tensors):
    last = {name: t for name, t in tensors.items() if name.startswith("model.layers.2.")}
    return tensors | {name.replace("layers.2.", "layers.3."): t.clone() for name, t in last.items()}


def test_layers_that_predict_further_tokens_are_ignored(few, tmp_path):
    directory = _edited(few("glm4").directory, tmp_path, _with_further_layer)
    assert load_model(str(directory)).arch.num_layers == 3
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    with pytest.raises(DataError, match=r"unexpected"):
        load_model(str(directory))


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_model."])
def test_a_decoder_that_is_part_of_a_larger_model_is_read_by_its_own_names(prefix, few, tmp_path):
    def renamed(tensors):
        inner = prefix == "language_model."
        own = {f"{prefix}{name if inner else name.removeprefix('model.')}": t for name, t in tensors.items()}
        return own | {"vision_tower.layers.0.weight": torch.zeros(3), "rotary_emb.inv_freq": torch.zeros(8)}

    plain = load_model(str(few("qwen3-dense").directory))
    found = load_model(str(_edited(few("qwen3-dense").directory, tmp_path, renamed)))
    assert found.arch.parameters == plain.arch.parameters
    assert "model.layers.0.mlp.up_proj.weight" in found.checkpoint.tensors


def test_a_correction_stays_float32_beside_16_bit_weights(few, tmp_path):
    def halved(tensors):
        return {n: t if n.endswith("correction_bias") else t.bfloat16() for n, t in tensors.items()}

    model = load_model(str(_edited(few("ernie").directory, tmp_path, halved)))
    assert model.stored_dtype == torch.bfloat16
    source = model.source(tmp_path)
    unit = next(unit for unit in units_of(model.arch) if unit.kind == "attention" and unit.layer == 1)
    layout = source.layout(unit.id)
    assert layout.device["correction"].dtype == layout.device["wide router"].dtype == torch.float32
    assert layout.device["q"].dtype == torch.bfloat16
    assert layout.stored_bytes == unit.stored_bytes
