"""One card at Qwen3-4B's shapes, random weights: is it right, how fast, how much memory.

    python tests/benchmarks/gpu.py                # one 80 GB card, about 6 minutes; prints Markdown
    python tests/benchmarks/gpu.py --toy          # the same code anywhere; numbers without meaning

Rows are printed as they come, the most valuable first, and appended to $OUT/gpu.md if OUT is set.
The floor of decoding is the time to read weights and cache once per token at the measured copy
rate; training's is 8 FLOPs per weight and token (6, and 2 for blocks that are computed twice) at
the measured rate of a matrix product.
"""
import argparse
import datetime
import gc
import os
import pathlib
import subprocess
import sys
import time
from types import SimpleNamespace

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from common.logprobs import micro_batches, response_logprobs  # noqa: E402
from common.models import load_tokenizer, memory_estimate  # noqa: E402
from common.sampling import sample  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BIG = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
       "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151_936}
SMALL = {"hidden_size": 320, "intermediate_size": 512, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048}
PROMPT = list(range(5, 69))


def say(line: str) -> None:
    print(line, flush=True)
    if os.environ.get("OUT"):
        with open(pathlib.Path(os.environ["OUT"]) / "gpu.md", "a", encoding="utf-8") as file:
            file.write(line + "\n")


def build(shape: dict, stored, compute, device=DEVICE):
    """A random Qwen3 that never stops by itself."""
    torch.manual_seed(0)
    config = Qwen3Config(**shape, head_dim=128, tie_word_embeddings=True, eos_token_id=None,
                         bos_token_id=None, pad_token_id=0, max_position_embeddings=8192)
    with torch.device(device):
        model = Qwen3ForCausalLM._from_config(config, dtype=stored)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.compute_dtype = compute
    return model.eval()


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(work) -> float:
    """Of one call, the card waited for."""
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def free() -> None:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else float("nan")


def rates(size: int) -> tuple[float, float]:
    """Measured FLOP/s of a bfloat16 product, bytes/s of a copy (read plus written)."""
    a = torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16)
    product = min(seconds(lambda: a @ a) for _ in range(5))
    block = torch.empty(size * size * 4, device=DEVICE, dtype=torch.uint8)
    copy = min(seconds(block.clone) for _ in range(5))
    return 2 * size**3 / product, 2 * block.numel() / copy


def correct(tokenizer) -> None:
    """Log-probs on the card against the CPU's, and the sampler's against the trainer's."""
    on_cpu = build(SMALL, torch.float32, torch.float32, "cpu")
    rollout = sample(on_cpu, tokenizer, [PROMPT, PROMPT[:9]], 4, 64, seed=1)
    expected = response_logprobs(on_cpu, rollout).detach()
    for compute in (torch.float32, torch.bfloat16):
        model = build(SMALL, torch.float32, compute, "cpu").to(DEVICE)
        moved = SimpleNamespace(prompts=rollout.prompts, tokens=rollout.tokens.to(DEVICE),
                                lengths=rollout.lengths.to(DEVICE), mask=rollout.mask.to(DEVICE))
        logp = response_logprobs(model, moved).detach().cpu()
        own = sample(model, tokenizer, [PROMPT, PROMPT[:9]], 4, 64, seed=1)
        entropy = own.entropy[:, 0].cpu() - rollout.entropy[:, 0]  # before answers part
        again = response_logprobs(model, own).detach()
        say(f"| correct, {compute} | card minus CPU {(logp - expected).abs().max():.2g} nats, "
            f"first entropies {entropy.abs().max():.2g}, sampler minus trainer "
            f"{(own.logp - again).abs().max():.2g} nats |")


def embedded(steps: str) -> None:
    """The scripts as they are."""
    for script in ("bupo.py", "grpo.py"):
        command = [sys.executable, script, "--steps", steps]
        started = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        lines = (done.stdout + done.stderr).splitlines()
        after = [line for line in lines if line.startswith("after:")] or lines[-1:]
        say(f"| python {script} --steps {steps} | {time.perf_counter() - started:.0f} s, "
            f"{after[0]} |")


def decoding(shape: dict, tokenizer, rows: int, tokens: int, copy_rate: float) -> None:
    model = build(shape, torch.float32, torch.bfloat16)
    weights = sum(p.numel() * 2 for p in model.parameters())
    per_token = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * 128 * 2
    cache = rows * per_token * (len(PROMPT) + tokens / 2)
    floor = tokens * (weights + cache) / (copy_rate / 2)  # reading alone moves half of a copy
    say(f"| decoding, {rows} answers of {tokens} tokens: the floor | "
        f"{rows * tokens / floor:.0f} tokens/s |")
    sample(model, tokenizer, [PROMPT], rows, 8)
    ours = seconds(lambda: sample(model, tokenizer, [PROMPT], rows, tokens))
    say(f"| common/sampling.py | {rows * tokens / ours:.0f} tokens/s, {ours / tokens * 1e3:.1f} ms "
        f"per token, {ours / floor:.1f} x the floor, peak {peak():.1f} GiB |")
    rollout = sample(model, tokenizer, [PROMPT], min(rows, 8), tokens)
    gap = (rollout.logp - response_logprobs(model, rollout).detach()).abs()
    say(f"| its log-probs minus the trainer's | mean {gap.mean():.2g}, largest "
        f"{gap.max():.2g} nats |")
    profile(model, tokenizer, rows)
    model = model.bfloat16()
    ids = torch.tensor([PROMPT] * rows, device=DEVICE)
    flags = {"do_sample": True, "top_k": 0, "max_new_tokens": tokens, "min_new_tokens": tokens}
    mask = torch.ones_like(ids)
    theirs = seconds(lambda: model.generate(ids, attention_mask=mask, **flags))
    say(f"| model.generate | {rows * tokens / theirs:.0f} tokens/s, {theirs / floor:.1f} x the "
        "floor |")


def static_cache(shape: dict, rows: int, tokens: int) -> None:
    """The remedy: transformers' static cache, whose step torch.compile records once."""
    model = build(shape, torch.bfloat16, torch.bfloat16)
    ids = torch.tensor([PROMPT] * rows, device=DEVICE)
    mask = torch.ones_like(ids)
    flags = {"do_sample": True, "top_k": 0, "max_new_tokens": tokens, "min_new_tokens": tokens,
             "cache_implementation": "static", "attention_mask": mask}
    first = seconds(lambda: model.generate(ids, **flags))
    again = seconds(lambda: model.generate(ids, **flags))
    say(f"| generate, static cache, compiled, {rows} answers of {tokens} tokens | "
        f"{rows * tokens / again:.0f} tokens/s, after {first:.0f} s of compiling |")


def profile(model, tokenizer, rows: int) -> None:
    """What a step of decoding is made of: the card's own time against the wall's."""
    if DEVICE.type != "cuda":
        return
    from torch.profiler import ProfilerActivity
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as found:
        elapsed = seconds(lambda: sample(model, tokenizer, [PROMPT], rows, 64))
    on_card = torch.autograd.DeviceType.CUDA  # an operation's row repeats its kernel's time
    events = [event for event in found.key_averages() if event.device_type == on_card]
    card = sum(event.self_device_time_total for event in events) / 1e6
    kernels = sum(event.count for event in events if event.self_device_time_total > 0)
    say(f"| of 64 tokens under the profiler | wall {elapsed:.2f} s, kernels {card:.2f} s, "
        f"{kernels} of them |")
    largest = sorted(events, key=lambda event: -event.self_device_time_total)[:6]
    for event in largest:
        say(f"|   {event.key[:60]} | {event.self_device_time_total / 1e6:.3f} s |")


def training(shape: dict, rows: int, length: int, flops: float, adapters: bool) -> None:
    stored = torch.bfloat16 if adapters else torch.float32
    model = build(shape, stored, torch.bfloat16)
    base = model
    model.activation_checkpointing_enable({"use_reentrant": False})
    weights = sum(p.numel() for p in model.parameters())
    if adapters:
        model.requires_grad_(False)
        config = LoraConfig(r=32, lora_alpha=64, target_modules="all-linear")
        get_peft_model(model, config)  # changes the model in place
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    fused = True if DEVICE.type == "cuda" else None
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=fused)
    answer = length - len(PROMPT)
    tokens = torch.randint(0, shape["vocab_size"], (rows, answer), device=DEVICE)
    rollout = SimpleNamespace(
        prompts=[PROMPT] * rows, tokens=tokens, mask=torch.ones(rows, answer, device=DEVICE),
        lengths=torch.full((rows,), answer, device=DEVICE))
    budget = 8192
    say("| the printed estimate | " + memory_estimate(model, budget) + " |")

    def step():
        for part in micro_batches(rollout, torch.arange(rows, device=DEVICE), budget):
            batch = SimpleNamespace(
                prompts=[PROMPT] * len(part), tokens=tokens[part], mask=rollout.mask[part],
                lengths=rollout.lengths[part])
            logp = response_logprobs(model, batch)
            (-logp.sum() / tokens.numel()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    free()
    step()
    elapsed = seconds(step)
    operations = 6 if adapters else 8  # adapters have no gradient of the weights: 2 + 2 + 2
    share = operations * weights * rows * length / elapsed / flops
    name = "LoRA 32" if adapters else "all weights"
    say(f"| training, {name}, {rows} answers of {length} tokens | "
        f"{rows * length / elapsed:.0f} tokens/s, {share:.0%} of the matmul rate, peak "
        f"{peak():.1f} GiB |")
    del base


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true")
    toy = parser.parse_args().toy
    card = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "no card"
    say(f"{datetime.date.today()}, {card}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, python tests/benchmarks/gpu.py{' --toy' * toy}\n")
    flops, copy_rate = rates(1024 if toy else 8192)
    say("| what | measured |\n| --- | --- |")
    say(f"| bfloat16 matrix product, copy | {flops / 1e12:.1f} TFLOP/s, "
        f"{copy_rate / 1e9:.0f} GB/s |")
    tokenizer = load_tokenizer("tiny")
    shape = SMALL if toy else BIG
    parts = [
        lambda: correct(tokenizer),
        lambda: decoding(shape, tokenizer, *((4, 16) if toy else (128, 512)), copy_rate),
        lambda: training(shape, *((4, 128) if toy else (16, 2048)), flops, False),
        lambda: training(shape, *((4, 128) if toy else (16, 2048)), flops, True),
        lambda: embedded("2" if toy else "32"),
        lambda: static_cache(shape, *((4, 16) if toy else (128, 128))),
    ]
    for part in parts:
        try:
            part()
        except (RuntimeError, ValueError, AttributeError) as error:  # the other rows still count
            say(f"| failed | {type(error).__name__}: {str(error).splitlines()[0][:200]} |")
        free()


if __name__ == "__main__":
    main()
