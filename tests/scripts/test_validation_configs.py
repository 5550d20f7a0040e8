"""The configurations that predictions are held against: every class of the device, the same for the same seed."""

from collections import Counter
from types import SimpleNamespace

import pytest

from cost_model import Hardware, ModelArch
from cost_model.timing.evaluate import evaluate
from scripts.gpu.context import TINY, reduced_model
from scripts.make_checkpoint import SIZES
from scripts.validation.configs import CLASSES, classify, draw

LANES = dict.fromkeys(("disk_read", "disk_write", "h2d", "d2h", "gpu", "cpu"), 0.0)


@pytest.fixture(scope="module")
def archs(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        name: ModelArch.from_dir(reduced_model(root / name, changes))
        for name, changes in {"deep": SIZES["bench"], "wide": {"num_hidden_layers": 4}}.items()
    }


@pytest.mark.parametrize(
    "device, lanes, bound",
    [
        ("cpu", {"disk_read": 2.0, "disk_write": 2.0, "gpu": 1.0, "cpu": 1.0}, "disk"),
        ("cpu", {"disk_read": 1.0, "gpu": 1.0, "cpu": 1.0}, "compute"),
        ("cpu", {"disk_read": 1.5, "gpu": 1.0, "h2d": 9.0}, "balanced"),
        ("cuda", {"disk_read": 2.0, "h2d": 1.0, "gpu": 1.0}, "disk"),
        ("cuda", {"disk_read": 0.5, "h2d": 2.0, "gpu": 1.0, "cpu": 1.0}, "link"),
        ("cuda", {"d2h": 1.0, "h2d": 1.0, "gpu": 2.0, "cpu": 1.0}, "compute"),
        ("cuda", {"h2d": 1.0, "gpu": 1.0, "cpu": 1.0}, "balanced"),
    ],
)
def test_class_is_what_takes_longest_by_far(device, lanes, bound):
    assert classify(SimpleNamespace(lanes_s=LANES | lanes), device) == bound


@pytest.mark.parametrize("machine", ["h200", "cpu"])
def test_draw_fills_every_class_of_the_device_within_the_seconds(archs, machine):
    hardware = Hardware.preset(machine)
    found = draw(archs, hardware, 1, 2, seconds=(1.0, 10.0), turns=3000)
    assert Counter(c.kind for c in found) == dict.fromkeys(CLASSES[hardware.device], 2)
    for c in found:
        prediction = evaluate(archs[c.model], hardware, c.workload, c.policy)
        assert 1.0 <= prediction.wall_s <= 10.0 and classify(prediction, hardware.device) == c.kind
    assert len({c.name for c in found}) == len(found) and {c.model for c in found} == set(archs)
    assert draw(archs, hardware, 1, 2, seconds=(1.0, 10.0), turns=3000) == found
    assert draw(archs, hardware, 2, 2, seconds=(1.0, 10.0), turns=3000) != found


def test_draw_gives_up_on_a_class_that_the_machine_does_not_show(tmp_path):
    tiny = {"tiny": ModelArch.from_dir(reduced_model(tmp_path / "tiny", TINY))}
    assert draw(tiny, Hardware.preset("h200"), 1, 1, seconds=(1e5, 1e6), turns=20) == []
