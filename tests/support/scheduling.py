"""A scheduler with a KV cache of one number per token and no model."""

import torch

from flexmoe.engine.scheduler import Row, Scheduler
from flexmoe.kv.cache import KVCache, KVShape
from flexmoe.params import EngineRequest, SamplingParams
from flexmoe.system.device import Device
from policies import Policy
from policies.placement import TIERS

GPU_KV, CPU_KV, DISK_KV = (100, 0, 100, 0, 100, 0), (100, 0, 0, 100, 100, 0), (100, 0, 0, 0, 100, 0)
MIXED_KV = (100, 0, 30, 40, 100, 0)


class Simulation:
    """Runs a scheduler to the end; every row generates up to `ends[row]` tokens (default: its limit)."""

    def __init__(self, policy, pages, *, tails=0, expected_end=None, tmp_path=None, groups=()):
        shape = KVShape(
            layers=sum(len(g.layers) for g in groups) or 1, kv_heads=1, head_dim=1, dtype=torch.float32, groups=groups
        )
        self.cache = KVCache(Device("cpu"), shape, pages, tails, tmp_path)
        self.scheduler = Scheduler(policy, self.cache, expected_end)
        self.policy, self.ends = policy, {}
        self.sweeps, self.done = [], []

    def submit(self, prompt, gen, ends=None):
        request = EngineRequest(
            request_id=str(len(self.ends)), prompt_token_ids=tuple([1] * prompt), params=SamplingParams(max_tokens=gen)
        )
        row = Row(request, [1] * prompt, prompt + gen)
        self.ends[row] = ends or gen
        self.scheduler.waiting.append(row)
        return row

    def used(self, tier):
        return self.cache.total(tier) - self.cache.free(tier)

    def sweep(self):
        """One sweep; returns its runs."""
        scheduler = self.scheduler
        runs = scheduler.plan_sweep()
        self.compute(runs, scheduler.take_copies())
        assert runs or not (scheduler.running or scheduler.waiting), "rows wait although nothing is in flight"
        prompt = sum(scheduler.commit(run.owner, 2 if run.logits else None) for run in runs)
        ended = [run.owner for run in runs if run.logits and run.owner.generated >= self.ends[run.owner]]
        held = {tier: self.used(tier) for tier in TIERS}
        self.sweeps.append({"runs": runs, "rows": len(runs), "prompt": prompt, "held": held, "ended": ended})
        for row in ended:
            scheduler.finish(row)
            self.done.append(row)
        scheduler.end_sweep()
        return runs

    def compute(self, runs, copies):
        """What a sweep does to the pages."""

    def run(self, most=20_000):
        while (self.scheduler.running or self.scheduler.waiting) and len(self.sweeps) < most:
            self.sweep()
        assert not self.scheduler.running and not self.scheduler.waiting
        assert all(self.used(tier) == 0 for tier in TIERS) and self.cache.free_tails == self.cache.tails
        return self


def policy(percent=GPU_KV, rows=8, prompt_len=32, gen_len=16, **rest):
    return Policy.from_percent(
        percent, gpu_batch_size=rows, num_gpu_batches=1, prompt_len=prompt_len, gen_len=gen_len, **rest
    )


def pages(gpu=0, cpu=0, disk=0):
    return {"gpu": gpu, "cpu": cpu, "disk": disk}
