"""`LLM` as a user of vLLM's offline class knows it."""

import pytest
import torch

from cost_model.hardware.hardware import Hardware
from flexmoe import LLM, FlexMoEError, Policy, SamplingParams, Workload
from flexmoe.errors import DataError, InfeasibleError, UsageError
from policies.policy import PolicyFile
from scripts.checkpoints.shapes import SIZES
from scripts.checkpoints.tokenizer import train_tokenizer
from scripts.make_checkpoint import make_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = SamplingParams(max_tokens=4, ignore_eos=True)
CHAT = [{"role": "user", "content": "Name three rivers."}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", SIZES["tiny"], dtype=torch.float32)


@pytest.fixture(scope="module")
def llm(checkpoint, tmp_path_factory):
    offload = tmp_path_factory.mktemp("offload")
    with LLM(checkpoint, policy=None, device="cpu", offload_dir=offload, longest_row=200) as made:
        yield made


def texts(outputs):
    return [completion.text for output in outputs for completion in output.outputs]


def test_one_prompt_and_several_of_both_kinds(llm):
    ids = llm.get_tokenizer()("The river")["input_ids"]
    [alone] = llm.generate("The river", SHORT)
    text, tokens = llm.generate(["The river", ids], [SHORT, SHORT])
    assert alone.prompt == text.prompt == "The river" and tokens.prompt is None
    assert alone.prompt_token_ids == text.prompt_token_ids == tokens.prompt_token_ids == tuple(ids)
    assert texts([alone]) == texts([text]) == texts([tokens])
    [bare] = llm.generate(ids, SHORT)
    assert texts([bare]) == texts([alone])


def test_a_chat_is_the_prompt_that_its_template_writes(llm):
    [output] = llm.chat(CHAT, SHORT)
    written = llm.get_tokenizer().apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert output.prompt == written
    assert list(output.prompt_token_ids) == llm.get_tokenizer()(written, add_special_tokens=False)["input_ids"]


def test_several_chats_and_parameters_of_each(llm):
    other = [{"role": "user", "content": [{"type": "text", "text": "And"}, {"type": "text", "text": "lakes?"}]}]
    outputs = llm.chat([CHAT, other], [SHORT, SamplingParams(max_tokens=2, ignore_eos=True)])
    assert [len(output.outputs[0].token_ids) for output in outputs] == [4, 2]
    assert "And\nlakes?" in outputs[1].prompt
    assert texts(outputs[:1]) == texts(llm.chat(CHAT, SHORT))


def test_another_template_its_variables_and_no_generation_prompt(llm):
    template = (
        "{{ tone }}{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    [output] = llm.chat(CHAT, SHORT, chat_template=template, chat_template_kwargs={"tone": "kind "})
    assert output.prompt == "kind [Name three rivers.]>"
    [output] = llm.chat(CHAT, SHORT, chat_template=template, add_generation_prompt=False)
    assert output.prompt == "[Name three rivers.]"


@pytest.mark.parametrize(
    "messages, said",
    [
        (["no message"], "conversation 0"),
        ([{"role": "user"}], "conversation 0: messages[0].content is null"),
        ([[{"role": "pilot", "content": "x"}]], "conversation 0: messages[0].role"),
        ([CHAT, []], "conversation 1: messages is []"),
    ],
)
def test_what_is_no_chat_is_refused_by_its_place(llm, messages, said):
    with pytest.raises(UsageError) as caught:
        llm.chat(messages, SHORT)
    assert said in str(caught.value)


def test_prompts_that_can_never_run_are_refused_before_any_is_run(llm):
    before = llm.tokens
    with pytest.raises(UsageError, match="prompt 1: .*vocabulary"):
        llm.generate([[1, 2], [10**6]], SHORT)
    with pytest.raises(UsageError, match="2 prompts but 1 sampling parameters"):
        llm.generate(["a", "b"], [SHORT])
    with pytest.raises(UsageError, match="prompt 0 is 3.5"):
        llm.generate([3.5], SHORT)
    assert llm.tokens == before


def test_a_bar_is_drawn_on_a_terminal_only(llm, monkeypatch, capsys):
    llm.generate("The river", SHORT)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    llm.generate("The river", SHORT, use_tqdm=False)
    assert capsys.readouterr().err == ""
    llm.generate("The river", SHORT)
    drawn = capsys.readouterr()
    assert "Processed prompts" in drawn.err and "1/1" in drawn.err and drawn.out == ""


def test_the_planner_chooses_for_the_given_machine_and_lengths(planned_soon, checkpoint, tmp_path):
    options = {"hardware": Hardware.preset("cpu"), "device": "cpu", "offload_dir": tmp_path}
    budgets = {"gpu_mem": 0.004, "cpu_mem": 0.004, "nvme_mem": 0.1}
    with LLM(checkpoint, workload=Workload(prompt_len=16, gen_len=8), **options, **budgets) as planned:
        policy, memory = planned.engine.config.policy, planned.metrics()["memory"]
        got = texts(planned.generate(["The river", "A lake"], SHORT))
    assert policy.w_gpu_percent < 100
    for tier, gib in (("gpu", 0.004), ("cpu", 0.004), ("disk", 0.1)):
        assert memory[tier]["planned_bytes"] - memory[tier].get("process", 0) <= gib * 2**30
    assert memory["cpu"]["process"] > 100 << 20
    with LLM(checkpoint, policy=None, device="cpu", offload_dir=tmp_path) as resident:
        assert texts(resident.generate(["The river", "A lake"], SHORT)) == got
    with pytest.raises(InfeasibleError, match="gpu"):
        LLM(checkpoint, gpu_mem=0.0001, **options)


def test_a_policy_and_the_file_of_one(checkpoint, tmp_path):
    policy = Policy.from_percent((0, 50, 100, 0, 100, 0), gpu_batch_size=2, num_gpu_batches=1, prompt_len=16, gen_len=8)
    options = {"device": "cpu", "offload_dir": tmp_path, "workload": Workload(prompt_len=16, gen_len=8)}
    with LLM(checkpoint, policy=policy, **options) as llm:
        path = tmp_path / "policy.json"
        PolicyFile(policy=policy, model=llm.model.arch.fingerprint()).save(path)
        got = texts(llm.generate("The river", SHORT))
    with LLM(str(checkpoint), policy=str(path), **options) as llm:
        assert llm.engine.config.policy == policy and texts(llm.generate("The river", SHORT)) == got


@pytest.mark.parametrize(
    "options, said",
    [
        ({"gpu_memory": 3}, "gpu_memory"),
        ({"policy": 3}, "policy"),
        ({"policy": None, "hardware": "cpu"}, "hardware"),
        ({"policy": None, "dtype": "int3"}, "int3"),
        ({"policy": None, "gpu_mem": -1}, "gpu_mem"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(checkpoint, options, said):
    with pytest.raises(FlexMoEError) as caught:
        LLM(checkpoint, device="cpu", **options)
    assert said in str(caught.value).replace("-", "_")


def test_without_a_tokenizer_prompts_are_token_ids(tiny, tmp_path):
    with LLM(tiny().directory, policy=None, device="cpu", offload_dir=tmp_path, longest_row=40) as llm:
        [output] = llm.generate([1, 2, 3], SHORT)
        assert len(output.outputs[0].token_ids) == 4 and output.outputs[0].text is None
        for ask in (lambda: llm.generate("text", SHORT), lambda: llm.chat(CHAT, SHORT), llm.get_tokenizer):
            with pytest.raises(DataError, match="has no tokenizer files"):
                ask()


def test_get_tokenizer_is_transformers_own(llm):
    assert type(llm.get_tokenizer()).__name__ == type(train_tokenizer(512, 64)).__name__
