"""Tiny checkpoints whose tensors a test has changed."""

import json
import shutil

from safetensors.torch import load_file, save_file


def edited(tiny, directory, edit):
    """The tied tiny checkpoint, in one file, with a head of its own, after ``edit`` of its tensors."""
    shutil.copytree(tiny("tied").directory, directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return directory


def large(tensors):
    """Sound in float32 and bfloat16, and beyond float16's range."""
    for name in tensors:
        if ".w2." in name:
            tensors[name] *= 1e6


def spoil(directory, name, at, value):
    """Puts ``value`` at a place of a tensor of a checkpoint in one file."""
    tensors = load_file(directory / "model.safetensors")
    tensors[name][at] = value
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
