"""Jobs on paper of a small model on one machine."""

from dataclasses import replace

from cost_model.hardware.hardware import Hardware
from cost_model.model.arch import ModelArch
from policies import Policy, Workload

MIXTRAL = ModelArch.from_name("mixtral-8x7b")
SMALL = replace(
    MIXTRAL,
    num_layers=2,
    num_experts=4,
    hidden=1024,
    ffn=3584,
    num_heads=16,
    num_kv_heads=4,
    head_dim=64,
    vocab_size=16000,
)
MACHINE = Hardware.preset("rtx4090")


def policy_of(percent, *, rows=8, batches=4, prompt_len=64, gen_len=32, **rest):
    return Policy.from_percent(
        percent, gpu_batch_size=rows, num_gpu_batches=batches, prompt_len=prompt_len, gen_len=gen_len, **rest
    )


def job(rows, prompt_len=64, gen_len=32, **rest):
    return Workload(prompt_len=prompt_len, gen_len=gen_len, num_requests=rows, **rest)
