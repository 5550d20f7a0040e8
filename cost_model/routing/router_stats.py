"""What a model's routers chose in a run: the file of `--router-stats`, and how evenly the experts of a layer are used.

Legend: L layers, E experts, K chosen experts of a token.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cost_model.routing.expert_usage import ExpertUsage, check_shape
from policies.common.checks import check_count
from policies.common.errors import DataError, FlexMoEError, InfeasibleError
from policies.common.json_files import check_header, check_keys, read_json, write_json

KIND = "flexmoe.router-stats"
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """How evenly the tokens of a layer are spread over its experts.

    Args:
        max_over_mean: tokens of the expert chosen most often over the mean; 1 is even, E / K the most there can be.
        variance: of the tokens per expert (of all experts, in tokens²).
        variation: its root over the mean, the coefficient of variation; 0 is even, whatever the number of tokens.
        entropy_bits: of the distribution of choices over experts; log2 E is even.
        relative_entropy: ``entropy_bits`` over log2 E; 1 is even.
        unused_experts: those that no token chose, in order.
    """

    max_over_mean: float
    variance: float
    variation: float
    entropy_bits: float
    relative_entropy: float
    unused_experts: tuple[int, ...]

    @classmethod
    def of(cls, counts_E: np.ndarray) -> Balance:
        """From the tokens of each expert, of which some expert has at least one."""
        mean = float(counts_E.mean())
        used = counts_E[counts_E > 0] / counts_E.sum()
        entropy = max(0.0, float(-(used * np.log2(used)).sum()))
        return cls(
            max_over_mean=float(counts_E.max()) / mean,
            variance=float(counts_E.var()),
            variation=float(counts_E.std()) / mean,
            entropy_bits=entropy,
            relative_entropy=entropy / float(np.log2(len(counts_E))) if len(counts_E) > 1 else 1.0,
            unused_experts=tuple(np.flatnonzero(counts_E == 0).tolist()),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RouterStats:
    """Routing as it was seen in one or more runs.

    Args:
        model: `ModelArch.fingerprint` of the model.
        tokens: tokens that each layer routed: every one that was computed, those that a restart computes again included.
        counts: int64 ``[L, E]``, tokens of each expert; all zero in a dense layer.
        coactivation: int64 ``[L, E, E]``, tokens that chose both experts; the diagonal is ``counts``.

    Raises:
        DataError: the numbers are not those of so many tokens of such a model, or no token was routed.
    """

    model: Mapping[str, Any]
    tokens: int
    counts: np.ndarray
    coactivation: np.ndarray

    def __post_init__(self) -> None:
        usage, pairs = self.usage(), self.coactivation
        if self.tokens < 1:
            raise DataError("no token was routed, so there are no statistics.")
        if pairs.shape != (*self.counts.shape, self.counts.shape[1]):
            raise DataError(f"the co-activation is {list(pairs.shape)}; the counts are {list(self.counts.shape)}.")
        each = np.arange(self.counts.shape[1])
        symmetric = (pairs == pairs.transpose(0, 2, 1)).all() and (pairs >= 0).all()
        of_counts = (pairs[:, each, each] == usage.counts).all()
        if not symmetric or not of_counts or (pairs.sum(axis=2) != self.model["top_k"] * usage.counts).any():
            raise DataError(
                "the co-activation contradicts the counts: it must be symmetric, with the counts on its diagonal, and a row "
                "must add up to top_k times the tokens of its expert."
            )

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that route, in order."""
        dense = self.model.get("dense_layers", [])
        return tuple(layer for layer in range(len(self.counts)) if layer not in dense)

    def balance(self, layer: int) -> Balance:
        """How evenly the experts of a layer that routes are used."""
        return Balance.of(self.counts[layer])

    def usage(self) -> ExpertUsage:
        """The frequencies alone, for planner and expert cache."""
        return ExpertUsage(model=self.model, tokens=self.tokens, counts=self.counts)

    @classmethod
    def sum(cls, parts: Sequence[RouterStats]) -> RouterStats:
        """Statistics of several runs of one model (shards, or the starts of a job) as of one run.

        Raises:
            InfeasibleError: they are of different models; names what differs.
        """
        first, *others = parts
        for other in others:
            names = {**first.model, **other.model}
            differing = sorted(name for name in names if first.model.get(name) != other.model.get(name))
            if differing:
                raise InfeasibleError(
                    f"the router statistics are of different models: {', '.join(differing)} differ; give those of one model."
                )
        return cls(
            model=first.model,
            tokens=sum(part.tokens for part in parts),
            counts=np.sum([part.counts for part in parts], axis=0),
            coactivation=np.sum([part.coactivation for part in parts], axis=0),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file in one step; what follows from the counts is written too, for readers that want no arithmetic.

        Raises:
            StorageError: the directory is missing, read-only or full.
        """
        head = {"kind": KIND, "schema_version": SCHEMA_VERSION, "model": dict(self.model), "tokens": self.tokens}
        write_json(path, head | {"layers": [self._record(layer) for layer in self.layers]}, "the router statistics")

    def _record(self, layer: int) -> dict[str, Any]:
        counted = {"layer": layer, "tokens_per_expert": self.counts[layer].tolist()}
        return counted | asdict(self.balance(layer)) | {"coactivation": self.coactivation[layer].tolist()}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RouterStats:
        """Reads and checks a file.

        Raises:
            InputMissingError: there is no such file, or it cannot be read.
            DataError: it is not strict JSON, no router statistics, newer than this program, or contradicts itself.
        """
        document = read_json(path, "the router statistics")
        try:
            return cls._from_document(document)
        except FlexMoEError as error:
            raise DataError(f"the router statistics {path} cannot be used: {error}") from error

    @classmethod
    def _from_document(cls, document: Any) -> RouterStats:
        check_header(document, KIND, SCHEMA_VERSION, "a file of router statistics")
        names = ("kind", "schema_version", "model", "tokens", "layers")
        check_keys("the file", document, names, names)
        model, layers = check_shape(document["model"]), document["layers"]
        if not isinstance(layers, list) or not all(isinstance(each, dict) for each in layers):
            raise DataError('"layers" must be a list of objects.')
        experts = model["num_experts"]
        records = [_layer(record, f'"layers"[{place}]', experts) for place, record in enumerate(layers)]
        present = sorted([layer for layer, _, _ in records] + list(model.get("dense_layers", [])))
        # Whatever the file says, no more is allocated than it holds.
        if not records or len(present) != model["num_layers"] or present != list(range(len(present))):
            raise DataError('"layers" must have every layer with experts once, and no other.')
        counts = np.zeros((len(present), experts), dtype=np.int64)
        pairs = np.zeros((*counts.shape, experts), dtype=np.int64)
        for layer, counted, together in records:
            counts[layer], pairs[layer] = counted, together
        return cls(model=model, tokens=check_count("tokens", document["tokens"]), counts=counts, coactivation=pairs)


def _layer(record: dict[str, Any], where: str, experts: int) -> tuple[int, list[int], list[list[int]]]:
    """Number, tokens per expert and co-activation of a layer; what follows from them is computed anew."""
    names = ("layer", "tokens_per_expert", *Balance.__dataclass_fields__, "coactivation")
    check_keys(where, record, names, names)
    counted = _row(record["tokens_per_expert"], experts, f"tokens_per_expert of {where}")
    together = record["coactivation"]
    if not isinstance(together, list) or len(together) != experts:
        raise DataError(f"coactivation of {where} must be a list of {experts} lists.")
    rows = [_row(row, experts, f"each row of the coactivation of {where}") for row in together]
    return check_count("layer", record["layer"], 0), counted, rows


def _row(values: Any, size: int, what: str) -> list[int]:
    """The values, which must be ``size`` whole numbers of at least 0.

    Raises:
        DataError: they are not.
    """
    of_size = isinstance(values, list) and len(values) == size
    if not of_size or not all(type(n) is int and 0 <= n < 2**53 for n in values):
        raise DataError(f"{what} must be a list of {size} whole numbers of at least 0.")
    return list(values)
