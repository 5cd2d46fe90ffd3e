"""Is the memory plan right on a GPU? Real shapes and the real code on a pretended one (tests/card.py), every tensor counted.

    python tests/benchmarks/card_memory.py                      # eight cases, two minutes on two cores; nothing is computed

Two steps of GRPO or PPO as the scripts make them, each of three phases: answers are sampled, as many at once as common/models.py lets;
log-probs and backward, a micro-batch after the other; the update. Counted is what torch.cuda.max_memory_allocated() would say, but
for what kernels take for themselves. The second step is reported: in the first there are no moments yet.
"""
import argparse
import contextlib
import io
import pathlib
import sys
import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

sys.path[:0] = [str(pathlib.Path(__file__).parents[2]), str(pathlib.Path(__file__).parents[1])]
from card import Card  # noqa: E402
from recipes import SHAPES  # noqa: E402

from common.logprobs import response_logprobs  # noqa: E402
from common.models import TINY, causal_lm, load_tokenizer, max_rows_for, memory_plan  # noqa: E402
from common.optim import MasterAdamW  # noqa: E402
from common.sampling import Rollout, sample  # noqa: E402
from ppo import Critic, logp_and_values  # noqa: E402

CASES = {  # name: (model, GiB of the card, rank of adapters, offload, tokens trained at once[, PPO's critic and reference])
    "Qwen3-0.6B": ("Qwen3-0.6B", 24, 0, False, 2048), "Qwen3-4B, adapters": ("Qwen3-4B", 24, 32, False, 2048),
    "Qwen3-1.7B, optimiser offloaded": ("Qwen3-1.7B", 24, 0, True, 2048), "Qwen3-4B": ("Qwen3-4B", 80, 0, False, 16384),
    "Qwen3-8B, adapters": ("Qwen3-8B", 80, 32, False, 16384), "Qwen3-8B, optimiser offloaded": ("Qwen3-8B", 80, 0, True, 16384),
    "PPO (critic, reference), Qwen3-1.7B": ("Qwen3-1.7B", 80, 0, False, 16384, True), "PPO, Qwen3-4B, adapters": ("Qwen3-4B", 80, 32, False, 16384, True)}
ANSWERS, PROMPT, NEW = 128, 200, 2048


def build(name: str, rank: int):
    hidden, inner, blocks, heads, tied = SHAPES[name]
    with torch.device("card"):
        config = Qwen3Config(vocab_size=151936, hidden_size=hidden, intermediate_size=inner, head_dim=128, num_hidden_layers=blocks,
                             num_attention_heads=heads, num_key_value_heads=8, tie_word_embeddings=tied, eos_token_id=None,
                             bos_token_id=None)
        model = Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="grouped_sdpa")
    if rank:
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"), autocast_adapter_dtype=False)
    enable = getattr(causal_lm(model), "activation_checkpointing_enable", None) or causal_lm(model).gradient_checkpointing_enable
    enable({"use_reentrant": False})
    return model.train()


def measure(name: str, gib: int, rank: int, offload: bool, budget: int, ppo: bool = False) -> tuple[dict, list[float], int]:
    """-> the plan, GiB at the peak of sampling, of training, of the update, and how many answers are sampled at once."""
    with Card(int(0.99 * gib * 2**30), shapes=True) as card:
        model, tokenizer = build(name, rank), load_tokenizer(str(TINY))
        optimizers = [MasterAdamW(model, 1e-6, offload=offload)]
        with contextlib.redirect_stdout(io.StringIO()):
            plan = memory_plan(model, ANSWERS, PROMPT + NEW, budget, None, ppo and not rank, offload, ppo)
        if ppo:
            _reference = None if rank else build(name, 0).requires_grad_(False)
            critic = Critic(model.config.hidden_size, causal_lm(build(name, rank)).model).to("card").train()
            optimizers.append(MasterAdamW(critic, 1e-6, offload=offload))
        ones = torch.ones(ANSWERS, NEW, device="card")
        rollout = Rollout([[5] * PROMPT] * ANSWERS, ones.long(), torch.full((ANSWERS,), NEW, device="card"), ones, ones, ones,
                          ones[:, 0].bool(), [""] * ANSWERS)
        for _ in range(2):
            peaks, rows = [], min(ANSWERS, max_rows_for(causal_lm(model), PROMPT + NEW))
            card.peak = card.held
            sample(model, tokenizer, [[5] * (PROMPT + NEW - 8)], rows, 8, max_rows=rows)  # the cache of an answer's last eight tokens
            peaks.append(card.peak / 2**30)
            card.peak = card.held
            for m in torch.arange(2 * max(1, budget // (PROMPT + NEW)), device="card").chunk(2):
                logp, other = logp_and_values(model, critic, rollout[m]) if ppo else response_logprobs(model, rollout[m])
                optimizers[0].backward((logp.sum() + ppo * other.sum()) / 1e6)
            peaks.append(card.peak / 2**30)
            card.peak = card.held
            for optimizer in optimizers:
                optimizer.step()
            peaks.append(card.peak / 2**30)
    return plan, peaks, rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")
    print("| model | card | answers at once | sampling, GiB | training | update | peak counted | planned | planned / counted |")
    print("| --- " * 9 + "|")
    for case in args.cases:
        plan, peaks, rows = measure(*CASES[case])
        print(f"| {case} | {CASES[case][1]} GB | {rows} | " + " | ".join(f"{peak:.1f}" for peak in peaks) +
              f" | {max(peaks):.1f} | {plan['peak']:.1f} | {plan['peak'] / max(peaks):.2f} |", flush=True)


if __name__ == "__main__":
    main()
