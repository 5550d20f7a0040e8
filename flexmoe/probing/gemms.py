"""FLOP/s of experts, alone and in units, and of attention modules over so many tokens, computed as the executor computes them.

Legend: T tokens of the block, n tokens of an expert, D hidden, F expert width, E experts, K chosen experts.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from cost_model.hardware.gemm_rates import GemmRates
from cost_model.memory.allocation import PAGE_TOKENS
from cost_model.model.arch import ModelArch
from cost_model.model.packed_format import PackedFormat
from cost_model.model.weight_units import GROUPED_TOKENS, UNIT_BYTES
from flexmoe.formats.packed_matrix import CODECS, PackedMatrix
from flexmoe.kernels.expert_dispatch import ExpertDispatch
from flexmoe.kernels.expert_weights import ExpertWeights
from flexmoe.kernels.grouped_product import has_grouped_product
from flexmoe.kernels.linear import unpacked_pieces
from flexmoe.kv.batch import Batch, Block, Run
from flexmoe.kv.cache import KVCache, KVShape
from flexmoe.kv.transfers import KVBuffers, KVLanes
from flexmoe.models.registry import family
from flexmoe.probing.effort import Effort, Heads
from flexmoe.probing.timing import WeightArena, noise, repeat_s
from flexmoe.system.device import Device
from flexmoe.system.trace import Recorder
from flexmoe.system.uploads import Uploads
from policies.admission.row_state import AttentionMode
from policies.units import UnitId, expert_unit

log = logging.getLogger(__name__)

_EXPERTS, _TOP_K = 8, 2
#: Experts of a unit that is measured.
UNIT_EXPERTS = 8
_DECODE_TOKENS = 64
#: Formats whose unpacking is measured, as most checkpoints have them, and the most weights of the expert that is unpacked.
PACKED_FORMATS = (
    PackedFormat(method="fp8", codec="fp8", bits=8, rows=128, columns=128, scale_bytes=4),
    PackedFormat(method="compressed-tensors", codec="integer", bits=4, columns=128),
    PackedFormat(method="compressed-tensors", codec="integer", bits=8, columns=128),
    PackedFormat(method="compressed-tensors", codec="mxfp4", bits=4, columns=32, scale_bytes=1),
)
_UNPACKED_WEIGHTS = 16 << 20
#: Token counts per point, the most that take no longer than so many times the seconds meant for a point.
_COUNTS, _MOST_POINTS = (8, 4, 2, 1), 10
_NORMAL = statistics.NormalDist()
#: `seconds(count, seconds, warm, least)` of one call over ``count`` tokens.
Seconds = Callable[[int, float, int, int], float]


def bench_arch(
    heads: Heads, ffn: int, *, layers: int = 1, experts: int = _EXPERTS, vocab: int = 256, group: int | None = None
) -> ModelArch:
    """A shape of the first family with one given attention module and expert width."""
    return ModelArch(
        name="probe",
        model_type="mixtral",
        num_layers=layers,
        hidden=heads.hidden,
        ffn=ffn,
        num_experts=experts,
        top_k=_TOP_K,
        num_heads=heads.heads,
        num_kv_heads=heads.kv_heads,
        head_dim=heads.head_dim,
        vocab_size=vocab,
        max_position=4096,
        sliding_window=None,
        tied=False,
        dtype_bytes=2,
        norm_eps=1e-5,
        rope_theta=1e6,
        group=group,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One weight size: how it is timed, the weights of a call, the bytes that the largest token count takes beside them, and
    how many experts a call computes."""

    arch: ModelArch
    bench: Callable[..., contextlib.AbstractContextManager[Seconds]]
    elements: int
    work_bytes: int
    experts: int = 1


def expert_rates(device: Device, arena: WeightArena, dtype: torch.dtype, effort: Effort) -> GemmRates:
    """Curves of experts: gather, three GEMMs, activation, weighting and scatter, by `ExpertDispatch` and the family.

    All tokens are computed at once: the curve says how many of them are worth it (`GemmRates.fastest`).
    """
    most, cases = _most(device, effort), []
    for hidden, ffn in effort.experts:
        arch = bench_arch(Heads(hidden=hidden, heads=1, kv_heads=1, head_dim=2), ffn)
        numbers = 2 * most * _EXPERTS // _TOP_K * hidden + most * (2 * hidden + 2 * ffn)
        work_bytes = numbers * dtype.itemsize
        cases.append(Case(arch=arch, bench=expert_bench, elements=arch.expert_params, work_bytes=work_bytes))
    return _rates("experts", cases, device, arena, dtype, effort)


def grouped_expert_rates(device: Device, arena: WeightArena, dtype: torch.dtype, effort: Effort) -> GemmRates | None:
    """Curves of an expert of a unit that is computed by grouped products, up to the tokens at which the runtime does that.

    None where it never does, or nothing of what is measured is so small.
    """
    tokens = tuple(n for n in effort.tokens[device.torch.type] if n <= GROUPED_TOKENS)
    cases = []
    for hidden, ffn in effort.experts:
        arch = bench_arch(
            Heads(hidden=hidden, heads=1, kv_heads=1, head_dim=2), ffn, experts=UNIT_EXPERTS, group=UNIT_EXPERTS
        )
        if arch.expert_params * dtype.itemsize < UNIT_BYTES:
            work_bytes = 2 * GROUPED_TOKENS * UNIT_EXPERTS * (4 * hidden + 3 * ffn) * dtype.itemsize
            elements = UNIT_EXPERTS * arch.expert_params
            cases.append(
                Case(arch=arch, bench=unit_bench, elements=elements, work_bytes=work_bytes, experts=UNIT_EXPERTS)
            )
    if not tokens or not cases or not has_grouped_product(device.torch, dtype):
        return None
    return _rates("units of experts", cases, device, arena, dtype, effort, tokens)


def dense_rates(device: Device, arena: WeightArena, dtype: torch.dtype, effort: Effort) -> GemmRates:
    """Curves of attention modules without attention: norms, projections, rope, new KV, output, router, routing."""
    most, cases = _most(device, effort), []
    for heads in effort.modules:
        arch = bench_arch(heads, 2)
        # Hidden states and their norms, some of them in float32; queries, keys, values and their rotated copies.
        work_bytes = most * (6 * heads.hidden + 8 * heads.heads * heads.head_dim) * 4
        elements = arch.projection_params + arch.router_params
        cases.append(Case(arch=arch, bench=dense_bench, elements=elements, work_bytes=work_bytes))
    return _rates("attention modules", cases, device, arena, dtype, effort)


@torch.inference_mode()
def unpacking_s(device: Device, dtype: torch.dtype, effort: Effort) -> dict[str, float]:
    """Seconds of unpacking a weight, by the name of its format, in the pieces that a product takes."""
    hidden, ffn = [shape for shape in effort.experts if 3 * shape[0] * shape[1] <= _UNPACKED_WEIGHTS][-1]
    found = {}
    for packed in PACKED_FORMATS:
        fields = {
            field.name: _field(device, field.shape, field.dtypes[0])
            for field in CODECS[packed.codec].fields(packed, ffn, hidden)
        }
        matrix = PackedMatrix(packed, fields, (ffn, hidden))
        each_s = repeat_s(device, partial(_unpack, matrix, dtype), effort.point_s)
        found[packed.name] = each_s / (ffn * hidden)
    return found


def _unpack(matrix: PackedMatrix, dtype: torch.dtype) -> None:
    for _ in unpacked_pieces(matrix, dtype):
        pass


def _field(device: Device, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_floating_point and dtype.itemsize > 1:
        return torch.full(shape, 0.01, dtype=dtype, device=device.torch)
    count = math.prod(shape) * dtype.itemsize
    numbers = torch.randint(0, 120, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return numbers.view(dtype).view(shape).to(device.torch)


def _room(device: Device, arena: WeightArena) -> int:
    """Memory for what is computed: as much again as for weights, on CUDA half of what is free beside them."""
    return torch.cuda.mem_get_info(device.torch)[0] // 2 if device.is_cuda else arena.nbytes


def _most(device: Device, effort: Effort) -> int:
    return max(around(effort.tokens[device.torch.type][-1], _COUNTS[0]))


def _rates(
    name: str,
    cases: list[Case],
    device: Device,
    arena: WeightArena,
    dtype: torch.dtype,
    effort: Effort,
    tokens: tuple[int, ...] = (),
) -> GemmRates:
    """Curves of those sizes, from the smallest on, that fit the memory and the time; default tokens: the effort's."""
    tokens = tokens or effort.tokens[device.torch.type]
    sizes: list[int] = []
    curves: list[tuple[float, ...]] = []
    for case in cases:
        expected_s = sum(2 * n * case.elements / rate for n, rate in zip(tokens, curves[-1])) if curves else 0.0
        fits = case.elements * dtype.itemsize <= 0.99 * arena.nbytes and case.work_bytes <= _room(device, arena)
        if curves and (expected_s > effort.curve_s or not fits):
            why = f"a curve takes {expected_s:.0f} s" if fits else "too little memory"
            log.info("         no %s of %.0f M weights in %s: %s", name, case.elements / 1e6, dtype, why)
            break
        with case.bench(device, case.arch, dtype, arena, _most(device, effort), effort) as seconds:
            curves.append(_curve(case.elements, tokens, effort.point_s, seconds, case.experts))
        sizes.append(case.elements // case.experts)
    return GemmRates(tokens=tokens, weight_elements=tuple(sizes), flops_per_s=tuple(curves))


def _curve(
    elements: int, tokens: tuple[int, ...], point_s: float, seconds: Seconds, experts: int = 1
) -> tuple[float, ...]:
    """FLOP/s at each token count: the mean over counts around it, fewer of them where a call is costly."""
    rates: list[float] = []
    for n in tokens:
        expected_s = 2 * n * elements / rates[-1] if rates else 0.0
        many = next((m for m in _COUNTS if m * expected_s <= _MOST_POINTS * point_s), 1)
        counts, cheap = around(n, many, experts), 3 * many * expected_s <= _MOST_POINTS * point_s
        took_s = [seconds(count, point_s / len(counts), int(cheap), 2 if cheap else 1) for count in counts]
        rates.append(2 * sum(counts) * elements / sum(took_s))
    return tuple(rates)


def around(n: int, many: int, experts: int = 1, fewest: int = 8) -> list[int]:
    """Token counts spread around ``n`` as the mean of so many experts to which tokens are routed at random: quantiles.

    A GEMM library is fast at some counts and slow at others: the mean over a few is what a run meets. Fewer than ``fewest`` are
    not spread.
    """
    if n < fewest:
        return [n]
    return [round(n + (n / experts) ** 0.5 * _NORMAL.inv_cdf((i + 0.5) / many)) for i in range(many)]


@contextlib.contextmanager
def expert_bench(
    device: Device,
    arch: ModelArch,
    dtype: torch.dtype,
    arena: WeightArena,
    most: int,
    effort: Effort,
) -> Iterator[Seconds]:
    """Seconds of one expert over n of the T = n·E/K tokens of a block."""
    math, experts = family(arch), arch.num_experts
    sets = arena.sets(math.parts(())[UnitId("expert", 0)], effort.cycle_bytes)
    x_TD = noise(device, dtype, most * experts // _TOP_K, arch.hidden)
    y_TD = torch.zeros_like(x_TD)
    dispatch = ExpertDispatch(device, experts, chunk=most)

    def seconds(count: int, seconds: float, warm: int, least: int) -> float:
        block = count * experts // _TOP_K
        ids_TK = (torch.arange(block * _TOP_K) // count).view(_TOP_K, block).T[torch.randperm(block)]
        weights_TK = torch.full((block, _TOP_K), 1 / _TOP_K)
        dispatch.route(ids_TK.contiguous().to(device.torch), weights_TK.to(device.torch), dtype)
        turn = itertools.cycle(range(experts))

        def work() -> None:
            at = next(turn)
            dispatch.add_unit(range(at, at + 1), x_TD[:block], y_TD[:block], ExpertWeights.of(next(sets)), math)

        return repeat_s(device, work, seconds, warm=warm, least=least)

    with torch.inference_mode():
        yield seconds


@contextlib.contextmanager
def unit_bench(
    device: Device,
    arch: ModelArch,
    dtype: torch.dtype,
    arena: WeightArena,
    most: int,
    effort: Effort,
) -> Iterator[Seconds]:
    """Seconds of a unit that is all experts of a layer, over n tokens of each on average, by grouped products."""
    math, unit = family(arch), range(arch.num_experts)
    sets = arena.sets(math.parts(())[expert_unit(0, unit)], effort.cycle_bytes)
    x_TD = noise(device, dtype, len(unit) * min(most, 2 * GROUPED_TOKENS), arch.hidden)
    y_TD = torch.zeros_like(x_TD)
    dispatch = ExpertDispatch(device, len(unit))

    def seconds(count: int, seconds: float, warm: int, least: int) -> float:
        spread = torch.tensor(around(count, len(unit), fewest=4)).expand(len(unit))
        ids_T = torch.arange(len(unit)).repeat_interleave(spread)
        block = len(ids_T)
        ids_TK = ids_T[torch.randperm(block)].unsqueeze(1)
        dispatch.route(ids_TK.to(device.torch), torch.ones(block, 1, device=device.torch), dtype)

        def work() -> None:
            weights = ExpertWeights.of(next(sets))
            dispatch.add_group(
                unit,
                x_TD[:block],
                y_TD[:block],
                lambda x_nD, own: math.feed_forward(x_nD, weights.grouped(own.ends())),
            )

        return repeat_s(device, work, seconds, warm=warm, least=least)

    with torch.inference_mode():
        yield seconds


@contextlib.contextmanager
def dense_bench(
    device: Device, arch: ModelArch, dtype: torch.dtype, arena: WeightArena, most: int, effort: Effort
) -> Iterator[Seconds]:
    """Seconds of one layer's attention module over a GPU batch, attention itself left out, and of routing its tokens."""
    shape = KVShape(layers=1, kv_heads=arch.num_kv_heads, head_dim=arch.head_dim, dtype=dtype)
    blocks = max(-(-most // PAGE_TOKENS), min(most, _DECODE_TOKENS))
    cache = KVCache(device, shape, {"gpu": blocks, "cpu": 0, "disk": 0})
    buffers = KVBuffers(staging_pages=0, batch_tokens=0, write_pages=0)
    lanes = KVLanes(device, Recorder(), cache, buffers, arch.num_heads)
    sets = arena.sets(family(arch).parts(())[UnitId("attention", 0)], effort.cycle_bytes)
    try:
        with torch.inference_mode():
            yield lambda count, seconds, warm, least: repeat_s(
                device, _dense_work(device, arch, dtype, lanes, cache, sets, count), seconds, warm=warm, least=least
            )
    finally:
        lanes.close()


def _dense_work(
    device: Device,
    arch: ModelArch,
    dtype: torch.dtype,
    lanes: KVLanes,
    cache: KVCache,
    sets: Iterator[dict[str, torch.Tensor]],
    count: int,
) -> Callable[[], None]:
    """What the executor's `project`, `attend` and `route` do for a batch of ``count`` tokens, attention left out."""
    math, (batch,) = family(arch), _batches(device, lanes, cache, count)
    rope = math.rope(batch.positions_T.to(device.torch), batch.lengths_T.to(device.torch), dtype)
    h_TD, y_TD, x_TD = (torch.zeros(count, arch.hidden, dtype=dtype, device=device.torch) for _ in range(3))
    h_TD.copy_(noise(device, dtype, count, arch.hidden))
    attended_THd = noise(device, dtype, count, arch.num_heads, arch.head_dim)
    router_dtype = torch.float32 if arch.router_float32 else dtype
    router_TE = torch.empty(count, arch.num_experts, dtype=router_dtype, device=device.torch)
    dispatch = ExpertDispatch(device, arch.num_experts)

    def work() -> None:
        weights = next(sets)
        h_TD.add_(y_TD)  # the output of the layer before's experts
        math.project(h_TD, weights, rope, lanes.new_kv(0, batch))
        _, x_TD[:], logits_TE = math.output(h_TD, attended_THd, weights)
        if logits_TE is not None:
            router_TE[:] = logits_TE
        ids_TK, weights_TK = math.route(router_TE, math.router_correction(weights))
        dispatch.route(ids_TK, weights_TK, dtype)
        y_TD.zero_()

    return work


def _batches(device: Device, lanes: KVLanes, cache: KVCache, count: int) -> list[Batch]:
    """One GPU batch of ``count`` tokens: rows that decode, or runs of prompts when there are many. Its places are known."""
    length = 1 if count <= _DECODE_TOKENS else PAGE_TOKENS
    runs = []
    for start in range(0, count, length):
        row, tokens = cache.open("gpu"), min(length, count - start)
        cache.reserve(row, tokens)
        runs.append(Run(row, [0] * tokens, AttentionMode.GPU, 1))
    block = Block(runs, len(runs))
    lanes.begin(block, Uploads(device))
    for run in runs:
        cache.close(run.kv)
    return block.batches
