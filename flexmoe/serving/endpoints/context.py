"""What the endpoints share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from flexmoe.serving.settings import ServerOptions
from flexmoe.serving.store.batches import BatchStore
from flexmoe.serving.store.files import FileStore
from flexmoe.serving.work.completion_codec import CompletionCodec
from flexmoe.serving.work.engine_thread import EngineThread
from flexmoe.serving.work.lifecycle import Lifecycle
from flexmoe.serving.work.models import ServedModels
from flexmoe.serving.work.stats import EngineStats
from flexmoe.serving.work.work_queue import WorkQueue


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """The parts of a server."""

    options: ServerOptions
    models: ServedModels
    files: FileStore
    batches: BatchStore
    work_queue: WorkQueue
    lifecycle: Lifecycle
    engine: EngineThread
    stats: EngineStats
    codec: CompletionCodec


def context_of(request: Request) -> Context:
    """Of the server that a request came to."""
    context: Context = request.app.state.context
    return context


async def _context(request: Request) -> Context:
    """As `context_of`; FastAPI would hand a plain function to another thread, which costs more than most requests do."""
    return context_of(request)


Served = Annotated[Context, Depends(_context)]
