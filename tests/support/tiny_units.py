"""A handful of weight units in a real safetensors file, for the tests of layout, sources and stream."""

import threading
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

from flexmoe.checkpoint.safetensors import read_tensors
from flexmoe.checkpoint.unit_layout import Part
from flexmoe.weights.recast import Rest
from flexmoe.weights.sources import CheckpointSource
from policies.units import EMBEDDING, UnitId

UNITS = [
    *(UnitId("attention", 0), UnitId("expert", 0, 0), UnitId("expert", 0, 1)),
    *(UnitId("attention", 1), UnitId("expert", 1, 2), UnitId("expert", 1, 3)),
    UnitId("head", 2),
]


def tiny_units(directory, dtype=torch.float32, seed=0):
    """A source, and the tensors of every unit (`UNITS` and an embedding) as they were saved: ``{unit: {role: tensor}}``.

    Attention units are three tensors, one of odd size; experts are slices of packed tensors; the head is one of many rows.
    """
    generator = torch.Generator().manual_seed(seed)

    def new(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = {"packed.up": new(4, 17, 33), "packed.down": new(4, 33, 17), "head": new(301, 33), "embed": new(40, 24)}
    parts = {EMBEDDING: [Part(role="embed", tensor="embed", shape=(40, 24))]}
    expected = {EMBEDDING: {"embed": tensors["embed"]}}
    for unit in UNITS:
        if unit.kind == "attention":
            name = f"a{unit.layer}"
            own = {f"{name}.q": new(65, 33), f"{name}.norm": new(33), f"{name}.o": new(33, 65)}
            tensors |= own
            parts[unit] = [Part(role=n.split(".")[1], tensor=n, shape=tuple(t.shape)) for n, t in own.items()]
            expected[unit] = {n.split(".")[1]: t for n, t in own.items()}
        elif unit.kind == "expert":
            e = unit.first
            up = Part(role="up", tensor="packed.up", shape=(17, 33), first_element=e * 17 * 33)
            down = Part(role="down", tensor="packed.down", shape=(33, 17), first_element=e * 17 * 33)
            parts[unit] = [up, down]
            expected[unit] = {"up": tensors["packed.up"][e], "down": tensors["packed.down"][e]}
        else:
            parts[unit] = [Part(role="head", tensor="head", shape=(301, 33))]
            expected[unit] = {"head": tensors["head"]}
    save_file(tensors, directory / "model.safetensors")
    checkpoint = SimpleNamespace(tensors=read_tensors(directory / "model.safetensors"))
    return CheckpointSource(checkpoint, parts, Rest.of(dtype, dtype)), expected


def within(seconds, work):
    """The result of ``work()``, or its exception; a failure instead of a hang when it takes longer."""
    result = {}

    def run():
        try:
            result["value"] = work()
        except BaseException as e:
            result["error"] = e

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"still waiting after {seconds} s"
    if "error" in result:
        raise result["error"]
    return result["value"]
