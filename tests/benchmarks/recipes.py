"""What fits where? The memory plan for Qwen3's sizes on cards that need not be there: shapes alone, no weights.

    python tests/benchmarks/recipes.py

A rollout is 128 answers of at most 2,048 tokens (and 200 of prompt), training takes 16,384 tokens at once; of 24 GB cards 2,048. The
cache gets three quarters of what weights and optimiser leave free, as in common/models.py; fewer rows at once is what that changes.
"""
import pathlib
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
import common.models  # noqa: E402

SHAPES = {  # hidden, inner, blocks, heads, embedding tied
    "Qwen3-0.6B": (1024, 3072, 28, 16, True), "Qwen3-1.7B": (2048, 6144, 28, 16, True), "Qwen3-4B": (2560, 9728, 36, 32, True),
    "Qwen3-8B": (4096, 12288, 36, 32, False), "Qwen3-32B": (5120, 25600, 64, 64, False)}
CASES = [("Qwen3-0.6B", 24, 1, 0, False), ("Qwen3-4B", 24, 1, 32, False), ("Qwen3-1.7B", 24, 1, 0, True), ("Qwen3-4B", 80, 1, 0, False),
         ("Qwen3-8B", 80, 1, 32, False), ("Qwen3-8B", 80, 1, 0, True), ("Qwen3-4B", 80, 8, 0, False), ("Qwen3-8B", 80, 8, 0, False),
         ("Qwen3-32B", 80, 8, 32, False), ("Qwen3-32B", 80, 64, 0, False)]


def plan(name: str, card: int, ranks: int, rank: int, offload: bool, answers: int = 0) -> tuple[dict, int]:
    """-> the plan in GiB for one card, and how many of its answers (default: 128 over 8 cards or fewer) are decoded at once."""
    hidden, inner, blocks, heads, tied = SHAPES[name]
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(vocab_size=151936, hidden_size=hidden, intermediate_size=inner, head_dim=128,
                                             num_hidden_layers=blocks, num_attention_heads=heads, num_key_value_heads=8,
                                             tie_word_embeddings=tied)).to(torch.bfloat16)
        if rank:
            model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    common.models.size = lambda: ranks
    common.models.causal_lm(model).narrow = torch.bfloat16
    rows, tokens, budget = answers or 128 // min(ranks, 8), 2248, 16384 if card > 40 else 2048
    at = lambda r: common.models.memory_plan(model, rows, tokens, budget, r, 0, offload)
    held = sum(gib for part, gib in at(1).items() if part not in ("gradients", "cache and logits while sampling", "activations",
                                                                  "logits chunk", "peak"))
    row = at(1)["cache and logits while sampling"]
    at_once = max(1, min(rows, int((0.99 * card - held) * common.models.SHARE / row)))
    return at(at_once), at_once


def main():
    print("| model | trained | cards | weights | optimiser | sampling (answers at once) | training | peak a card, GiB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, card, ranks, rank, offload in CASES:
        gib, at_once = plan(name, card, ranks, rank, offload)
        held = sum(gib.get(part, 0) for part in ("float32 masters", "gradients", "Adam moments"))
        what = (f"adapters of rank {rank}" if rank else "all") + ", optimiser offloaded" * offload
        fits = "" if gib["peak"] < 0.97 * card else ": does not fit"
        print(f"| {name} | {what} | {ranks} x {card} GB | {gib['weights']:.1f} | {held:.1f} | "
              f"{gib['cache and logits while sampling']:.1f} ({at_once}) | {gib['activations'] + gib['logits chunk']:.1f} | "
              f"{gib['peak']:.1f}{fits} |")


if __name__ == "__main__":
    main()
