"""Counts the memory that torch's operations of a thread allocate, as an allocator without waste would."""

import weakref
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Allocations(TorchDispatchMode):
    """Bytes of the storages that operations have made, and are alive.

    Attributes:
        live, peak: now, and the most at a time.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._holders, self._sizes, self._known = Counter(), {}, set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {
            self._address(x) for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)
        }
        result = operation(*args, **kwargs)
        for made in torch.utils._pytree.tree_leaves(result):
            if isinstance(made, torch.Tensor):
                self._hold(made, given)
        self.peak = max(self.peak, self.live)
        return result

    def _hold(self, tensor, given):
        address = self._address(tensor)
        if address not in self._sizes and address in given:
            return  # a view of what no operation has made, like memory that was mapped
        if id(tensor) in self._known:
            return
        if address not in self._sizes:
            self._sizes[address] = tensor.untyped_storage().nbytes()
            self.live += self._sizes[address]
        self._holders[address] += 1
        self._known.add(id(tensor))
        weakref.finalize(tensor, self._drop, id(tensor), address)

    def _drop(self, number, address):
        self._known.discard(number)
        self._holders[address] -= 1
        if not self._holders[address]:
            del self._holders[address]
            self.live -= self._sizes.pop(address)

    @staticmethod
    def _address(tensor):
        return tensor.untyped_storage().data_ptr() if tensor.device.type != "meta" else -id(tensor)
