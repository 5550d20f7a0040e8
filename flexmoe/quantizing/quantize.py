"""A checkpoint of 16-bit weights becomes one of packed weights, in the format of compressed-tensors.

File by file: a file is made in pieces by all cores, gets its name when it is whole and on the disk, and is noted with its
hashes. A job that was stopped resumes after the last of them. The checkpoint gets its name when all of it is there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from cost_model.model.arch import ModelArch
from cost_model.model.packed_format import PackedFormat
from cost_model.model.packing import check_apart, check_group
from flexmoe.checkpoint.checkpoint import Checkpoint
from flexmoe.errors import DataError, StorageError
from flexmoe.models.common.decoder import Decoder
from flexmoe.models.loader import Model, load_model
from flexmoe.models.registry import family
from flexmoe.progress import Volume
from flexmoe.quantizing.beside import copy_beside
from flexmoe.quantizing.checksums import write_checksums
from flexmoe.quantizing.outputs import Shard, shards_of
from flexmoe.quantizing.pieces import HEADER, Made, pieces, write
from flexmoe.quantizing.scheme import Scheme
from flexmoe.quantizing.work import Finished, Work
from flexmoe.system.machine import free_disk_bytes, usable_cores
from policies.common import file_io
from policies.common.file_io import storage_errors
from policies.common.memory_units import in_units

log = logging.getLogger(__name__)
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class _Each(Protocol):
    """Calls a function for each of many items, on all cores, and gives the results in order."""

    def __call__(
        self, function: Callable[[_Item], _Result], items: Iterable[_Item], /
    ) -> Generator[_Result, None, None]:
        """After the first error, and when it is closed, none of them is under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """A packed checkpoint.

    Attributes:
        directory: where it is.
        packed: its format.
        source_bytes, packed_bytes: of the weights before and after.
        relative_error: root of the mean squared difference of the packed weights from the original ones, relative to these.
    """

    directory: Path
    packed: PackedFormat
    source_bytes: int
    packed_bytes: int
    relative_error: float


def quantize(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str,
    group_size: int | None = None,
    *,
    bar: bool = False,
) -> Quantized:
    """Write a packed checkpoint of a model; the same call resumes what was stopped.

    Attention projections and experts (in layers without experts the MLP) are packed; all else is copied as it is.

    Args:
        model: a checkpoint directory or a hub id, of 16-bit or 32-bit floats.
        out: the directory to make; not there yet, or empty.
        format: ``int4``, ``int8``, ``fp8`` or ``mxfp4``.
        group_size: inputs that share a scale, 0 for all of an output; None: 128, or 64 or 32 where a width is no multiple of
            it; in ``fp8`` 0. In ``fp8`` a block of so many
            inputs and outputs shares one.
        bar: draw a bar on stderr.

    Raises:
        UsageError: no such format or groups, ``out`` is there, or what was begun there is of another model or format.
        InputMissingError, DataError: the model cannot be read, is packed already, or has weights that are not finite; or what
            was written before has changed.
        StorageError: a disk is full or reports an error; nothing is under the name of ``out``.
    """
    loaded = load_model(os.fspath(model))
    scheme = Scheme.of(format, loaded.arch, group_size)
    if loaded.checkpoint is None:
        raise DataError(f"{os.fspath(model)!r} has no weights")
    config, packed_family = _packed(loaded, scheme)
    packed = packed_family.arch.packed
    if packed is None:
        raise DataError(f"no matrix of {os.fspath(model)!r} is packed")
    shards = shards_of(loaded.checkpoint, packed_family, _scale_dtype(loaded))
    work = Work(Path(out), _identity(loaded.checkpoint, config, shards))
    try:
        with _cores() as each:
            made = _make(shards, packed, work, each, bar)
        copy_beside(loaded.checkpoint, config, shards, work.part)
        write_checksums(work.part, {own.file: own.stretches for own in made})
        work.publish()
    finally:
        work.close()
    return Quantized(
        directory=work.out,
        packed=packed,
        source_bytes=sum(info.nbytes for info in loaded.checkpoint.tensors.values()),
        packed_bytes=sum(shard.data_bytes for shard in shards),
        relative_error=math.sqrt(sum(own.error for own in made) / (sum(own.norm for own in made) or 1.0)),
    )


def _packed(model: Model, scheme: Scheme) -> tuple[dict[str, Any], Decoder]:
    """The config of the packed model, and its family as whoever loads it will have it."""
    if model.arch.packed is not None:
        raise DataError(
            f"{model.arch.name!r} is packed already, in {model.arch.packed.describe()}; give the original checkpoint"
        )
    check_group(model.arch, scheme.format, scheme.columns)
    names = family(model.arch, model.config).names
    check_apart(model.arch)
    routers = {names.router, names.packed_router, *([names.shared_gate] if model.arch.shared_gate else [])}
    left = ["lm_head", *sorted("model.layers.{}." + name.removesuffix(".weight") for name in routers)]
    config = model.config | {"quantization_config": scheme.config(left)}
    arch = ModelArch.from_config(config, name=model.arch.name)
    return config, family(dataclasses.replace(arch, dtype_bytes=model.arch.dtype_bytes), config)


def _scale_dtype(model: Model) -> torch.dtype:
    """That in which 16-bit weights are computed with; loaders cast scales to it."""
    return torch.float16 if model.stored_dtype == torch.float16 else torch.bfloat16


def _identity(checkpoint: Checkpoint, config: dict[str, Any], shards: Iterable[Shard]) -> str:
    """A hash of all that decides what is written: the files that are read, the config, the headers."""
    found = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in sorted({info.path for info in checkpoint.tensors.values()}):
        status = path.stat()
        found.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    for shard in shards:
        found.update(shard.header)
    return found.hexdigest()


@contextmanager
def _cores() -> Iterator[_Each]:
    """All cores, with torch's own threads off: there is one for each piece."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(usable_cores(), "quantize", initializer=torch.set_num_threads, initargs=(1,))

    def each(function: Callable[[_Item], _Result], items: Iterable[_Item], /) -> Generator[_Result, None, None]:
        futures = [pool.submit(function, item) for item in items]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
            wait(futures)

    try:
        yield each
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # the threads have set it for those that begin after them


def _make(shards: list[Shard], packed: PackedFormat, work: Work, each: _Each, bar: bool) -> list[Finished]:
    """Make all files that are not there yet, and check those that are."""
    total, done = sum(shard.data_bytes for shard in shards), dict(work.finished)
    before = sum(shard.data_bytes for shard in shards if shard.file in done)
    for there in done.values():
        work.check(there, lambda check, stretches: list(each(check, stretches)))
    if done:
        log.info("resuming: %d of %d files are there, and unchanged", len(done), len(shards))
    _check_room(work.directory, total - before)
    with Volume(total, before, "quantizing", bar=bar) as volume:
        for shard in shards:
            if shard.file not in done:
                done[shard.file] = _made(shard, packed, work.part / shard.file, each, volume)
                work.add(done[shard.file])
    return [done[shard.file] for shard in shards]


def _check_room(directory: Path, needed: int) -> None:
    free = free_disk_bytes(directory)
    if free < needed:
        raise StorageError(
            f"the packed weights take {in_units(needed)}, and the disk of {directory.parent} has {in_units(free)} left: free "
            "space there or choose another output"
        )


def _made(shard: Shard, packed: PackedFormat, path: Path, each: _Each, volume: Volume) -> Finished:
    header = shard.header
    made: list[Made] = []
    with storage_errors(path), file_io.temporary_file(path) as (descriptor, temporary):
        first = write(descriptor, HEADER, header, 0)
        make = each(lambda piece: piece.make(descriptor, len(header), packed), pieces(shard, packed))
        with closing(make) as results:  # none may write to a file that is closed
            for piece in results:
                made.append(piece)
                volume.add(piece.nbytes)
        file_io.sync(descriptor)
        file_io.rename(temporary, path)
    stretches = (first, *(stretch for piece in made for stretch in piece.stretches))
    error, norm = sum(piece.error for piece in made), sum(piece.norm for piece in made)
    return Finished(file=shard.file, stretches=stretches, error=error, norm=norm)
