"""The memory plan against what the pretended device allocates: never more than planned.

The CUDA policies that ship, with their shares, on a tiny model: rows a sixty-fourth of theirs, lengths an eighth.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from torch.utils._python_dispatch import _disable_current_modes

import policies
from flexmoe.engine.config import EngineConfig
from flexmoe.engine.engine import Engine
from flexmoe.kernels import paged_attention
from flexmoe.models.loader import load_model
from flexmoe.params import EngineRequest, SamplingParams
from flexmoe.weights.sources import DummySource
from policies.policy import PolicyFile
from tests.support import flash
from tests.support.allocations import Allocations
from tests.support.tiny import BASE

pytestmark = pytest.mark.usefixtures("small_halves", "one_thread", "pretend")
PRESETS = sorted((Path(policies.__file__).parent / "presets").glob("[!c]*/*.json"))
SHAPE = {"model_type": "mixtral", "dtype": "float32", "num_local_experts": 8, "num_hidden_layers": 4}
SWEEPS = 6
#: Every other file with one of the kernels in `make test`, all with both in `make test-all`; of the two files of the largest
#: model, whose jobs have a hundred rows, one.
KERNELS = ("masked", "varlen")
CASES = [
    pytest.param(file, kernel, id=f"{file.parent.name}/{file.stem}-{kernel}", marks=() if quick else pytest.mark.slow)
    for number, file in enumerate(PRESETS)
    for kernel, quick in zip(KERNELS, (number % 4 == 0, number % 4 == 2 and number != 14))
]


def scaled(file):
    """(policy, workload) of a file, for a tiny model."""
    policy, workload = PolicyFile.load(file).policy, json.loads(file.read_text())["workload"]
    prompt, gen = workload["prompt_len"] // 8, workload["gen_len"] // 8
    small = replace(
        policy,
        gpu_batch_size=max(2, policy.gpu_batch_size // 64),
        prefill_tokens=max(prompt // 2, policy.prefill_tokens // 64),
        experts_per_unit=None,
        expert_order=None,
    )
    return small, policies.Workload(prompt_len=prompt, gen_len=gen)


@pytest.fixture(autouse=True)
def random_weights_are_not_counted(monkeypatch):
    """They stand for a checkpoint on the disk."""
    init = DummySource.__init__

    def uncounted(self, *arguments, **options):
        with _disable_current_modes():
            init(self, *arguments, **options)

    monkeypatch.setattr(DummySource, "__init__", uncounted)


@pytest.mark.parametrize("file, kernel", CASES)
def test_a_sweep_allocates_no_more_than_planned(file, kernel, tmp_path, monkeypatch):
    assert_within_plan(*scaled(file), kernel, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", ["a5000-512gb", pytest.param("l4-192gb", marks=pytest.mark.slow)])
@pytest.mark.parametrize("batches", [4, pytest.param(7, marks=pytest.mark.slow)])
def test_two_half_blocks_allocate_no_more_than_planned(name, batches, tmp_path, monkeypatch):
    policy, workload = scaled(next(file for file in PRESETS if file.parent.name == name))
    size = -(-policy.block_size // batches)
    policy = replace(policy, gpu_batch_size=size, num_gpu_batches=batches, half_blocks=2)
    assert_within_plan(policy, workload, "masked", tmp_path, monkeypatch)


def assert_within_plan(policy, workload, kernel, tmp_path, monkeypatch):
    flash.pretended(monkeypatch)
    monkeypatch.setattr(paged_attention, "choose_kernel", lambda *about: paged_attention.Kernel(kernel, "a test"))
    (tmp_path / "config.json").write_text(json.dumps(BASE | SHAPE))
    config = EngineConfig(
        policy=policy,
        workload=workload,
        gen_len=workload.gen_len,
        longest_row=workload.prompt_len + workload.gen_len,
        device="cuda",
        offload_dir=tmp_path / "offload",
    )
    with Allocations() as counted:
        engine = Engine(load_model(str(tmp_path), "dummy"), config)
        try:
            params = SamplingParams(max_tokens=workload.gen_len, ignore_eos=True)
            for number in range(policy.block_size):
                ids = tuple(3 + (number * 7 + i) % 250 for i in range(workload.prompt_len))
                engine.submit(EngineRequest(request_id=str(number), prompt_token_ids=ids, params=params))
            built, planned = counted.live, engine.plan.memory
            for _ in range(SWEEPS):
                engine.step()
        finally:
            engine.clear()
            engine.close()
    passing = planned.parts["gpu"]["workspace"] + planned.parts["gpu"].get("masks", 0)
    assert built < counted.peak <= planned.total("gpu") and counted.peak - built <= passing
