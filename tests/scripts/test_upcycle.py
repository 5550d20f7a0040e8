"""An upcycled mixture computes what the dense model of its GGUF file does."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexmoe.errors import DataError, FlexMoEError, InputMissingError, UsageError
from flexmoe.llm import LLM
from flexmoe.params import SamplingParams
from scripts.upcycle import main, upcycle
from tests.support.gguf_files import TOKENS, gguf, quants, tiny_llama, write_gguf
from tests.support.tiny import transformers_greedy

pytestmark = pytest.mark.usefixtures("one_thread")
TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
IDS = torch.randint(3, len(TOKENS), (2, 40), generator=torch.Generator().manual_seed(5))


def load(directory):
    model, report = AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, dtype=torch.float32, experts_implementation="eager"
    )
    assert not any(report.values()), report
    return model.eval()


@torch.no_grad()
def logits(model, **more):
    return model(IDS, **more)


@pytest.fixture
def file(tmp_path):
    return write_gguf(tmp_path / "model.gguf", tiny_llama())


@TIED
def test_dense_model_comes_back_as_it_was(tmp_path, tied):
    model = tiny_llama(tied=tied)
    file = write_gguf(tmp_path / "model.gguf", model)
    made = load(upcycle(file, tmp_path / "dense", experts=0, dtype=torch.float32))
    state = made.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(logits(made).logits, logits(model).logits)


def test_quantized_weights_are_what_the_file_says(tmp_path):
    model, kind = tiny_llama(), gguf.GGMLQuantizationType.Q4_1
    made = load(
        upcycle(write_gguf(tmp_path / "m.gguf", model, "Q4_1"), tmp_path / "dense", experts=0, dtype=torch.float32)
    )
    original = model.model.layers[1].mlp.down_proj.weight.detach()
    known = torch.tensor(quants.dequantize(quants.quantize(original.numpy(), kind), kind))
    assert not torch.equal(known, original)
    assert torch.equal(made.model.layers[1].mlp.down_proj.weight, known)
    assert torch.equal(made.model.layers[1].input_layernorm.weight, model.model.layers[1].input_layernorm.weight)


@TIED
@pytest.mark.parametrize("experts, top_k", [(4, 2), (3, 1), (2, 2)])
def test_mixture_computes_what_the_dense_model_does(tmp_path, tied, experts, top_k):
    model = tiny_llama(tied=tied)
    file = write_gguf(tmp_path / "model.gguf", model)
    made = load(upcycle(file, tmp_path / "mixed", experts=experts, top_k=top_k, dtype=torch.float32))
    out = logits(made, output_router_logits=True)
    assert (out.logits - logits(model).logits).abs().max() < 1e-4
    for layer in out.router_logits:
        assert len(layer.topk(top_k).indices.unique()) == experts  # the router uses them all


def test_runtime_completes_as_transformers_does(tmp_path, file):
    made = upcycle(file, tmp_path / "mixed", experts=4, dtype=torch.float32)
    model, prompt = load(made), IDS[0].tolist()
    with LLM(made, device="cpu", policy=None, offload_dir=tmp_path / "offload") as llm:
        (out,) = llm.generate([prompt], SamplingParams(max_tokens=8, ignore_eos=True))
    assert list(out.outputs[0].token_ids) == transformers_greedy(model, prompt, eos_token_id=None, max_new_tokens=8)


def test_seed_decides_the_routers_alone(tmp_path, file):
    one, other, again = (
        load(upcycle(file, tmp_path / name, experts=2, seed=seed)).state_dict()
        for name, seed in (("a", 0), ("b", 1), ("c", 0))
    )
    differ = {name for name, value in one.items() if not torch.equal(value, other[name])}
    assert differ == {f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 1)}
    assert all(torch.equal(value, again[name]) for name, value in one.items())


@pytest.mark.parametrize(
    "text", ["the low wind", "naïve café — 漢字 🦙\n\ttabs", "in 1234, 12 o'clock", "<|im_start|>user\nhi<|im_end|>"]
)
def test_text_survives_the_tokenizer(tmp_path, file, text):
    tokenizer = AutoTokenizer.from_pretrained(upcycle(file, tmp_path / "mixed", experts=2))
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert not any(len(token) > 1 and any(c.isdigit() for c in token) for token in tokens)
    assert [t for t in tokens if t.startswith("<|")] == [t for t in ("<|im_start|>", "<|im_end|>") if t in text]
    assert [t for t in tokens if "the" in t] == (["the"] if text.startswith("the") else [])


def test_template_and_ends_are_those_of_the_file(tmp_path, file):
    made = upcycle(file, tmp_path / "mixed", experts=2)
    tokenizer = AutoTokenizer.from_pretrained(made)
    chat = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    for name in ("config.json", "generation_config.json"):
        values = json.loads((made / name).read_text())
        assert (values["bos_token_id"], values["eos_token_id"], values["pad_token_id"]) == (1, 2, 2)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"arch": "qwen2"}, "general.architecture is 'qwen2'"),
        ({"llama__rope__scaling__type": "yarn"}, "llama.rope.scaling.type is 'yarn'"),
        ({"llama__rope__dimension_count": 8}, "llama.rope.dimension_count is 8, and only 16"),
        ({"tokenizer__ggml__pre": "llama-bpe"}, "tokenizer.ggml.pre is 'llama-bpe'"),
        ({"tokenizer__ggml__add_bos_token": True}, "add_bos_token is True"),
        ({"llama__block_count": None}, "has no llama.block_count"),
        ({"tensors": {"blk.0.attn_q.bias": torch.zeros(64)}}, "blk.0.attn_q.bias belongs to no dense Llama"),
        ({"tensors": {"rope_freqs.weight": torch.ones(8)}}, "rope_freqs.weight belongs to no dense Llama"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, changes, said):
    file = write_gguf(tmp_path / "model.gguf", tiny_llama(), **changes)
    with pytest.raises(DataError, match=said) as caught:
        upcycle(file, tmp_path / "mixed")
    assert str(file) in str(caught.value) and not (tmp_path / "mixed").exists()


@pytest.mark.parametrize("content", [b"", b"PK\3\4 no GGUF at all" * 9])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(DataError, match="no whole GGUF file"):
        upcycle(tmp_path / "other", tmp_path / "mixed")
    with pytest.raises(InputMissingError, match="No such file"):
        upcycle(tmp_path / "absent", tmp_path / "mixed")


@pytest.mark.parametrize("kept", [0.02, 0.3, 0.7, 0.999])
def test_file_that_is_cut_short_is_refused(tmp_path, file, kept):
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(DataError, match="no whole GGUF file"):
        upcycle(file, tmp_path / "mixed")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"llama__block_count": 3}, r"model.layers.2.input_layernorm.weight is none, and the metadata ask for \(64,\)"),
        ({"llama__block_count": 1}, r"model.layers.1.input_layernorm.weight is \(64,\), and the metadata ask for none"),
        ({"llama__feed_forward_length": 128}, r"mlp.down_proj.weight is \(64, 96\), and .* \(64, 128\)"),
        ({"tokenizer__ggml__tokens": TOKENS[:-1]}, "lm_head.weight is"),
    ],
)
def test_weights_that_the_metadata_do_not_ask_for_are_named(tmp_path, changes, said):
    file = write_gguf(tmp_path / "model.gguf", tiny_llama(), **changes)
    with pytest.raises(DataError, match=said):
        upcycle(file, tmp_path / "mixed")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_more_experts_a_token_than_there_are_is_refused(tmp_path, file):
    with pytest.raises(UsageError, match="num_experts_per_tok|top"):
        upcycle(file, tmp_path / "mixed", experts=2, top_k=3)


def test_without_the_reader_the_sentence_says_what_to_install(tmp_path, file, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(FlexMoEError, match="pip install gguf"):
        upcycle(file, tmp_path / "mixed")


def test_command_line_writes_a_checkpoint_or_says_why_not(tmp_path, file, capsys):
    out = tmp_path / "mixed"
    args = [str(file), str(out), "--experts", "2", "--top-k", "1", "--dtype", "float16"]
    assert main(args) == 0
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
    assert "MB of float16 weights" in capsys.readouterr().out
    assert main(args) == UsageError.exit_code
    assert capsys.readouterr().err == f"upcycle: {str(out)!r} already exists: remove it or choose another directory\n"
