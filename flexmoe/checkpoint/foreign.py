"""What a directory is that is no checkpoint which can be read: other programs' formats, adapters, half a download."""

from collections.abc import Sequence
from pathlib import Path

from flexmoe.checkpoint.files import INCOMPLETE
from flexmoe.checkpoint.shards import INDEX_FILE, SINGLE_FILE


def no_config_sentence(root: Path, names: Sequence[str]) -> str:
    """Why a directory of these names, in order, has no `config.json`."""
    if "adapter_config.json" in names:
        return (
            f"{str(root)!r} is an adapter (adapter_config.json), which needs its base model: merge the two with peft's "
            f"merge_and_unload, save the result with save_pretrained, and give that directory"
        )
    if "snapshots" in names and "refs" in names:
        return f"{str(root)!r} is a folder of the hub's cache: give the directory below {str(root / 'snapshots')!r}"
    foreign = _foreign(root, names)
    return foreign or f"{str(root)!r} has no config.json, so it is not a checkpoint or {INCOMPLETE}"


def no_weights_sentence(root: Path, names: Sequence[str]) -> str:
    """Why a directory of these names has neither a file of weights nor an index."""
    foreign = _foreign(root, names)
    if foreign is not None:
        return foreign
    if any(name.endswith(".safetensors") for name in names):
        return f"{str(root)!r} has safetensors shards but no {INDEX_FILE}, so {INCOMPLETE}"
    return f"{str(root)!r} has neither {SINGLE_FILE} nor {INDEX_FILE}, so {INCOMPLETE}"


def _foreign(root: Path, names: Sequence[str]) -> str | None:
    """That the weights are in a format which is not read; None where they are not."""
    safetensors = [name for name in names if name.endswith(".safetensors")]
    if safetensors and all(name.startswith("consolidated") for name in safetensors):
        return (
            f"{str(root)!r} has its weights under their publisher's names ({safetensors[0]}), which are not read: "
            f"download the files of transformers (model*.safetensors)"
        )
    if safetensors:
        return None
    if any(name.endswith(".gguf") for name in names):
        return (
            f"{str(root)!r} has its weights only as GGUF (.gguf), which is not read: download the model's safetensors, "
            f"in 16 bits or packed"
        )
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return (
            f"{str(root)!r} has its weights only as pickles (.bin, .pt), which are never loaded because they can run "
            f"code: convert to safetensors with save_pretrained, or download the safetensors files"
        )
    return None
