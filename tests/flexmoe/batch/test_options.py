"""The options of a run are checked when they are made, whoever makes them; flags become options and nothing else."""

from dataclasses import fields
from pathlib import Path

import pytest

from cost_model.planner.constraints import Fixed
from flexmoe.batch.options import RunOptions
from flexmoe.cli.running.arguments import parser, read_command
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
        ({"half_blocks": 3}, "half_blocks is 3; choose 1, 2"),
        ({"policy": POLICY, "half_blocks": 2}, "policy already says what half_blocks would"),
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
        ({"policy": "auto", "overlap": False, "percent": [100, 0] * 3}, "already says what percent would"),
        ({"policy": POLICY, "overlap": False, "percent": [100, 0] * 3}, "what percent, overlap would"),
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


@pytest.mark.parametrize(
    "given, plans",
    [
        ({}, True),
        ({"policy": "auto", "schedule": "static"}, True),
        ({"gpu_batch_size": 4}, True),
        ({"percent": [100, 0] * 3}, False),
        ({"policy": POLICY}, False),
        ({"policy": "p.json"}, False),
    ],
)
def test_the_planner_decides_unless_a_policy_or_percents_are_given(given, plans):
    assert RunOptions(model="m", **given).plans_itself == plans


def test_the_planner_keeps_to_what_options_fix():
    given = {"gpu_batch_size": 4, "schedule": "static", "overlap": False}
    assert RunOptions(model="m", **given).fixed == Fixed(**given)
    assert RunOptions(model="m", cpu_cache_compute=True).fixed == Fixed(cpu_attention_percent=100)
    assert RunOptions(model="m").fixed == Fixed()


def test_flags_become_options_and_no_flag_means_the_options_default():
    benchmark = read_command(["--model", "m", "--num-prompts", "4"])
    assert (benchmark.options, benchmark.benchmark.num_prompts) == (RunOptions(model="m"), 4)
    flags = ["-i", "in.jsonl", "-o", "out.jsonl", "--shard", "1/4", "--overwrite", "--overlap", "false", "--seed", "7"]
    command = read_command(["--model", "m", *flags, "--checkpoint-interval", "5", "--dry-run"])
    wanted = RunOptions(**FILES, shard="1/4", overwrite=True, overlap=False, seed=7, checkpoint_interval_s=5.0)
    assert (command.options, command.benchmark, command.dry_run) == (wanted, None, True)


def test_every_option_is_a_flag():
    flags = set(vars(parser().parse_args(["--model", "m"])))
    assert {each.name for each in fields(RunOptions)} <= flags
