"""A tiny checkpoint in float32, and what one run makes of rows."""

import pytest
import torch

from scripts.checkpoints.shapes import SIZES
from scripts.make_checkpoint import make_checkpoint

#: Of every engine here: no row of more than 2,048 tokens has room.
OPTIONS = {"policy": None, "device": "cpu", "longest_row": 64, "kv_tokens": 2048}


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", SIZES["tiny"], dtype=torch.float32)


@pytest.fixture(scope="package")
def options(tmp_path_factory):
    """Arguments of every engine."""
    return {**OPTIONS, "offload_dir": str(tmp_path_factory.mktemp("offload"))}
