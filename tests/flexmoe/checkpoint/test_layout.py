"""How a unit's bytes lie: what touches in the file is read as one, every region begins on a page."""

from pathlib import Path

import torch

from flexmoe.checkpoint.safetensors import TensorInfo
from flexmoe.checkpoint.unit_layout import DEVICE_ALIGNMENT, Part, pack, unit_layout, views
from policies.common.memory_units import SYSTEM_PAGE_BYTES as PAGE_BYTES


def table(*entries):
    """Tensors from (name, path, offset, dtype, shape)."""
    result = {}
    for name, path, offset, dtype, shape in entries:
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        result[name] = TensorInfo(name=name, path=Path(path), offset=offset, nbytes=nbytes, dtype=dtype, shape=shape)
    return result


def part(name, shape, first_element=0):
    return Part(role=name, tensor=name, shape=shape, first_element=first_element)


F32, BF16 = torch.float32, torch.bfloat16


def test_tensors_that_touch_become_one_extent_whatever_the_order_of_the_parts():
    tensors = table(("x", "f", 5000, F32, (10, 10)), ("y", "f", 5400, F32, (50,)), ("z", "f", 5600, F32, (4, 4)))
    layout = unit_layout([part("z", (4, 4)), part("x", (10, 10)), part("y", (50,))], tensors)
    (extent,) = layout.extents
    assert (extent.path, extent.offset, extent.length) == ("f", 4096, 4096)
    assert extent.needed == 5664 - 4096
    assert {r: p.offset for r, p in layout.host.items()} == {"x": 904, "y": 1304, "z": 1504}
    assert layout.host_bytes == PAGE_BYTES
    assert layout.stored_bytes == 4 * (100 + 50 + 16)


def test_gap_or_another_file_starts_a_new_page_aligned_region():
    tensors = table(("x", "f", 100, F32, (10,)), ("y", "f", 144, F32, (10,)), ("z", "g", 184, F32, (10,)))
    layout = unit_layout([part(n, (10,)) for n in "xyz"], tensors)
    assert [(e.path, e.offset, e.buffer_offset) for e in layout.extents] == [
        ("f", 0, 0),
        ("f", 0, 4096),
        ("g", 0, 8192),
    ]
    assert [e.needed for e in layout.extents] == [140, 184, 224]
    assert layout.host_bytes == 3 * PAGE_BYTES


def test_extents_cover_their_tensors_and_are_page_aligned():
    for offset in (0, 2, 4094, 4096, 12286):
        for count in (1, 2047, 2048, 2049, 9000):
            layout = unit_layout([part("x", (count,))], table(("x", "f", offset, BF16, (count,))))
            (extent,) = layout.extents
            assert extent.offset % PAGE_BYTES == extent.length % PAGE_BYTES == extent.buffer_offset % PAGE_BYTES == 0
            assert extent.offset + layout.host["x"].offset == offset
            assert extent.offset + extent.needed == offset + 2 * count
            assert 0 < extent.needed <= extent.length < extent.needed + PAGE_BYTES


def test_packed_experts_are_slices_and_neighbouring_slices_merge():
    tensors = table(("packed", "f", 64, BF16, (3, 8, 5)))
    gate = Part(role="gate", tensor="packed", shape=(4, 5), first_element=2 * 20)
    up = Part(role="up", tensor="packed", shape=(4, 5), first_element=3 * 20)
    layout = unit_layout([gate, up], tensors)
    assert len(layout.extents) == 1
    assert layout.host["gate"].offset == 64 + 2 * 20 * 2
    assert layout.host["up"].offset == 64 + 3 * 20 * 2
    raw = torch.zeros(PAGE_BYTES, dtype=torch.uint8)
    numbers = torch.arange(120).to(BF16)
    raw[64 : 64 + 240] = numbers.view(torch.uint8)
    tensors = views(raw, layout.host)
    assert torch.equal(tensors["gate"], numbers.view(3, 2, 4, 5)[1, 0])
    assert torch.equal(tensors["up"], numbers.view(3, 2, 4, 5)[1, 1])


def test_device_tensors_lie_at_256_byte_boundaries_without_overlap():
    places, size = pack({"a": (F32, (3,)), "b": (BF16, (129,)), "c": (F32, (64,)), "d": (BF16, (1,))})
    assert [p.offset for p in places.values()] == [0, 256, 768, 1024]
    assert size == 1280
    assert all(p.offset % DEVICE_ALIGNMENT == 0 for p in places.values())


def test_copies_carry_every_tensor_from_the_host_layout_to_the_device_layout():
    tensors = table(("x", "f", 40, F32, (10, 3)), ("y", "f", 160, BF16, (7,)), ("z", "g", 4090, BF16, (5,)))
    layout = unit_layout([part("x", (10, 3)), part("y", (7,)), part("z", (5,))], tensors)
    host = torch.randint(0, 100, (layout.host_bytes,), dtype=torch.uint8)
    device = torch.zeros(layout.device_bytes, dtype=torch.uint8)
    for source, target, size in layout.copies:
        device[target : target + size] = host[source : source + size]
    here, there = views(host, layout.host), views(device, layout.device)
    assert set(here) == set(there) == {"x", "y", "z"}
    for role, tensor in here.items():
        assert tensor.dtype == there[role].dtype and tensor.shape == there[role].shape
        assert torch.equal(tensor.contiguous().view(torch.uint8), there[role].contiguous().view(torch.uint8))
    assert sum(size for _, _, size in layout.copies) == layout.stored_bytes


def expert_parts(*order):
    """Two experts of ``gate`` and ``up``, at the places in the file that ``order`` gives them."""
    of, size = (2, 4, 8), 4 * 8 // 2
    names = ("gate0", "up0", "gate1", "up1")
    tensors = table(*((name, "f", 4 * size * order[i], F32, (2, 8)) for i, name in enumerate(names)))
    parts = [Part(role="gate_up", tensor=name, shape=(2, 8), of=of, into=i * size) for i, name in enumerate(names)]
    return unit_layout(parts, tensors)


def test_parts_that_lie_in_order_are_one_tensor_on_the_host_too():
    layout = expert_parts(1, 2, 3, 4)
    assert list(layout.host) == list(layout.device) == ["gate_up"]
    assert layout.host["gate_up"].shape == layout.device["gate_up"].shape == (2, 4, 8)
    assert len(layout.copies) == len(layout.extents) == 1


def test_parts_of_which_only_those_of_an_expert_lie_together_are_a_tensor_for_each_expert():
    layout = expert_parts(5, 6, 1, 2)
    assert {role: place.shape for role, place in layout.host.items()} == {"gate_up.0": (4, 8), "gate_up.1": (4, 8)}
    assert list(expert_parts(5, 6, 2, 1).host) == [f"gate_up.{i}" for i in range(4)], "not of every expert"
    host = torch.randint(0, 100, (layout.host_bytes,), dtype=torch.uint8)
    device = torch.zeros(layout.device_bytes, dtype=torch.uint8)
    for source, target, size in layout.copies:
        device[target : target + size] = host[source : source + size]
    whole, pieces = views(device, layout.device)["gate_up"], views(host, layout.host)
    for number in range(2):
        assert torch.equal(whole[number].view(torch.int32), pieces[f"gate_up.{number}"].view(torch.int32))


def test_parts_that_do_not_are_a_tensor_each_on_the_host_and_one_on_the_device():
    layout = expert_parts(4, 2, 9, 1)
    assert list(layout.host) == ["gate_up.0", "gate_up.1", "gate_up.2", "gate_up.3"]
    host = torch.randint(0, 100, (layout.host_bytes,), dtype=torch.uint8)
    device = torch.zeros(layout.device_bytes, dtype=torch.uint8)
    for source, target, size in layout.copies:
        device[target : target + size] = host[source : source + size]
    whole, pieces = views(device, layout.device)["gate_up"], views(host, layout.host)
    assert torch.equal(
        whole.view(torch.int32), torch.cat([pieces[f"gate_up.{i}"] for i in range(4)]).view(2, 4, 8).view(torch.int32)
    )
