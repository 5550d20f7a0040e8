"""Hidden states go home and come back equal, whatever the tier."""

import threading

import pytest
import torch

from flexmoe.engine.hidden_states import Activations
from flexmoe.system.device import Device
from flexmoe.system.trace import Recorder

WIDTH, MOST = 24, 50  # 4800 bytes: no whole number of pages


@pytest.fixture
def kept(tmp_path):
    before = set(threading.enumerate())
    activations = Activations(
        Device("cpu"), Recorder(), ("gpu", "cpu", "disk", "disk", "cpu"), MOST, WIDTH, torch.float32, tmp_path
    )
    yield activations
    activations.close()
    assert set(threading.enumerate()) == before
    assert list(tmp_path.iterdir()) == [], "a killed run would leave the file behind"


@pytest.mark.parametrize("tokens", [1, 42, 43, MOST])
def test_hidden_states_come_back_equal_over_several_layers(kept, tokens):
    generator = torch.Generator().manual_seed(tokens)
    for _ in range(3):
        states = {j: torch.randn(tokens, WIDTH, generator=generator) for j in range(1, 5)}
        for j, h_TD in states.items():
            kept.put(j, h_TD.clone())
            kept.store(j)
        for j, h_TD in states.items():
            kept.load(j).result()
            assert torch.equal(kept[j], h_TD)


@pytest.mark.parametrize("batch, at_once", [(1, True), (2, False)])
def test_who_computes_on_the_cpu_moves_them_but_to_and_from_disk(kept, monkeypatch, batch, at_once):
    threads = []
    for work in ("_store", "_load"):
        real = getattr(Activations, work)
        monkeypatch.setattr(
            Activations, work, lambda *args, real=real: (threads.append(threading.current_thread()), real(*args))[1]
        )
    kept.put(batch, torch.zeros(3, WIDTH))
    kept.store(batch)
    kept.load(batch).result()
    assert [thread is threading.current_thread() for thread in threads] == [at_once] * 2


def test_what_went_home_is_no_longer_on_the_device(kept):
    kept.put(1, torch.zeros(3, WIDTH))
    kept.store(1).result()
    with pytest.raises(KeyError):
        kept[1]


def test_largest_batch_still_bypasses_the_page_cache(kept):
    direct = kept.disk.file.direct
    kept.put(2, torch.ones(MOST, WIDTH))
    kept.store(2).result()
    kept.load(2).result()
    assert kept.disk.file.direct == direct
