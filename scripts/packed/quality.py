"""What packed weights and the packed KV cache cost in quality: the perplexity of a real model in every format, beside bf16.

    python -m scripts.packed.quality --out benchmarks/quality.json      # some 25 minutes, and a download of 98 MB

The model is SmolLM2-135M-Instruct, a mixture of 8 experts by `scripts.upcycle`. Its weights were Q4_1 (4 bits, groups of 32 with a
scale and an offset) before, so it was no 16-bit model, and is small: larger ones lose less. Its 576 inputs are no multiple of
128, so groups have 64, 192 and 32 inputs. The text is what Python's own `pydoc` says of the language, which nothing is calibrated
on. FlexMoE scores it as prompts with log-probabilities. Of each format the scores are kept in the work directory: a run that was
stopped resumes, and measures only what is not there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexmoe.llm import LLM
from flexmoe.params import SamplingParams
from flexmoe.quantizing.quantize import quantize
from policies.common import file_io
from scripts.benchmark.probes import machine, versions
from scripts.benchmark.record import Figure, Record, figure_table
from scripts.checkpoints.smollm2 import PACKAGE, smollm2_gguf
from scripts.upcycle import upcycle

_PLAIN, _DENSE = "bf16", "transformers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What is measured.

    Args:
        format, group: as `quantize` takes them; no format: bf16.
        most: largest loss against bf16, in percent; None: no target.
        options: of `LLM`.
    """

    format: str = ""
    group: int | None = None
    most: float | None = None
    options: tuple[tuple[str, object], ...] = ()


FORMS = {
    _PLAIN: Form(),
    "int4, groups of 64": Form(format="int4", group=64, most=4.0),
    "int8, groups of 64": Form(format="int8", group=64, most=0.3),
    "fp8, an output": Form(format="fp8", most=0.5),
    "mxfp4": Form(format="mxfp4"),
    "int8 KV cache": Form(most=0.3, options=(("compress_cache", True),)),
    "int4, groups of 32": Form(format="int4", group=32),
    "int4, groups of 192": Form(format="int4", group=192),
}


def main(argv: list[str]) -> int:
    """Measure; the exit code is 1 where a format loses more than its target."""
    args = _parser().parse_args(argv)
    begin, text = time.perf_counter(), args.text.read_text(encoding="utf-8") if args.text else python_manual()
    args.work.mkdir(parents=True, exist_ok=True)
    plain, dense = (_upcycled(args.work / name, experts) for name, experts in (("mixture", 8), ("dense", 0)))
    rows = windows(AutoTokenizer.from_pretrained(plain)(text)["input_ids"], args.tokens, args.window)
    scores = Scores(args.work / "scores.json", rows)
    for name, form in FORMS.items():
        loss = scores.of(
            name, lambda form=form: flexmoe_loss(_packed(plain, args.work, form), rows, **dict(form.options))
        )
        print(f"{name}: perplexity {math.exp(loss):.3f}", flush=True)
    scores.of(_DENSE, lambda: transformers_loss(dense, rows))
    figures = figures_of(scores.losses)
    print("\n".join(figure_table(figures)))
    if args.out:
        about = {"machine": machine(), "versions": versions(), "model": _about(text, rows, args.text)}
        about["command"] = shlex.join(["python", "-m", "scripts.packed.quality", *argv])
        Record(args.out, about).add("quality", figures, {"loss": scores.losses}, time.perf_counter() - begin)
    return 1 if any(figure.met is False for figure in figures) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.packed.quality", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=Path("build/quality"), help="checkpoints and scores, 4 GB (default: %(default)s)"
    )
    parser.add_argument("--text", type=Path, help="another text, as UTF-8 (default: pydoc's topics)")
    parser.add_argument("--tokens", type=int, default=20480, help="least tokens of it (default: %(default)s)")
    parser.add_argument("--window", type=int, default=1024, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON record; a table is written beside it")
    return parser


def python_manual() -> str:
    """The chapters of Python's manual that the interpreter has for `help()`."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def windows(ids: Sequence[int], tokens: int, window: int) -> list[list[int]]:
    """Prompts that are spread evenly over a text and do not overlap, of so many tokens in all or a little more."""
    count = -(-tokens // (window - 1))
    step = len(ids) // count
    if step < window:
        raise SystemExit(f"the text has {len(ids)} tokens, which are not enough for {count} prompts of {window}")
    return [list(ids[at * step : at * step + window]) for at in range(count)]


class Scores:
    """Mean losses by name, kept in a file; those of other prompts are forgotten."""

    def __init__(self, path: Path, rows: Sequence[Sequence[int]]) -> None:
        self._path, self._of = path, hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        found = json.loads(path.read_text()) if path.exists() else {}
        self.losses: dict[str, float] = found["losses"] if found.get("of") == self._of else {}

    def of(self, name: str, measure: Callable[[], float]) -> float:
        """The loss of that name, measured if it is not known."""
        if name not in self.losses:
            self.losses[name] = measure()
            text = json.dumps({"of": self._of, "losses": self.losses}, indent=1)
            file_io.write_file(self._path, [text.encode()])
        return self.losses[name]


def _upcycled(path: Path, experts: int) -> Path:
    if not (path / "config.json").exists():
        upcycle(smollm2_gguf(), path, experts=experts)
    return path


def _packed(plain: Path, work: Path, form: Form) -> Path:
    if not form.format:
        return plain
    path = work / f"{form.format}-{'' if form.group is None else form.group}".rstrip("-")
    if not path.exists():
        quantize(plain, path, form.format, form.group)
    return path


def flexmoe_loss(checkpoint: Path, rows: Sequence[Sequence[int]], **options: object) -> float:
    """Mean negative log-probability of the tokens after the first of each row, computed by FlexMoE in bf16."""
    with LLM(checkpoint, policy=None, dtype="bfloat16", **options) as llm:
        outputs = llm.generate([list(row) for row in rows], SamplingParams(max_tokens=0, prompt_logprobs=0))
    scored = [entry.logprob for output in outputs for entry in (output.prompt_logprobs or ())[1:] if entry]
    return -math.fsum(scored) / len(scored)


@torch.inference_mode()
def transformers_loss(checkpoint: Path, rows: Sequence[Sequence[int]]) -> float:
    """The same by transformers."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    losses = []
    for row in rows:
        ids = torch.tensor([row])
        losses.append(torch.nn.functional.cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:]).item())
    return math.fsum(losses) / len(losses)


def figures_of(losses: dict[str, float]) -> list[Figure]:
    """A line for each format: its perplexity, and that divided by bf16's."""
    plain, dense = math.exp(losses[_PLAIN]), math.exp(losses[_DENSE])
    found = [
        Figure(
            what=f"perplexity of {_PLAIN}",
            value=f"{plain:.3f}",
            beside=f"transformers, the dense model: {dense:.3f}",
            ratio=plain / dense,
        )
    ]
    for name, form in FORMS.items():
        if name != _PLAIN:
            ratio = math.exp(losses[name]) / plain
            found.append(
                Figure(
                    what=f"perplexity of {name}",
                    value=f"{plain * ratio:.3f}, {100 * (ratio - 1):+.2f} %",
                    beside=f"{_PLAIN}: {plain:.3f}",
                    ratio=round(ratio, 4),
                    target=None if form.most is None else 1 + form.most / 100,
                    at_most=True,
                )
            )
    return found


def _about(text: str, rows: Sequence[Sequence[int]], path: Path | None) -> str:
    source = f"{path.name}" if path else f"pydoc's topics of Python {sys.version.split()[0]}"
    return (
        f"SmolLM2-135M-Instruct of {PACKAGE} (Q4_1 in groups of 32 before), upcycled to 8 experts, top 2; "
        f"{sum(len(row) - 1 for row in rows)} tokens of {source} (SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:12]}) in "
        f"{len(rows)} prompts; nothing is calibrated"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
