"""The peers: transformers' `generate` in memory, and the same model under accelerate's disk offload.

Both are given what they want: left padding with an attention mask, no end-of-sequence check, the experts
implementation that was fastest in this run (never `batched_mm`, which copies the weights per token).
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from scripts.benchmark.probes import Repeater, drop_pages
from scripts.benchmark.worker import serve

EXPERTS = ("eager", "grouped_mm")
PAD = 0


class Peer:
    """A transformers model and what is asked of it."""

    def __init__(self) -> None:
        self._model = None

    def open(self, model: str, dtype: str = "auto", resident_bytes: int | None = None, offload_dir: str = "") -> dict:
        """Load a model; with `resident_bytes`, keep about that much in memory and the other experts on disk."""
        begin = time.perf_counter()
        options: dict = {"dtype": dtype}
        resident = None
        if resident_bytes is not None:
            device_map, resident = _device_map(model, resident_bytes)
            Path(offload_dir).mkdir(parents=True, exist_ok=True)
            options |= {"device_map": device_map, "offload_folder": offload_dir}
        self._model = AutoModelForCausalLM.from_pretrained(model, **options).eval()
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = PAD
        if offload_dir:
            os.sync()  # pages that are still dirty cannot be dropped
        return {"load_s": time.perf_counter() - begin, "resident_bytes": resident}

    def experts(self, implementation: str) -> None:
        """Choose how the experts are computed."""
        self._model.set_experts_implementation(implementation)

    def generate(self, prompts: list, new_tokens: int, tokens: bool = False, drop: list[str] = ()) -> dict:
        """Generate exactly `new_tokens` for a batch.

        Args:
            tokens: also return the generated ids.
            drop: directories whose cached pages are dropped every 400 ms while it runs.
        """
        longest = max(map(len, prompts))
        ids = torch.tensor([[PAD] * (longest - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        dropper = Repeater(lambda: drop_pages(drop), 0.4) if drop else None
        begin = time.perf_counter()
        with torch.inference_mode():
            out = self._model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
        wall_s = time.perf_counter() - begin
        if dropper:
            dropper.stop()
        made = out[:, longest:]
        if made.shape[1] != new_tokens:
            raise ValueError(f"the peer made {made.shape[1]} tokens instead of {new_tokens}")
        return {"wall_s": wall_s, **({"tokens": made.tolist()} if tokens else {})}

    def logits(self, token_ids: list[int], path: str) -> None:
        """Write the logits after every token of one prompt, as float32, to an .npy file."""
        with torch.inference_mode():
            logits = self._model(torch.tensor([token_ids])).logits[0]
        np.save(path, logits.float().numpy())

    def close(self) -> None:
        """Forget the model."""
        self._model = None


def _device_map(model: str, resident_bytes: int) -> tuple[dict[str, str], int]:
    """Everything but the experts in memory, and the experts of as many layers as come nearest to `resident_bytes`.

    A layer's experts are accelerate's smallest unit: it holds them as two packed tensors of one module.
    """
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(model)
        shape = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    layers = config.num_hidden_layers
    experts = [f"model.layers.{layer}.mlp" for layer in range(layers)]
    sizes = dict.fromkeys(experts, 0)
    rest = 0
    for name, parameter in shape.named_parameters():
        module = ".".join(name.split(".")[:4])
        if module in sizes:
            sizes[module] += parameter.nbytes
        else:
            rest += parameter.nbytes
    count = min(layers, max(0, round((resident_bytes - rest) / sizes[experts[0]])))
    spread = {experts[layer * layers // max(1, count)] for layer in range(count)}
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    for layer, name in enumerate(experts):
        for part in ("self_attn", "input_layernorm", "post_attention_layernorm"):
            device_map[f"model.layers.{layer}.{part}"] = "cpu"
        device_map[name] = "cpu" if name in spread else "disk"
    return device_map, rest + count * sizes[experts[0]]


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count())
    peer = Peer()
    serve(
        {
            "open": peer.open,
            "experts": peer.experts,
            "generate": peer.generate,
            "logits": peer.logits,
            "close": peer.close,
        }
    )
