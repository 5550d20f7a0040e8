"""What a server may be asked to be."""

from pathlib import Path

import pytest

from flexmoe.batch.options import RunOptions
from flexmoe.cli.serve import KEY_VARIABLE, parser, server_options
from flexmoe.errors import UsageError
from flexmoe.serving.settings import ServerOptions, is_loopback

RUN = RunOptions(model="m")


def read(*flags):
    return server_options(parser().parse_args(["--models", "/m/one", "/m/two", *flags]))


def test_flags_become_options_of_server_run_and_limits(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    options = read(
        "--port", "0", "--max-rows", "7", "--max-upload", "0.5", "--gpu-mem", "3", "--checkpoint-interval", "2"
    )
    assert options.limits.rows == 7 and options.limits.upload_bytes == 1 << 29 and options.api_key is None
    run = options.run_options(Path("/m/two"))
    assert (run.gpu_mem, run.model, run.checkpoint_interval_s) == (3.0, "/m/two", 2.0)


def test_the_key_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "a-long-secret")
    assert read("--host", "0.0.0.0").api_key == "a-long-secret"
    assert read("--api-key", "another-one").api_key == "another-one"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org"])
def test_a_host_that_others_reach_needs_a_key(host):
    with pytest.raises(UsageError, match="give a key"):
        ServerOptions(models=(Path("m"),), run=RUN, host=host)
    assert not ServerOptions(models=(Path("m"),), run=RUN, host=host, api_key="12345678").is_loopback


@pytest.mark.parametrize("key", ["short", "ä" * 10, "with\nbreak" * 2])
def test_a_key_that_no_header_carries_or_anybody_guesses_is_refused(key):
    with pytest.raises(UsageError, match="8 printable"):
        ServerOptions(models=(Path("m"),), run=RUN, api_key=key)


def test_two_models_of_one_name_and_none_are_refused():
    with pytest.raises(UsageError, match="called 'm'"):
        ServerOptions(models=(Path("/a/m"), Path("/b/m")), run=RUN)
    with pytest.raises(UsageError, match="no model"):
        ServerOptions(models=(), run=RUN)


def test_names_and_addresses_of_loopback():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]")))
    assert not any(map(is_loopback, ("", "0.0.0.0", "localhost.example.org", "127.0.0.1.nip.io")))
