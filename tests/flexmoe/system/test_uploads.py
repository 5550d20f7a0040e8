"""Small arrays of a sweep go to the device in one copy, from memory that nobody writes to until they are there."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flexmoe.system.device import Device
from flexmoe.system.uploads import Downloads, Uploads
from tests.support.pretend_cuda import PretendCuda

ARRAYS = [
    np.arange(7, dtype=np.int64),
    torch.tensor([[1.5], [2.5]]),
    np.zeros(0, np.int64),
    np.array([[True], [False], [True]]),
    torch.arange(5, dtype=torch.int32),
]


class Copies(TorchDispatchMode):
    """The copies made under it: (source, target)."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default:
            self.made.append((args[1], args[0]))
        return function(*args, **(kwargs or {}))


def inside(tensor, buffers):
    return any(b.data_ptr() <= tensor.data_ptr() < b.data_ptr() + b.nbytes for b in buffers)


@pytest.mark.parametrize("device", [Device("cpu"), PretendCuda()], ids=["cpu", "cuda"])
def test_arrays_arrive_as_they_are(device):
    for expected, got in zip(ARRAYS, Uploads(device)(ARRAYS), strict=True):
        expected = torch.as_tensor(expected)
        assert got.dtype == expected.dtype and torch.equal(got, expected)


def test_all_arrays_of_a_call_leave_pinned_memory_in_one_copy():
    device = PretendCuda()
    uploads = Uploads(device)
    with Copies() as copies:
        uploads(ARRAYS)
    assert sum(inside(source, device.pinned) for source, _ in copies.made) == 1


def test_what_is_under_way_is_not_written_over_until_a_sweep_begins(monkeypatch):
    device = PretendCuda()
    uploads = Uploads(device)
    sources = []
    for size in (10, 1000, 300_000, 5, 1_000_000, 7):
        with Copies() as copies:
            uploads([np.full(size, size)])
        sources += [source for source, _ in copies.made if inside(source, device.pinned)]
    assert [int(s.view(torch.int64)[0]) for s in sources] == [10, 1000, 300_000, 5, 1_000_000, 7]
    waited = []
    monkeypatch.setattr(uploads._copied, "synchronize", lambda: waited.append(True))
    uploads.begin()
    assert waited == [True]
    with Copies() as copies:
        uploads([np.full(3, 3)])
    assert inside(copies.made[-1][0], device.pinned[-1:]), "the largest buffer is used again"


@pytest.mark.parametrize("device", [Device("cpu"), PretendCuda()], ids=["cpu", "cuda"])
def test_what_is_brought_down_arrives_as_it_is_and_is_kept_until_the_next_sweep(device):
    downloads = Downloads(device)
    for _ in range(2):
        sent = [torch.arange(size) + size for size in (3, 0, 40_000, 300_000, 5)]
        arrived = [downloads.bring(tensor) for tensor in sent]
        assert all(torch.equal(get(), tensor) for get, tensor in zip(arrived, sent, strict=True))
        downloads.begin()


def test_downloads_land_in_pinned_memory_and_wait_for_their_own_copy_only(monkeypatch):
    device, waited = PretendCuda(), []
    downloads = Downloads(device)
    events = [SimpleNamespace(synchronize=lambda at=at: waited.append(at)) for at in range(2)]
    recorded = iter(events)
    monkeypatch.setattr(device, "record", lambda stream=None: next(recorded))
    with Copies() as copies:
        first, second = downloads.bring(torch.arange(4)), downloads.bring(torch.arange(6))
    assert [inside(target, device.pinned) for _, target in copies.made] == [True, True] and not waited
    assert torch.equal(second(), torch.arange(6)) and waited == [1]
    assert torch.equal(first(), torch.arange(4)) and waited == [1, 0]


def test_attributes_are_replaced():
    class Owner:
        first, second = torch.arange(3), torch.arange(4)

    owner = Owner()
    Uploads(PretendCuda()).place([(owner, "first"), (owner, "second")])
    assert owner.first is not Owner.first and torch.equal(owner.first, Owner.first)
    assert torch.equal(owner.second, Owner.second)
