"""The methods on two pretrained models -> results/pretrained.{json,md}, pretrained*.png.

    python -m analysis.pretrained_results                     # hub ids; hours on two CPU cores
    python -m analysis.pretrained_results --models FOLDER --gsm8k TRAIN.jsonl TEST.jsonl --parts em

A part that is finished is read and not repeated. FOLDER holds the models by name, without owner.
"""
import argparse
import json
import math
import pathlib
from types import SimpleNamespace

import torch

from analysis import experiment as ex
from common.data import encode_prompt, load_problems
from common.flags import BOXED
from common.internal_policy import block_streams, boundary_layer, entropy
from common.models import causal_lm, load_model, load_tokenizer
from common.sampling import join, sample
from long_cot_sft import ask_teacher

QWEN = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
SMOL = "HuggingFaceTB/SmolLM2-135M-Instruct"
BASE = ex.ROOT / "runs" / "analysis" / "pretrained"
STYLES = {
    "long": ("Please reason step by step in words. When you are done, check the result by "
             "computing it again, and put your final answer within \\boxed{}.", 2),
    "short": ("Multiply first, then add and subtract from the left. Write one line per step and "
              "no other words, then the result in a box. Example: Compute 12+3*4-5.\n3*4=12\n"
              "12+12=24\n24-5=19\n\\boxed{19}", 8),
}
PROBLEMS = 160
TOKENS = 256  # pooled in a look inside


def frozen(name: str, dtype: str = "bfloat16"):
    """A model for looking at and asking."""
    args = SimpleNamespace(model=name, device="cpu", dtype=dtype, lora_rank=0)
    return load_model(args, trained=False)


@torch.no_grad()
def inside(name: str, problems: list[dict]) -> dict:
    """What every block says over answer tokens of the model's own: means, lists of L.

    -> "policy" H^l E^T as in the paper, "normed" through the final norm, "one size" with every
    state scaled to the size of a final one; "change" by the FFN, "change x 4", "change / 4" with
    the whole stream scaled, which no reader in the model would see; "rms" of H^l.
    """
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(name)
    prompts = [encode_prompt(tokenizer, row["problem"], BOXED) for row in problems]
    rollout = sample(frozen(name), tokenizer, prompts, 1, 160, seed=0)
    ids, predicts = join(rollout.prompts, rollout.tokens, rollout.lengths)      # (B, S) each
    order = torch.randperm(int(predicts.sum()), generator=torch.Generator().manual_seed(0))
    predicts[predicts.clone()] = order < TOKENS
    model = frozen(name, "float32")
    lm = causal_lm(model)
    final = lm.model(ids, use_cache=False).last_hidden_state[predicts]          # (N, D)
    size = final.pow(2).mean().sqrt()
    blocks = []

    def nats(x):
        pieces = [entropy(lm.lm_head(piece)) for piece in x.split(64)]
        return torch.cat(pieces).mean().item()

    def visit(streams):
        H, F = streams["layer_out"], streams["ffn_out"]                         # (N, D) each
        rms = H.pow(2).mean(-1, keepdim=True).sqrt()                            # (N, 1)
        read = nats(streams["ffn_in"])
        blocks.append({
            "policy": nats(H), "normed": nats(lm.model.norm(H)), "one size": nats(H / rms * size),
            "change": nats(F) - read, "change x 4": nats(4 * F) - read,
            "change / 4": nats(F / 4) - read, "rms": rms.mean().item()})

    block_streams(model, ids, None, predicts, visit)
    found = {key: [block[key] for block in blocks] for key in blocks[0]}
    last = nats(final)
    return {**found, "model": last, "tokens": len(final), "answers": len(prompts),
            "final rms": size.item(), "ln V": math.log(len(lm.lm_head.weight))}


def ask(teacher: str, style: str) -> list[dict]:
    """The teacher's verified answers to the arithmetic problems, 32 problems at a time."""
    path = BASE / f"traces-{style}.jsonl"
    rows = ex.read_lines(path)
    problems = load_problems("arithmetic")[len(rows):PROBLEMS]
    if not problems:
        return rows
    torch.set_num_threads(1)
    model, tokenizer = frozen(teacher), load_tokenizer(teacher)
    system, samples = STYLES[style]
    how = SimpleNamespace(samples=samples, teacher_max_new_tokens=192, teacher_temperature=0.7,
                          teacher_top_p=0.95, keep="verified")
    path.parent.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(problems), 32):
        found = ask_teacher(model, tokenizer, problems[start:start + 32], system, len(rows), how)
        rows += found
        with open(path, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)
    return rows
