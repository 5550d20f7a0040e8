"""`generate`: a Ray Data set through actors that have thousands of rows in flight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flexmoe.errors import UsageError
from flexmoe.ray.actor import Generate
from policies.common.checks import check_count

if TYPE_CHECKING:
    from ray.data import Dataset

#: Arguments of `Dataset.map_batches` that follow from those of `generate`.
_DECIDED = ("fn_constructor_kwargs", "batch_format", "compute", "concurrency")


def generate(
    dataset: Dataset,
    model: str,
    *,
    actors: int | tuple[int, int] = 1,
    rows_in_flight: int = 4096,
    batch_size: int = 64,
    arguments: Mapping[str, Any] | None = None,
    **map_batches: Any,
) -> Dataset:
    """Completes the rows of a data set with `Generate`, so many of them at once whatever the size of a batch is.

    An actor has as many rows at once as the calls that Ray lets it have open, times the rows of a call. Ray opens one call at
    a time unless told otherwise; here it opens ``rows_in_flight / batch_size`` of them, and blocks are cut to one call each;
    those that are smaller are joined, since a task for each of them is slower than an engine takes its rows.

    Args:
        dataset: with the columns that `Generate` takes.
        model: checkpoint directory, hub id, or with ``load_format="dummy"`` a known shape.
        actors: how many engines, or the least and the most of them. Each has its own copy of the weights that lie in host
            memory: one for each node is the measure.
        rows_in_flight: rows that an actor is given at once. More than the policy has places for (`block_size`) wait in it.
        batch_size: rows of one call; they come back together, and Ray does them again together where the actor is lost.
        arguments: the others of `Generate`: ``sampling_params``, ``id_column``, ``journal``, ``policy``, ``gpu_mem`` …
        **map_batches: the others of `ray.data.Dataset.map_batches`: ``num_gpus``, ``num_cpus``, ``memory`` …

    Returns:
        ray.data.Dataset: the rows with the columns of `Generate`; nothing has run.

    Raises:
        UsageError: a number that is none, or an argument that follows from these.
        ImportError: Ray is not installed.

    Example:
        >>> rows = ray.data.read_parquet("prompts.parquet")
        >>> flexmoe.ray.generate(rows, "checkpoints/mixtral", actors=10, num_gpus=1).write_parquet("/shared/out")
    """
    decided = next((name for name in _DECIDED if name in map_batches), None)
    if decided is not None:
        raise UsageError(
            f"{decided} follows from the arguments of generate; leave it out, or call map_batches yourself"
        )
    from ray.data import ActorPoolStrategy

    check_count("batch_size", batch_size)
    calls = math.ceil(check_count("rows_in_flight", rows_in_flight) / batch_size)
    least, most = (actors, actors) if isinstance(actors, int) else actors
    compute = ActorPoolStrategy(
        min_size=check_count("actors", least),
        max_size=check_count("actors", most),
        max_tasks_in_flight_per_actor=calls,
        max_concurrent_calls_per_actor=calls,
    )
    return dataset.repartition(target_num_rows_per_block=batch_size, strict=True).map_batches(
        Generate,
        batch_size=batch_size,
        batch_format="pyarrow",
        fn_constructor_kwargs={"model": model, **(arguments or {})},
        compute=compute,
        **map_batches,
    )
