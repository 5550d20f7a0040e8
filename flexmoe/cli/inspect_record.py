"""An inspection as JSON values, and what to do next."""

from __future__ import annotations

from collections import Counter
from typing import Any

from cost_model.model.arch import ModelArch
from flexmoe.inspecting.contents import total_bytes
from flexmoe.inspecting.inspection import Inspection

KIND, SCHEMA_VERSION = "flexmoe.inspection", 1


def record(found: Inspection) -> dict[str, Any]:
    """What ``--json`` prints: sizes in bytes, sentences as they are shown."""
    packed = None if found.arch is None or found.arch.packed is None else found.arch.packed.describe()
    return {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "directory": str(found.directory),
        "runs": found.runs,
        "refused": [str(fault) for fault in found.faults],
        "notes": notes(found),
        "next": advice(found),
        "model_type": found.model_type,
        "shape": None if found.arch is None else shape_record(found.arch),
        "weights": {
            "bytes": total_bytes(found.stored),
            "files": found.files,
            "packed": packed,
            "kinds": {
                kind: {
                    "bytes": each.nbytes,
                    "tensors": each.tensors,
                    "dtypes": list(each.dtypes),
                    "packed": each.packed,
                }
                for kind, each in found.stored.items()
            },
        },
        "tokenizer": found.texts.tokenizer,
        "tokenizer_class": found.texts.tokenizer_class,
        "chat_template": found.texts.template,
        "reasoning": found.texts.reasoning,
    }


def shape_record(arch: ModelArch) -> dict[str, Any]:
    """Sizes of a shape. Windows are pairs of a number of tokens (null is all) and how many layers have it."""
    return {
        "layers": arch.num_layers,
        "dense_layers": len(arch.dense_layers),
        "hidden": arch.hidden,
        "experts": arch.num_experts,
        "experts_per_token": arch.top_k,
        "expert_width": arch.ffn,
        "dense_width": arch.dense_ffn or None,
        "heads": arch.num_heads,
        "kv_heads": arch.num_kv_heads,
        "head_size": arch.head_dim,
        "vocabulary": arch.vocab_size,
        "context": arch.max_position,
        "windows": [[window, count] for window, count in _windows(arch).items()],
        "parameters": arch.parameters,
        "active_parameters": arch.active_parameters,
        "kv_bytes_per_token": arch.kv_bytes_per_token(arch.dtype_bytes),
        "int8_kv_bytes_per_token": arch.kv_bytes_per_token(arch.dtype_bytes, compressed=True),
    }


def _windows(arch: ModelArch) -> Counter[int | None]:
    """How many layers look back so far; None is all."""
    return Counter(arch.window_in(layer) for layer in range(arch.num_layers))


def notes(found: Inspection) -> list[str]:
    """What is no reason to refuse, and worth knowing."""
    texts = found.texts
    told = [f"{problem}; prompts of token ids run without it" for problem in texts.problems]
    if texts.tokenizer is not None and texts.template is None:
        told.append("there is no chat template: give one with --chat-template, or prompts instead of messages")
    if found.stopped:
        files = "a file" if found.stopped == 1 else f"{found.stopped} files"
        told.append(f"a download has begun {files} and not finished: it runs still, or was stopped")
    if found.arch is not None and found.arch.packed is not None and found.runs and not found.scales_read:
        told.append("the scales of packed matrices have not been read, as a run does; --scales reads them")
    return told


def advice(found: Inspection) -> list[str]:
    """What to run next: commands, or a sentence."""
    if found.stopped:
        return ["run the same download again: it resumes"]
    if not found.runs:
        return ["see above what each reason asks for, then inspect it again"]
    commands = [f"python -m flexmoe.run --model {found.directory} -i requests.jsonl -o out.jsonl --dry-run"]
    if found.arch is not None and found.arch.packed is None:
        commands.append(f"python -m flexmoe.quantize {found.directory} OUT --format int4")
    return commands
