"""A server of a tiny model for the tests of a folder."""

import pytest

from policies.common import file_io
from tests.support.serving import make_model, options_of, running


@pytest.fixture(scope="package", autouse=True)
def quick_disk_for_servers():
    """Nobody pulls the plug during a test, and waiting for the disk takes most of its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_io.os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def tiny_server_model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def server(tiny_server_model, tmp_path_factory):
    with running(options_of([tiny_server_model], tmp_path_factory.mktemp("server"))) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with server.client() as found:
        yield found
