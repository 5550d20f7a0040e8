"""The options of a run are checked when they are made, whoever makes them; flags become options and nothing else."""

from dataclasses import fields
from pathlib import Path

import pytest

from flexmoe.batch.options import RunOptions
from flexmoe.cli.arguments import parser, read_command
from flexmoe.errors import UsageError
from flexmoe.job.shards import Shard
from policies.policy import Policy

FILES = {"model": "m", "input_file": "in.jsonl", "output_file": "out.jsonl"}
POLICY = Policy.from_percent((100, 0, 100, 0, 100, 0), gpu_batch_size=4, num_gpu_batches=1, prompt_len=9, gen_len=4)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"output_file": None}, "give both"),
        ({"schedule": "lockstep"}, "schedule is 'lockstep'; choose rolling, static"),
        ({"reserve": "p50"}, "reserve is 'p50'"),
        ({"expert_cache": "fifo"}, "expert_cache"),
        ({"load_format": "pt"}, "pt"),
        ({"gpu_batch_size": 0}, "gpu_batch_size is 0"),
        ({"gen_len": 1.5}, "gen_len"),
        ({"shard": "3/2"}, "shard is 3/2"),
        ({"checkpoint_interval_s": -1}, "checkpoint_interval"),
        ({"on_invalid": "skip"}, "on_invalid"),
        ({"prompt_column": "a", "prompt_template": "{a}"}, "exclude each other"),
        ({"prompt_template": "none"}, "no column"),
        ({"policy": POLICY, "cpu_cache_compute": True}, "policy already says what cpu_cache_compute would"),
        ({"policy": "auto", "overlap": False, "percent": [100, 0] * 3}, "percent, overlap"),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_sentence(given, words):
    with pytest.raises(UsageError, match=words):
        RunOptions(**FILES | given)


def test_paths_and_shards_may_be_text():
    options = RunOptions(**FILES, shard="1/4", policy="p.json", trace="t.json")
    assert (options.input_file, options.trace, options.policy_file) == tuple(
        map(Path, ("in.jsonl", "t.json", "p.json"))
    )
    assert options.shard == Shard(index=1, count=4)
    assert options.job_files().outputs()[0].name == "out.shard-1-of-4.jsonl"
    assert RunOptions(model="m", percent=[100, 0] * 3).percent == (100, 0) * 3
    assert RunOptions(model="m", policy="auto").plans_itself and not RunOptions(model="m", policy=POLICY).plans_itself


def test_flags_become_options_and_no_flag_means_the_options_default():
    assert read_command(["--model", "m"]).options == RunOptions(model="m")
    flags = ["-i", "in.jsonl", "-o", "out.jsonl", "--shard", "1/4", "--overwrite", "--overlap", "false", "--seed", "7"]
    command = read_command(["--model", "m", *flags, "--checkpoint-interval", "5", "--dry-run"])
    wanted = RunOptions(**FILES, shard="1/4", overwrite=True, overlap=False, seed=7, checkpoint_interval_s=5.0)
    assert (command.options, command.benchmark, command.dry_run) == (wanted, None, True)


def test_every_option_is_a_flag():
    flags = set(vars(parser().parse_args(["--model", "m"])))
    assert {each.name for each in fields(RunOptions)} <= flags
