"""The header of one safetensors file as a table of tensors and where their bytes lie, proved against the file's size.

Parsed here, not by the safetensors library, because the runtime reads the extents itself (O_DIRECT, into its own
buffers) and never maps a file of weights into memory.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flexmoe.checkpoint.files import INCOMPLETE, MAX_JSON_BYTES, open_file, parse_json_object, read_bytes
from flexmoe.errors import DataError

_MAX_DIMENSIONS = 16
_MAX_EXTENT = 2**63 - 1
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}
_LABELS = {dtype: label for label, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where one tensor lies on disk.

    `offset` is absolute, in bytes from the start of the file. The format does not promise that it is a multiple of
    the element size, though every current writer makes it one.
    """

    name: str
    path: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def dtype_label(dtype: torch.dtype) -> str:
    """What a header calls a dtype."""
    return _LABELS[dtype]


def read_tensors(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file by name, in the order of their bytes.

    Symlinks are followed: the hub cache consists of them.

    Raises:
        DataError: the header is malformed, or its extents do not cover the file exactly once.
        InputMissingError, StorageError: the file may not or cannot be read.
    """
    header, data_start, size_bytes = _read_header(path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DataError(f"the header of {str(path)!r} has a '__metadata__' that is not a table of strings")
    infos = [_tensor_info(path, data_start, name, entry) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    end = data_start
    for info in infos:
        if info.offset != end:
            what = "overlaps the tensor before it" if info.offset < end else "leaves a gap before it"
            raise DataError(
                f"tensor {info.name!r} in {str(path)!r} {what} (it starts at byte {info.offset} of the file, not "
                f"{end}): the header is damaged or not to be trusted"
            )
        end += info.nbytes
    if size_bytes < end:
        cut = next(info.name for info in infos if info.offset + info.nbytes > size_bytes)
        raise DataError(
            f"{str(path)!r} is truncated: its header describes {end} bytes but the file has {size_bytes}, which ends "
            f"within tensor {cut!r}; {INCOMPLETE}"
        )
    if size_bytes > end:
        raise DataError(
            f"{str(path)!r} is longer than its header says: the header describes {end} bytes but the file has "
            f"{size_bytes}, so the file is damaged or was resumed wrongly, fetch it again"
        )
    return {info.name: info for info in infos}


def _tensor_info(path: Path, data_start: int, name: str, entry: Any) -> TensorInfo:
    where = f"tensor {name!r} in {str(path)!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise DataError(
            f"{where} has a header entry without exactly 'dtype', 'shape' and 'data_offsets': it is damaged"
        )
    label, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(label, str) or label not in _DTYPES:
        raise DataError(f"{where} has the unsupported dtype {label!r}: weights must be stored as BF16, F16 or F32")
    if not _are_extents(shape) or len(shape) > _MAX_DIMENSIONS:
        raise DataError(f"{where} has a shape that is not a short list of sizes: the header is damaged")
    if not _are_extents(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise DataError(f"{where} has data_offsets that are not a begin and an end: the header is damaged")
    nbytes = offsets[1] - offsets[0]
    needed = math.prod(shape) * _DTYPES[label].itemsize
    if nbytes != needed:
        raise DataError(
            f"{where} has {nbytes} bytes, but {label} of shape {shape} takes {needed}: the header is damaged"
        )
    offset = data_start + offsets[0]
    return TensorInfo(name=name, path=path, offset=offset, nbytes=nbytes, dtype=_DTYPES[label], shape=tuple(shape))


def _are_extents(values: Any) -> bool:
    # type(), because JSON's true is an int to isinstance
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= _MAX_EXTENT for value in values)


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The parsed header, the byte at which tensor data starts, and the size of the file."""
    with open_file(path) as (fd, size_bytes):
        if size_bytes < 8:
            raise DataError(f"{str(path)!r} has {size_bytes} bytes, too few for the length of its header: {INCOMPLETE}")
        length = int.from_bytes(read_bytes(fd, 8), "little")
        if length > MAX_JSON_BYTES:
            raise DataError(
                f"{str(path)!r} is not a safetensors file: its first 8 bytes give a header of {length} bytes, and the "
                f"format allows {MAX_JSON_BYTES}; the file is damaged, or an error page was saved under its name"
            )
        if 8 + length > size_bytes:
            raise DataError(
                f"{str(path)!r} is truncated: its header alone ends at byte {8 + length} but the file has "
                f"{size_bytes} bytes; {INCOMPLETE}"
            )
        raw = read_bytes(fd, length, 8)
    if not raw.startswith(b"{"):
        raise DataError(f"{str(path)!r} is not a safetensors file: its header does not start with '{{', it is damaged")
    return parse_json_object(raw, f"the header of {str(path)!r}"), 8 + length, size_bytes
