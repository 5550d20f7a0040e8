"""Tiny random checkpoints, and what transformers generates from them."""

from __future__ import annotations

import os
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, MixtralForCausalLM, PreTrainedModel
from transformers.models.phimoe.modeling_phimoe import PhimoeForCausalLM

from tests.support.kept import kept

BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}
GEN_LEN = 12
PROMPT_LENGTHS = (1, 5, 17, 64, 300, 33, 2, 120, 15, 16, 31, 80, 9, 48, 3, 150)
LONGEST_ROW = max(PROMPT_LENGTHS) + GEN_LEN
#: A difference from transformers is excused only where its own margin at that token is below this.
MARGIN = 1e-5
#: Families whose routers choose by softmax alone, and Phimoe.
_SOFTMAX_ROUTERS = ("mixtral", "phimoe", "qwen3_moe", "qwen2_moe", "olmoe")


def _favour_two_experts(model: MixtralForCausalLM) -> None:
    """Hidden dimension 0 is the same for every token, read by the routers alone, and two experts of each love it."""
    model.model.embed_tokens.weight[:, 0] = 0.5
    model.lm_head.weight[:, 0] = 0
    for layer in model.model.layers:
        attention, experts = layer.self_attn, layer.mlp.experts
        for reads in (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight, experts.gate_up_proj):
            reads[..., 0] = 0
        attention.o_proj.weight[0] = 0
        experts.down_proj[:, 0] = 0
        layer.mlp.gate.weight[:, 0] = torch.tensor([20.0, 0.0, 10.0, 0.0])


@dataclass(frozen=True)
class Recipe:
    """``config`` replaces values of the family's base; ``save`` goes to `save_pretrained`; ``edit`` changes the weights."""

    config: dict
    save: dict
    edit: object = None
    family: str = "mixtral"
    base: dict = field(default_factory=lambda: BASE)


SHARDED = {"max_shard_size": "200KB"}
PACKED = {"save_original_format": False}
RECIPES = {
    "gqa-4-to-1": Recipe({"num_key_value_heads": 1}, SHARDED),
    "gqa-8-to-2": Recipe({"num_attention_heads": 8}, PACKED),
    "wide-heads": Recipe({"head_dim": 24, "num_hidden_layers": 2}, {}),
    "window": Recipe({"sliding_window": 24}, SHARDED | PACKED),
    "tied": Recipe({"tie_word_embeddings": True}, {}),
    "skewed": Recipe({}, SHARDED, _favour_two_experts),
    "all-experts": Recipe({"num_experts_per_tok": 4}, PACKED),
    "odd": Recipe(
        {
            "hidden_size": 48,
            "intermediate_size": 40,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "num_local_experts": 5,
            "num_experts_per_tok": 1,
            "vocab_size": 307,
        },
        PACKED,
    ),
}


@dataclass(frozen=True)
class Variant:
    """A checkpoint, its transformers model, and the greedy ids of `prompts` (EOS ignored)."""

    directory: Path
    model: PreTrainedModel
    prompts: list[list[int]]
    greedy: list[list[int]]
    eos_ids: tuple[int, int]

    def expected(self, row: int, gen_len: int = GEN_LEN, *, eos: bool = False) -> list[int]:
        """Greedy ids of a row, cut after the first EOS where EOS counts."""
        ids = self.greedy[row][:gen_len]
        ends = [i for i, t in enumerate(ids) if t in self.eos_ids] if eos else []
        return ids[: ends[0] + 1] if ends else ids


def make(
    recipe: Recipe, directory: Path, lengths: tuple[int, ...] = PROMPT_LENGTHS, known: Path | None = None
) -> Variant:
    """Makes the checkpoint.

    Args:
        known: a file of the greedy ids, which take longest; written if it is not there yet.
    """
    torch.manual_seed(7)
    # Copied: transformers adds the rotated share of a head to the dictionary that it is given.
    config = AutoConfig.for_model(recipe.family, **deepcopy(recipe.base | recipe.config))
    # Its grouped experts refuse matrices whose rows are no multiple of 16 bytes.
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").float().eval()
    with torch.no_grad():
        if recipe.edit is not None:
            recipe.edit(model)
    generator = torch.Generator().manual_seed(1)
    vocab = model.config.vocab_size
    prompts = [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in lengths]
    greedy = kept(known, lambda: [transformers_greedy(model, p, eos_token_id=None) for p in prompts])
    # Ids that do occur, some tokens into two rows: several rows then stop early, and others do not.
    eos_ids = (greedy[1][4], greedy[7 % len(greedy)][7])
    model.generation_config.eos_token_id = list(eos_ids)
    model.save_pretrained(directory, **recipe.save)
    return Variant(directory, model, prompts, greedy, eos_ids)


@torch.no_grad()
def transformers_greedy(model, prompt: list[int], *, eos_token_id, max_new_tokens: int = GEN_LEN, **more) -> list[int]:
    ids = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=eos_token_id,
        pad_token_id=0,
        **more,
        use_cache=_keeps_what_is_seen(model),
    )
    return ids[0, len(prompt) :].tolist()


def _keeps_what_is_seen(model) -> bool:
    """Whether transformers' cache gives what it gives without: Phimoe's keeps keys turned by the factors of shorter rows, and
    one of a window of 1 keeps all tokens."""
    return not isinstance(model, PhimoeForCausalLM) and getattr(model.config, "sliding_window", None) != 1


@torch.no_grad()
def margins(model, ids: list[int]) -> tuple[float, float]:
    """Transformers' gaps at the token that follows ``ids``: between its two best logits, and the smallest one of its
    routers, between the last expert chosen and the first one left out; infinite where that is not known."""
    asked = {"output_router_logits": True} if model.config.model_type in _SOFTMAX_ROUTERS else {}
    out = model(torch.tensor([ids]), **asked)
    best, second = out.logits[0, -1].float().topk(2).values.tolist()
    return best - second, router_margin(model, [layer[-1] for layer in out.router_logits]) if asked else float("inf")


def router_margin(model, logits: list[torch.Tensor]) -> float:
    """The smallest of the routers' gaps at one token, given the logits ``[E]`` of each layer."""
    return float(router_margins(model, [logits_E[None] for logits_E in logits]))


def router_margins(model, logits: list[torch.Tensor]) -> torch.Tensor:
    """The smallest of the routers' gaps at each token, ``[T]``, given the logits ``[T, E]`` of each layer."""
    gaps = _sparsemixer_gaps if isinstance(model, PhimoeForCausalLM) else _top_k_gaps
    return torch.stack([gaps(logits_TE.float(), model.config) for logits_TE in logits]).amin(0)


def _top_k_gaps(logits_TE: torch.Tensor, config) -> torch.Tensor:
    """Between the probabilities of the last expert chosen and the first one left out."""
    k = config.num_experts_per_tok
    best = logits_TE.softmax(-1).topk(min(k + 1, logits_TE.shape[1])).values
    return best[:, k - 1] - best[:, k] if best.shape[1] > k else torch.full((len(best),), float("inf"))


def _sparsemixer_gaps(logits_TE: torch.Tensor, config) -> torch.Tensor:
    """Between the first three scores, and between any score and the bound below which it takes no part in a weight."""
    scores, gaps = logits_TE.sort(descending=True).values, []
    for chosen in (0, 1):
        best, others = scores[:, chosen : chosen + 1], scores[:, chosen + 1 :]
        gaps.append(best[:, 0] - others[:, 0])
        distance = (best - others) / others.abs().maximum(best)
        gaps.append((distance - 2 * config.router_jitter_noise).abs().amin(1))
    return torch.stack(gaps).amin(0)


def assert_greedy(variant: Variant, row: int, got: list[int], want: list[int], margin: float = MARGIN) -> None:
    """The ids are those of transformers, up to a token at which transformers itself is undecided; that is printed."""
    if got == want:
        return
    at = next((i for i, (a, b) in enumerate(zip(got, want)) if a != b), min(len(got), len(want)))
    logit_gap, router_gap = margins(variant.model, variant.prompts[row] + variant.greedy[row][:at])
    told = f"row {row} token {at}: got {got}, want {want}; transformers' margins: logits {logit_gap:.2e}, router {router_gap:.2e}"
    assert at < min(len(got), len(want)) and min(logit_gap, router_gap) < margin, told
    print("excused:", told)


def offload(tmp_path: Path) -> dict:
    """Options of an `LLM` that every test here wants."""
    return {"device": "cpu", "offload_dir": os.fspath(tmp_path / "offload"), "longest_row": LONGEST_ROW}
