"""Fed the inputs of published limits and examples, `evaluate` gives their numbers."""

import pytest

from cost_model.hardware.gemm_rates import GemmRates
from cost_model.hardware.hardware import Gpu, Hardware
from cost_model.model.arch import ModelArch
from cost_model.model.weight_units import units_of
from cost_model.timing.evaluate import evaluate
from policies.common.errors import InfeasibleError
from policies.common.memory_units import GIB
from policies.policy import Policy
from policies.workload import Workload

ARCH = ModelArch.from_name("mixtral-8x7b")
JOB = Workload(prompt_len=512, gen_len=256)
#: Rates that never decide.
BYTES_PER_S, FLOPS_PER_S = 1e15, 1e18
EXPERTS_GB = 90.2
#: Machine: GPU GB, PCIe GB/s, host GB, TFLOP/s, host memory GB/s; limits in tokens/s: decode alone, whole job in
#: lockstep, whole job with prefill and decode overlapped.
LIMITS = {
    "T4": ((16, 12, 192, 21, 80), (148, 109, 178)),
    "A5000": ((24, 25, 512, 75, 140), (1376, 712, 981)),
    "4090": ((24, 25, 128, 130, 65), (164, 154, 196)),
    "large GPU capped to 16 GB": ((16, 50, 128, 500, 150), (246, 241, 295)),
    "large GPU capped to 24 GB": ((24, 50, 128, 500, 150), (327, 318, 393)),
}


def machine(gpu_gb, pcie_gb_per_s, host_gb, tflops, dram_gb_per_s):
    """A machine with zero overhead whose only limits are the five that are given."""
    rates = GemmRates(tokens=(1.0,), weight_elements=(1e8,), flops_per_s=((tflops * 1e12,),))
    gpu = Gpu(
        name="limit",
        memory_bytes=int(gpu_gb * 1e9),
        reserved_bytes=0,
        op_s=0.0,
        experts={2: rates, 4: rates},
        dense={2: rates, 4: rates},
        h2d_bytes_per_s=pcie_gb_per_s * 1e9,
        d2h_bytes_per_s=pcie_gb_per_s * 1e9,
        h2d_duplex_bytes_per_s=pcie_gb_per_s * 1e9,
        d2h_duplex_bytes_per_s=pcie_gb_per_s * 1e9,
        memory_bytes_per_s=BYTES_PER_S,
        kv_load_bytes_per_s=BYTES_PER_S,
        kv_store_bytes_per_s=BYTES_PER_S,
        attention_bytes_per_s=BYTES_PER_S,
        attention_flops_per_s=FLOPS_PER_S,
    )
    return Hardware(
        name="limit",
        device="cuda",
        gpus=(gpu,),
        cores=16,
        host_memory_bytes=int(host_gb * 1e9),
        host_bytes_per_s=dram_gb_per_s * 1e9,
        disk_bytes=0,
        disk_read_bytes_per_s=BYTES_PER_S,
        disk_write_bytes_per_s=BYTES_PER_S,
        h2d_core_s_per_byte=0.0,
        disk_read_core_s_per_byte=0.0,
        disk_write_core_s_per_byte=0.0,
        kv_block_read_s=0.0,
        kv_block_core_s=0.0,
        kv_block_write_s=0.0,
        disk_latency_s=0.0,
        disk_busy_latency_s=0.0,
        handoff_s=0.0,
        cpu_attention_bytes_per_s=BYTES_PER_S,
        cpu_attention_flops_per_s=FLOPS_PER_S,
        row_s=0.0,
        sweep_s=0.0,
    )


def limit(name, schedule):
    """The prediction with residents, rows and streamed bytes chosen as the table of limits does."""
    given = LIMITS[name][0]
    resident_gb = min(given[0] - 3.2 - 1.4 - 2.5, EXPERTS_GB)
    kv_bytes = 0.95 * given[2] * 1e9 - (EXPERTS_GB - resident_gb) * 1e9
    context = JOB.prompt_len + JOB.gen_len / (1 if schedule == "static" else 2)
    rows = kv_bytes / (ARCH.kv_bytes_per_token() * context)
    dense_bytes = sum(unit.stored_bytes for unit in units_of(ARCH) if unit.kind != "expert")
    on_gpu = 100 * (dense_bytes + resident_gb * 1e9) / sum(unit.stored_bytes for unit in units_of(ARCH))
    policy = Policy.from_percent(
        (on_gpu, 100 - on_gpu, 0, 100, 100, 0),
        gpu_batch_size=int(rows) // 4,
        num_gpu_batches=4,
        prompt_len=JOB.prompt_len,
        gen_len=JOB.gen_len,
        schedule=schedule,
        cpu_attention_percent=100,
        weight_slots=64,
    )
    return evaluate(ARCH, machine(*given), JOB, policy, ignore_memory=True)


@pytest.mark.parametrize("name", LIMITS)
def test_the_decode_limit_is_reproduced(name):
    assert limit(name, "static").decode_tokens_per_s == pytest.approx(LIMITS[name][1][0], rel=0.1)


@pytest.mark.parametrize("name", LIMITS)
def test_the_limit_in_lockstep_is_reproduced(name):
    assert limit(name, "static").tokens_per_s == pytest.approx(LIMITS[name][1][1], rel=0.1)


@pytest.mark.parametrize("name", LIMITS)
def test_the_limit_with_prefill_and_decode_overlapped_is_reproduced(name):
    assert limit(name, "rolling").tokens_per_s == pytest.approx(LIMITS[name][1][2], rel=0.1)


def t4(preset):
    return Hardware.preset(preset).with_budgets(gpu_mem=16, cpu_mem=200, nvme_mem=1500)


@pytest.mark.parametrize(
    ("percent", "cpu_attention_percent"),
    (((5, 0, 0, 100, 0, 100), 0), ((5, 95, 0, 100, 0, 100), 100)),
    ids=("disk", "cpu"),
)
def test_flexllmgens_fitted_t4_reads_disk_and_attends_on_the_cpu_more_slowly(percent, cpu_attention_percent):
    policy = Policy.from_percent(
        percent,
        gpu_batch_size=64,
        num_gpu_batches=9,
        prompt_len=512,
        gen_len=32,
        cpu_attention_percent=cpu_attention_percent,
    )
    job = Workload(prompt_len=512, gen_len=32)
    fitted, real = (evaluate(ARCH, t4(name), job, policy) for name in ("t4-flexllmgen", "t4"))
    assert fitted.tokens_per_s < real.tokens_per_s / 3


def test_flexllmgens_fitted_t4_copies_weights_up_as_fast_as_the_link_allows():
    policy = Policy.from_percent(
        (5, 95, 0, 100, 0, 100), gpu_batch_size=4, num_gpu_batches=2, prompt_len=16, gen_len=256
    )
    job = Workload(prompt_len=16, gen_len=256)
    fitted, real = (evaluate(ARCH, t4(name), job, policy) for name in ("t4-flexllmgen", "t4"))
    assert fitted.tokens_per_s == pytest.approx(real.tokens_per_s * 12.89 * 1.073741824 / 12, rel=0.03)


def published_example():
    """What a fork of FlexLLMGen emits for Mixtral 8x7B on 16 / 200 / 1500 GiB, and says that 12.8 GB of GPU hold."""
    return Policy.from_percent(
        (54, 46, 0, 99, 0, 100), gpu_batch_size=64, num_gpu_batches=9, prompt_len=512, gen_len=32
    )


def test_the_published_example_does_not_fit_its_gpu():
    with pytest.raises(InfeasibleError, match=r"the gpu memory needs \d+\.\d+ GiB .* are missing.*gpu weights with 4"):
        evaluate(ARCH, t4("t4"), Workload(prompt_len=512, gen_len=32), published_example())


def test_the_published_example_is_predicted_when_memory_is_ignored():
    found = evaluate(ARCH, t4("t4"), Workload(prompt_len=512, gen_len=32), published_example(), ignore_memory=True)
    assert found.memory.parts["gpu"]["weights"] == pytest.approx(0.54 * ARCH.total_bytes, rel=0.01)
    assert found.memory.total("gpu") > 47 * GIB
    assert 30 < found.tokens_per_s < 45
