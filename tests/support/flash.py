"""What torch's flash attention for rows of any lengths computes on CUDA, in plain float64 on the CPU."""

import torch
from torch.utils._python_dispatch import _disable_current_modes

from flexmoe.kernels import paged_attention, varlen_attention


class Flash:
    """Takes the place of the operation; counts its calls and refuses what the kernel would refuse or get wrong."""

    def __init__(self):
        self.calls = []

    def __call__(self, q, k, v, q_starts, k_starts, most_q, most_k, dropout, causal, debug, **options):
        assert (dropout, debug) == (0.0, False)
        lengths, scale = options["seqused_k"], options["scale"]
        left, right = options["window_size_left"], options["window_size_right"]
        for index in (q_starts, k_starts, lengths):
            assert index.dtype == torch.int32 and index.is_contiguous() and index.device == q.device
        assert k.dtype == v.dtype == q.dtype and all(x.stride(-1) == 1 for x in (q, k, v))
        assert len(q_starts) == len(k_starts) == len(lengths) + 1 and q_starts[-1] == len(q) and k_starts[-1] == len(k)
        counts = q_starts.diff()
        assert most_q == counts.max() and most_k == lengths.max() and (lengths <= k_starts.diff()).all()
        assert (left is None) == (right is None) and right in (None, 0) and (causal or left is None)
        on_meta = [x.to("meta") for x in (q, k, v, q_starts, k_starts)]
        about = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        shaped = torch.ops.aten._flash_attention_forward(*on_meta, most_q, most_k, dropout, causal, debug, **about)[0]
        assert shaped.shape == q.shape
        self.calls.append((most_q, len(lengths), len(k)))
        with _disable_current_modes():
            out, lse = self._computed(q, k, v, q_starts, k_starts, lengths, scale, left, causal)
        return self._returned(q, k, most_q, out, lse)

    @staticmethod
    def _returned(q, k, most_q, out, sums):
        """The result, with what the kernel allocates beside it."""
        lse, given = torch.empty(q.shape[1], len(q)).copy_(sums), torch.empty_like(q).copy_(out)
        if most_q == 1 and q.shape[1] > k.shape[1]:  # heads that share a KV head become queries of it, and heads again
            kept = [q.clone(), q.clone(), given.clone()]
            del kept
        return given, lse, torch.empty(2), torch.empty(0), torch.empty(0)

    @staticmethod
    def _computed(q, k, v, q_starts, k_starts, lengths, scale, left, causal):
        out, shared = torch.empty_like(q), q.shape[1] // k.shape[1]
        lse = torch.empty(q.shape[1], len(q))
        for row, (a, b) in enumerate(zip(q_starts.tolist(), q_starts[1:].tolist())):
            first, keys = int(k_starts[row]), int(lengths[row])
            own = [x[first : first + keys].double().repeat_interleave(shared, dim=1) for x in (k, v)]
            scores = torch.einsum("qhd,khd->hqk", q[a:b].double(), own[0]) * scale
            # The mask is aligned to the last query and the last key.
            beyond = torch.arange(keys) - (torch.arange(b - a)[:, None] + keys - (b - a))
            hidden = (beyond > 0) & causal
            if left is not None:
                hidden |= beyond < -left
            scores = scores.masked_fill(hidden, -torch.inf)
            lse[:, a:b] = scores.logsumexp(-1)
            out[a:b] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), own[1]).to(q)
        return out, lse


def everywhere(monkeypatch):
    """Every call of attention takes the kernel; returns what counts its calls."""
    monkeypatch.setattr(paged_attention, "choose_kernel", lambda *about: paged_attention.Kernel("varlen", "a test"))
    return pretended(monkeypatch)


def pretended(monkeypatch):
    """The kernel on tensors of the CPU; returns what counts its calls."""
    op = Flash()
    monkeypatch.setattr(varlen_attention, "flash", op)
    return op
