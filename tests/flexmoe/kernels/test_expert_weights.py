"""The products of experts are the same in every form in which a checkpoint makes their weights lie."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from flexmoe.checkpoint.safetensors import TensorInfo
from flexmoe.checkpoint.unit_layout import Part, tensors_of, unit_layout, views
from flexmoe.kernels.expert_weights import ExpertWeights
from flexmoe.kernels.native import library as native

EXPERTS, WIDTH, HIDDEN = 3, 4, 8
SIZE = WIDTH * HIDDEN
#: Gate, up and down of each expert in the order of the file, and how many tensors each role is when it is read.
FORMS = {
    "one stack": (["g0", "u0", "g1", "u1", "g2", "u2", "d0", "d1", "d2"], (1, 1)),
    "a tensor for each expert": (["g0", "u0", "d0", "g1", "u1", "d1", "g2", "u2", "d2"], (3, 3)),
    "gate and up apart": (["g0", "d0", "u0", "g1", "d1", "u1", "g2", "d2", "u2"], (6, 3)),
    "apart, and down stacked": (["u0", "g0", "u1", "g1", "g2", "u2", "d0", "d1", "d2"], (6, 1)),
}


def tokens_of(count):
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=FORMS)
def unit(request):
    """Tensors of a unit as they were read, and gate, up and down of its experts."""
    order, counts = FORMS[request.param]
    matrices = 0.2 * torch.randn(len(order), SIZE, generator=torch.Generator().manual_seed(0))
    found = {name: matrices[at] for at, name in enumerate(order)}
    infos = {
        name: TensorInfo(
            name=name, path=Path("f"), offset=at * SIZE * 4, nbytes=SIZE * 4, dtype=torch.float32, shape=(SIZE,)
        )
        for at, name in enumerate(order)
    }
    both, down = (EXPERTS, 2 * WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)
    parts = []
    for e in range(EXPERTS):
        for half, name in enumerate((f"g{e}", f"u{e}")):
            parts.append(Part(role="gate_up", tensor=name, shape=(WIDTH, HIDDEN), of=both, into=(2 * e + half) * SIZE))
        parts.append(Part(role="down", tensor=f"d{e}", shape=(HIDDEN, WIDTH), of=down, into=e * SIZE))
    layout = unit_layout(parts, infos)
    buffer = torch.zeros(layout.host_bytes, dtype=torch.uint8)
    buffer[: matrices.nbytes] = matrices.view(-1).view(torch.uint8)
    tensors = views(buffer, layout.host)
    read = (tensors_of(tensors, role) for role in ("gate_up", "down"))
    assert tuple(1 if isinstance(t, torch.Tensor) else len(t) for t in read) == counts
    shaped = {"g": (WIDTH, HIDDEN), "u": (WIDTH, HIDDEN), "d": (HIDDEN, WIDTH)}
    return tensors, [[found[f"{kind}{e}"].view(shape) for kind, shape in shaped.items()] for e in range(EXPERTS)]


def test_products_of_one_expert_are_those_of_its_matrices(unit):
    tensors, experts = unit
    weights, x_nD = ExpertWeights.of(tensors), tokens_of(5)
    for number, (gate, up, down) in enumerate(experts):
        own = weights.expert(number)
        got_gate, got_up = own.gate_up(x_nD)
        torch.testing.assert_close(got_gate, F.linear(x_nD, gate))
        torch.testing.assert_close(got_up, F.linear(x_nD, up))
        torch.testing.assert_close(own.down(got_up), F.linear(got_up, down))


@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
def test_grouped_products_are_those_of_each_expert_over_its_own_tokens(unit):
    tensors, experts = unit
    weights, x_nD = ExpertWeights.of(tensors), tokens_of(7)
    assert weights.can_group()
    own = weights.grouped(torch.tensor([2, 2, 7], dtype=torch.int32))
    got_gate, got_up = own.gate_up(x_nD)
    for (gate, up, down), tokens in zip(experts, (slice(0, 2), slice(2, 2), slice(2, 7))):
        torch.testing.assert_close(got_gate[tokens], F.linear(x_nD[tokens], gate))
        torch.testing.assert_close(got_up[tokens], F.linear(x_nD[tokens], up))
        torch.testing.assert_close(own.down(got_up)[tokens], F.linear(got_up[tokens], down))
