"""What the runtime is told to do: a frozen, validated policy, and the JSON file that carries it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import ceil
from typing import Annotated, Any

from policies.common.checks import check_count, check_shares
from policies.common.errors import DataError, FlexMoEError, InfeasibleError, UsageError
from policies.common.fields import Count, Percent, Rule, Switch, check_fields, one_of, optional, required, rules, whole
from policies.common.json_files import check_header, check_keys, read_json, write_json
from policies.common.option_names import option
from policies.workload import Workload

KIND = "flexmoe.policy"
SCHEMA_VERSION = 1
SCHEDULES = ("rolling", "static")
#: What a run can pack the weights of a 16-bit checkpoint in.
WEIGHT_FORMATS = ("int4", "int8", "fp8", "mxfp4")
#: Parts of a block that march half a layer apart.
HALF_BLOCKS = (1, 2)
#: For each layer the numbers of its expert units.
Order = tuple[tuple[int, ...], ...]
_LAYER_SCHEMA = {"type": "array", "minItems": 1, "uniqueItems": True, "items": {"type": "integer", "minimum": 0}}


def _checked_order(name: str, order: Any) -> Order:
    """The order as tuples; the search makes many policies of one order, which is checked once."""
    if isinstance(order, tuple) and all(isinstance(layer, tuple) for layer in order):
        return _known_order(name, order)
    layers = order if isinstance(order, (list, tuple)) else ()
    if not layers or not all(isinstance(layer, (list, tuple)) for layer in layers):
        raise UsageError(f"{name} is {order!r:.80}; it must list, for each layer, the numbers of its expert units.")
    return _each_unit_once(name, tuple(map(tuple, layers)))


def _each_unit_once(name: str, order: Order) -> Order:
    for layer, numbers in enumerate(order):
        whole_numbers = all(type(number) is int for number in numbers)
        if not whole_numbers or not numbers or sorted(numbers) != list(range(len(numbers))):
            raise UsageError(
                f"{name} has {numbers!r:.80} for layer {layer}; it must name each of the layer's expert units, which "
                "count from 0, once."
            )
    if not order:
        raise UsageError(f"{name} names no layer; leave it out, or give the expert units of each layer.")
    return order


@lru_cache(maxsize=16)
def _known_order(name: str, order: Order) -> Order:
    return _each_unit_once(name, order)


_ORDER = Rule(check=_checked_order, schema={"type": "array", "minItems": 1, "items": _LAYER_SCHEMA})


def _checked_format(name: str, value: Any) -> str | None:
    """A format or None; a file of before formats had names says false."""
    if value is None or value is False:
        return None
    if value not in WEIGHT_FORMATS or not isinstance(value, str):
        raise UsageError(f"{name} is {value!r}; it must be one of {', '.join(WEIGHT_FORMATS)}, or null.")
    return value


_FORMAT = Rule(check=_checked_format, schema={"enum": [*WEIGHT_FORMATS, None, False]})


def _checked_half_blocks(name: str, value: Any) -> int:
    if isinstance(value, bool) or value not in HALF_BLOCKS:
        raise UsageError(f"{name} is {value!r}; it must be 1, or 2 for a block that marches as two halves.")
    return int(value)


_HALF_BLOCKS = Rule(check=_checked_half_blocks, schema={"enum": list(HALF_BLOCKS)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Where things live, how many rows run together, and in which order. Names follow FlexLLMGen.

    Args:
        gpu_batch_size: rows whose attention runs together.
        num_gpu_batches: GPU batches in a block; all rows in flight are their product, `block_size`.
        w_gpu_percent, w_cpu_percent: share of the stored weight bytes at home on the GPU and in host memory, 0 to 100;
            here and in the next two pairs the rest is on disk, and 0 is a value like any other.
        cache_gpu_percent, cache_cpu_percent: share of the KV cache, in pages.
        act_gpu_percent, act_cpu_percent: share of the hidden states, in GPU batches.
        prefill_tokens: prompt tokens that may enter one sweep.
        overlap: copies and computation run at the same time; off, one after the other.
        pin_weight: host weights are pinned, so that copies to the GPU run asynchronously.
        compress_weight: what a 16-bit checkpoint is packed in, one of `WEIGHT_FORMATS`: attention projections, experts and the
            MLPs of dense layers. None leaves a checkpoint as it is, packed or not.
        compress_cache: the KV cache is stored compressed.
        cpu_attention_percent: share of the host-resident KV that is attended to on the CPU, 0 to 100.
        schedule: "rolling" (a finished row's place is refilled in the next sweep) or "static" (a block starts and
            ends together).
        weight_slots: buffers on the compute device that streamed units pass through; None is what the runtime takes by
            itself (`cost_model.memory.allocation`). More of them keep the links busy through a long attention phase. Two
            half-blocks have them beside those that hold a layer.
        experts_per_unit: consecutive experts of a layer that are placed and moved as one; None is what the runtime takes by
            itself (`cost_model.model.weight_units`). Small experts are moved in groups.
        half_blocks: 2: the block marches as two halves, half a layer apart, so that the attention of one and the experts of
            the other overlap (`policies.schedule`); 1: all attention of a layer comes before its experts.
        expert_order: for each layer the numbers of its expert units, 0 being the first, those first that are to live in
            the fastest tier; None is as they stand. `cost_model.routing.expert_usage` makes one of how often each was used.
        expert_chunk: tokens of an expert that are computed at once; None is what the runtime takes by itself
            (`cost_model.memory.memory_plan`). More of them take more memory, and are faster where products of many tokens are.

    Raises:
        UsageError: a value is of the wrong type or out of range, or the percents of a pair add up to more than 100.
    """

    gpu_batch_size: Count
    num_gpu_batches: Count
    w_gpu_percent: Percent
    w_cpu_percent: Percent
    cache_gpu_percent: Percent
    cache_cpu_percent: Percent
    act_gpu_percent: Percent
    act_cpu_percent: Percent
    prefill_tokens: Count
    overlap: Switch = True
    pin_weight: Switch = True
    compress_weight: Annotated[str | None, _FORMAT] = None
    compress_cache: Switch = False
    cpu_attention_percent: Percent = 0.0
    schedule: Annotated[str, one_of(*SCHEDULES)] = "rolling"
    weight_slots: Annotated[int | None, optional(whole(2))] = None
    experts_per_unit: Annotated[int | None, optional(whole(1))] = None
    half_blocks: Annotated[int, _HALF_BLOCKS] = 1
    expert_order: Annotated[Order | None, optional(_ORDER)] = None
    expert_chunk: Annotated[int | None, optional(whole(1))] = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_shares("weights", self.w_gpu_percent, self.w_cpu_percent)
        check_shares("cache", self.cache_gpu_percent, self.cache_cpu_percent)
        check_shares("activations", self.act_gpu_percent, self.act_cpu_percent)

    @property
    def halves(self) -> int:
        """Half-blocks that a block marches as: one GPU batch is not cut."""
        return self.half_blocks if self.num_gpu_batches > 1 else 1

    @property
    def fetched_rows(self) -> int:
        """Rows of a GPU batch whose KV is brought to the GPU, at most.

        Of two half-blocks every GPU batch has rows of every kind, so many as the shares ask for: what is beyond that the CPU
        attends, where it attends at all."""
        if self.halves == 1 or self.cache_cpu_percent and not self.cpu_attention_percent:
            return self.gpu_batch_size
        on_disk = 100 - self.cache_gpu_percent - self.cache_cpu_percent
        percent = max(0.0, on_disk) + self.cache_cpu_percent * (1 - self.cpu_attention_percent / 100)
        return min(self.gpu_batch_size, ceil(self.gpu_batch_size * percent / 100) + 1)

    def most_fetched(self, tails: int) -> int | None:
        """Rows of the host tier whose KV may be fetched at once, beside so many rows of the disk tier; None is no limit."""
        limited = self.fetched_rows < self.gpu_batch_size
        return max(0, self.fetched_rows * self.num_gpu_batches - tails) if limited else None

    @property
    def block_size(self) -> int:
        """Rows in flight."""
        return self.gpu_batch_size * self.num_gpu_batches

    @classmethod
    def from_percent(
        cls,
        percent: Sequence[float],
        *,
        gpu_batch_size: int,
        num_gpu_batches: int,
        prompt_len: int,
        gen_len: int,
        schedule: str = "rolling",
        prefill_tokens: int | None = None,
        **rest: Any,
    ) -> "Policy":
        """A policy from FlexLLMGen's six numbers.

        Args:
            percent: weight GPU, weight CPU, cache GPU, cache CPU, activation GPU, activation CPU.
            prompt_len, gen_len: mean tokens of a row; they only choose `prefill_tokens` where that is None.
            prefill_tokens: None means what keeps the block full: rolling, the prompts of the rows that end in a
                sweep (block_size · prompt_len / gen_len, rounded up); static, all prompts of the block.
            rest: further fields of `Policy`.

        Raises:
            UsageError: not six numbers, an unknown field, or a value that `Policy` refuses.
        """
        if isinstance(percent, str) or not isinstance(percent, Sequence) or len(percent) != 6:
            raise UsageError(f"percent is {percent!r}; give six numbers: weight, cache, activation, each GPU then CPU.")
        names = list(rules(cls))
        percent_names = [name for name in names if name.startswith(("w_", "cache_", "act_"))]
        unknown = [name for name in rest if name not in names or name in percent_names]
        if unknown:
            raise UsageError(
                f"{', '.join(unknown)} cannot be given beside the six percents; a policy has {', '.join(names)}."
            )
        workload = Workload(prompt_len=prompt_len, gen_len=gen_len)
        if prefill_tokens is None:
            rows = check_count("gpu_batch_size", gpu_batch_size) * check_count("num_gpu_batches", num_gpu_batches)
            sweeps = workload.gen_len if schedule == "rolling" else 1
            prefill_tokens = -(-rows * workload.prompt_len // sweeps)
        rest |= zip(percent_names, percent, strict=True)
        return cls(
            gpu_batch_size=gpu_batch_size,
            num_gpu_batches=num_gpu_batches,
            schedule=schedule,
            prefill_tokens=prefill_tokens,
            **rest,
        )


@dataclass(frozen=True, slots=True)
class PolicyFile:
    """A policy with what it was made for. An empty section means the same as none.

    Args:
        policy: what to do.
        model: the shape fingerprint of the model it was made for, or None.
        hardware: the machine it was made for, or None.
        workload: the job it was made for, or None.
        predicted: what the planner expects of it, or None.
    """

    policy: Policy
    model: dict[str, Any] | None = None
    hardware: dict[str, Any] | None = None
    workload: dict[str, Any] | None = None
    predicted: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in _SECTIONS:
            object.__setattr__(self, name, getattr(self, name) or None)

    def to_json(self) -> dict[str, Any]:
        """The content of the file as a dict of JSON values; `policy.schema.json` describes it (`policies.policy_schema`)."""
        sections = {name: getattr(self, name) or {} for name in _SECTIONS}
        document = {"kind": KIND, "schema_version": SCHEMA_VERSION} | sections
        return document | {"policy": asdict(self.policy), "predicted": document.pop("predicted")}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file under its final name in one step: either all of it is there, or what was there before.

        Raises:
            StorageError: the directory is missing, read-only or full.
        """
        write_json(path, self.to_json(), "the policy")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PolicyFile":
        """Reads and checks a policy file.

        Raises:
            InputMissingError: there is no such file, or it cannot be read.
            DataError: it is not strict JSON, not a policy file, newer than this program, or holds a key or value that
                a policy does not have; the sentence names it.
        """
        document = read_json(path, "the policy file")
        try:
            return cls._from_document(document)
        except FlexMoEError as error:
            raise DataError(f"the policy file {path} cannot be used: {error}") from error

    @classmethod
    def _from_document(cls, document: Any) -> "PolicyFile":
        check_header(document, KIND, SCHEMA_VERSION, "a policy file")
        check_keys("the file", document, {"kind", "schema_version", "policy", *_SECTIONS})
        for name in (*_SECTIONS, "policy"):
            if not isinstance(document.get(name, {}), dict):
                raise DataError(f'"{name}" must be a JSON object.')
        sections = {name: document.get(name) for name in _SECTIONS}
        return cls(policy=_policy_from_json(document.get("policy", {})), **sections)

    def planned_workload(self) -> Workload | None:
        """The workload that the policy was planned for, None where the file names none.

        Raises:
            DataError: the section is not a workload.
        """
        if not self.workload:
            return None
        try:
            return Workload(**self.workload)
        except (TypeError, UsageError) as e:
            raise DataError(f"the policy's workload is {dict(self.workload)!r}: {e}") from e

    def check_model(self, arch_fingerprint: Mapping[str, Any]) -> None:
        """Refuses a model that the policy was not made for; a policy without a model fits any.

        Args:
            arch_fingerprint: `ModelArch.fingerprint()` of the model that is to run.

        Raises:
            InfeasibleError: a field differs; each one is named with both values.
        """
        if self.model is None:
            return
        names = list(dict.fromkeys([*self.model, *arch_fingerprint]))
        differing = [
            f"{name} is {self.model.get(name, 'absent')} in the policy and "
            f"{arch_fingerprint.get(name, 'absent')} in the model"
            for name in names
            if name not in self.model or name not in arch_fingerprint or self.model[name] != arch_fingerprint[name]
        ]
        if differing:
            raise InfeasibleError(
                f"the policy was made for another model: {'; '.join(differing)}. "
                f"Make a policy for this model, or override with {option('force_policy', True)}."
            )


_SECTIONS = ("model", "hardware", "workload", "predicted")


def _policy_from_json(values: Mapping[str, Any]) -> Policy:
    check_keys('"policy"', values, rules(Policy), required(Policy))
    return Policy(**values)
