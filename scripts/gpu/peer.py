"""The peer on the GPU: transformers with accelerate's CPU offload, on the same dummy weights as FlexMoE; a worker of `bench_gpu`.

accelerate keeps whole decoder layers on the GPU as far as it is told, and brings the others there for every forward pass.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import dispatch_model, infer_auto_device_map
from transformers import AutoConfig, AutoModelForCausalLM

from cost_model.model.weight_units import head_rows, units_of
from flexmoe.checkpoint.unit_layout import views
from flexmoe.models.loader import Model, load_model
from flexmoe.system.device import Device
from flexmoe.system.direct_io import DiskPool
from flexmoe.system.trace import Recorder
from scripts.benchmark.worker import serve

PAD = 0
ATTENTION = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
    "router": "mlp.gate",
}


class Peer:
    """A transformers model on a capped GPU."""

    def __init__(self) -> None:
        self._model, self._device = None, None

    def open(self, model: str, device: str, gpu_bytes: int, spare_bytes: int, offload_dir: str) -> dict:
        """Make the model with FlexMoE's dummy weights, and let accelerate place it.

        Args:
            model: a directory with a `config.json`.
            gpu_bytes: cap of the process on the GPU.
            spare_bytes: of the cap, what accelerate leaves to KV cache and activations.
        """
        begin = time.perf_counter()
        self._device = Device(device)
        self._device.cap_memory(gpu_bytes)
        config = AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        network = network.to_empty(device="cpu").eval()
        network.model.rotary_emb = type(network.model.rotary_emb)(config=config)  # its buffers are in no checkpoint
        _fill(network, load_model(model, "dummy"), Path(offload_dir))
        network.generation_config.eos_token_id = None
        network.generation_config.pad_token_id = PAD
        placed = {"": "cpu"}
        if self._device.is_cuda:
            memory = {self._device.torch.index: self._device.room(gpu_bytes) - spare_bytes, "cpu": 1 << 40}
            placed = infer_auto_device_map(
                network, max_memory=memory, no_split_module_classes=network._no_split_modules, dtype=torch.bfloat16
            )
            network = dispatch_model(network, device_map=placed)
        self._model = network
        on_gpu = sum(1 for where in placed.values() if where != "cpu")
        return {"load_s": time.perf_counter() - begin, "modules_on_gpu": on_gpu, "modules": len(placed)}

    def experts(self, implementation: str) -> None:
        """Choose how the experts are computed."""
        self._model.set_experts_implementation(implementation)

    def generate(self, rows: int, prompt_len: int, new_tokens: int) -> dict:
        """Generate exactly `new_tokens` for a batch of equal rows; `wall_s` is None, and `error` says why, where it cannot."""
        generator = torch.Generator().manual_seed(rows)
        ids = torch.randint(3, self._model.config.vocab_size, (rows, prompt_len), generator=generator)
        ids = ids.to(self._device.torch)
        begin = time.perf_counter()
        try:
            with torch.inference_mode():
                out = self._model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
                )
            made = out[:, prompt_len:].tolist()
        except RuntimeError as error:  # out of memory, or an implementation that does not run here
            return {"wall_s": None, "error": str(error).splitlines()[0]}
        wall_s = time.perf_counter() - begin
        if any(len(row) != new_tokens for row in made):
            raise ValueError(f"the peer did not make {new_tokens} tokens per row")
        return {"wall_s": wall_s}

    def logits(self, token_ids: list[int], path: str) -> None:
        """Write the logits after every token of one prompt, as float32, to an .npy file."""
        with torch.inference_mode():
            logits = self._model(torch.tensor([token_ids], device=self._device.torch)).logits[0]
        np.save(path, logits.float().cpu().numpy())


def _fill(network: torch.nn.Module, model: Model, offload_dir: Path) -> None:
    """Copy the numbers that FlexMoE gives a dummy model of this name into the network."""
    source, pool, arch = model.source(offload_dir), DiskPool(Recorder(), threads=1), model.arch
    parameters = dict(network.named_parameters())
    with torch.no_grad():
        for unit in units_of(arch):
            layout = source.layout(unit.id)
            buffer = torch.zeros(layout.host_bytes, dtype=torch.uint8)
            source.read(unit.id, buffer, pool).wait()
            for role, values in views(buffer, layout.host).items():
                _target(parameters, unit, role, arch).copy_(values)
    pool.close()


def _target(parameters: dict[str, torch.Tensor], unit, role: str, arch) -> torch.Tensor:
    """Where a part of a unit goes: transformers 5 holds the experts of a layer packed, gate before up."""
    at = f"model.layers.{unit.layer}."
    if unit.kind == "embed":
        return parameters["model.embed_tokens.weight"]
    if unit.kind == "attention":
        return parameters[f"{at}{ATTENTION[role]}.weight"]
    if unit.kind == "head":
        first, last = head_rows(arch, unit.id.first)
        return parameters["model.norm.weight"] if role == "norm" else parameters["lm_head.weight"][first:last]
    experts = unit.id.experts
    return parameters[f"{at}mlp.experts.{role}_proj"][experts.start : experts.stop]


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    peer = Peer()
    serve({"open": peer.open, "experts": peer.experts, "generate": peer.generate, "logits": peer.logits})
