"""What lies beside packed numbers and has to be right before a run: scales, and the order of the inputs.

A scale that is not a number makes every token wrong that meets it, and a group of inputs in another order does so in silence.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import torch

from flexmoe.checkpoint.files import open_file, read_bytes
from flexmoe.checkpoint.safetensors import TensorInfo
from flexmoe.errors import DataError

#: Last words of names of what is not read: shapes that the config gives, order that is checked, scales of activations and KV.
UNREAD = (
    "weight_shape",
    "g_idx",
    "weight_g_idx",
    "input_scale",
    "output_scale",
    "k_scale",
    "v_scale",
    "activation_scale",
)
_ORDER = ("g_idx", "weight_g_idx")
#: Of e8m0, in which exponents are stored: no number. Source: the OCP Microscaling specification 1.0.
_E8M0_NAN = 255


def check_beside(scales: Iterable[TensorInfo], tensors: Iterable[TensorInfo], group: int) -> None:
    """Read scales and orders of inputs, and refuse what cannot be computed with.

    Args:
        scales: of all packed matrices.
        tensors: of the checkpoint.
        group: inputs that share a scale; 0 is all of them.

    Raises:
        DataError: a scale is not finite, or inputs are in another order; names the tensor.
        StorageError: a file cannot be read.
    """
    orders = [info for info in tensors if info.name.rsplit(".", 1)[-1] in _ORDER]
    wanted = sorted(
        {info.name: info for info in (*scales, *orders)}.values(), key=lambda info: (str(info.path), info.offset)
    )
    files = [list(infos) for _, infos in groupby(wanted, key=lambda info: info.path)]
    with ThreadPoolExecutor(min(8, (os.cpu_count() or 1) * 2)) as pool:
        for infos, found in zip(files, pool.map(lambda each: list(_values(each)), files)):
            for info, values in zip(infos, found):
                _check(info, values, group)


def _values(infos: list[TensorInfo]) -> Iterator[torch.Tensor]:
    """Those of one file, in order."""
    with open_file(Path(infos[0].path)) as (fd, _):
        for info in infos:
            raw = read_bytes(fd, info.nbytes, info.offset)
            yield torch.frombuffer(bytearray(raw), dtype=info.dtype)


def _check(info: TensorInfo, values: torch.Tensor, group: int) -> None:
    if info.name.rsplit(".", 1)[-1] in _ORDER:
        expected = torch.arange(len(values), dtype=values.dtype) // (group or len(values))
        if not torch.equal(values, expected):
            raise DataError(
                f"tensor {info.name!r} in {str(info.path)!r} gives inputs in another order (activation order), which is not read: "
                "use a checkpoint without desc_act, or the original one"
            )
    elif bool((~values.isfinite() if info.dtype.is_floating_point else values == _E8M0_NAN).any()):
        raise DataError(
            f"tensor {info.name!r} in {str(info.path)!r} has scales that are not finite: the file is damaged, fetch it again"
        )
