"""How often each expert was chosen: the file that router statistics are boiled down to, for planner and expert cache."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cost_model.model.arch import ModelArch
from cost_model.model.weight_units import expert_groups
from policies.common.checks import check_count
from policies.common.errors import DataError, FlexMoEError, InfeasibleError
from policies.common.json_files import check_header, check_keys, read_json, write_json

KIND = "flexmoe.expert-usage"
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertUsage:
    """Routing as it was seen in a run.

    Args:
        model: `ModelArch.fingerprint` of the model.
        tokens: tokens that each layer routed.
        counts: int64 ``[layers, E]``, tokens of each expert; all zero in a dense layer.

    Raises:
        DataError: the counts are not those of so many tokens of such a model.
    """

    model: Mapping
    tokens: int
    counts: np.ndarray

    def __post_init__(self):
        shape = self.model.get("num_layers"), self.model.get("num_experts")
        if self.counts.shape != shape:
            raise DataError(
                f"the counts are {list(self.counts.shape)}; the model has layers and experts {list(shape)}."
            )
        dense = self.model.get("dense_layers", [])
        for layer, total in enumerate(self.counts.sum(axis=1).tolist()):
            routed = 0 if layer in dense else self.tokens * self.model["top_k"]
            if total != routed or self.counts[layer].min() < 0 or self.counts[layer].max() > self.tokens:
                raise DataError(
                    f"layer {layer} counts {total} choices of experts; {self.tokens} tokens make {routed}, and no expert has "
                    "fewer than 0 or more than all of them."
                )

    @property
    def shares(self) -> np.ndarray:
        """Probability ``[layers, E]`` that a token is routed to an expert. One token that goes everywhere alike is added, so
        that an expert which was not seen is not impossible."""
        even = self.model["top_k"] / self.model["num_experts"]
        return np.where(self.counts.any(axis=1, keepdims=True), (self.counts + even) / (self.tokens + 1), 0.0)

    def unit_order(self, arch: ModelArch) -> tuple[tuple[int, ...], ...]:
        """For each layer the numbers of its expert units, those most used first: `Policy.expert_order` for units as ``arch``
        groups them."""
        return tuple(self._layer_order(counts, expert_groups(arch, layer)) for layer, counts in enumerate(self.counts))

    @staticmethod
    def _layer_order(counts: np.ndarray, units: Sequence[range]) -> tuple[int, ...]:
        used = [counts[unit.start : unit.stop].mean() for unit in units]
        return tuple(sorted(range(len(units)), key=lambda number: -used[number]))

    def check_model(self, arch: ModelArch) -> None:
        """Refuse the usage of another model's experts.

        Raises:
            InfeasibleError: names what differs.
        """
        own = arch.fingerprint()
        differing = [name for name in {**self.model, **own} if self.model.get(name) != own.get(name)]
        if differing:
            raise InfeasibleError(
                f"the expert usage is of another model: {', '.join(sorted(differing))} differ; take that of a run of this one."
            )

    def save(self, path: str | os.PathLike) -> None:
        """Writes the file in one step.

        Raises:
            StorageError: the directory is missing, read-only or full.
        """
        head = {"kind": KIND, "schema_version": SCHEMA_VERSION, "model": dict(self.model), "tokens": self.tokens}
        write_json(path, head | {"counts": self.counts.tolist()}, "the expert usage")

    @classmethod
    def load(cls, path: str | os.PathLike) -> ExpertUsage:
        """Reads and checks a file.

        Raises:
            InputMissingError: there is no such file, or it cannot be read.
            DataError: it is not strict JSON, not expert usage, newer than this program, or contradicts itself.
        """
        document = read_json(path, "the expert usage")
        try:
            return cls._from_document(document)
        except FlexMoEError as error:
            raise DataError(f"the expert usage {path} cannot be used: {error}") from error

    @classmethod
    def _from_document(cls, document) -> ExpertUsage:
        check_header(document, KIND, SCHEMA_VERSION, "a file of expert usage")
        names = ("kind", "schema_version", "model", "tokens", "counts")
        check_keys("the file", document, names, names)
        model, rows = check_shape(document["model"]), document["counts"]
        if not isinstance(rows, list) or not all(
            isinstance(row, list) and len(row) == len(rows[0]) and all(type(n) is int and 0 <= n < 2**53 for n in row)
            for row in rows
        ):
            raise DataError('"counts" must be a list of equally long lists of whole numbers, one for each layer.')
        counts = np.array(rows, dtype=np.int64)
        return cls(model=model, tokens=check_count("tokens", document["tokens"]), counts=counts)


def check_shape(model) -> Mapping:
    """Returns what a file says of its model if that has the numbers of layers, experts and choices.

    Raises:
        DataError: it has not.
    """
    names = ("num_layers", "num_experts", "top_k")
    if not isinstance(model, dict) or not all(type(model.get(name)) is int and model[name] > 0 for name in names):
        raise DataError('"model" must be an object with num_layers, num_experts and top_k.')
    dense = model.get("dense_layers", [])
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise DataError('"dense_layers" of "model" must be a list of layers.')
    return model
