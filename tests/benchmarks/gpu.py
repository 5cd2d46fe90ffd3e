"""On a GPU, at Qwen3-4B's shapes with random weights: is it right, how fast, how near to what the card can do, how much memory?

    python tests/benchmarks/gpu.py                    # minutes on an 80 GB card (not run on one yet); prints Markdown
    python tests/benchmarks/gpu.py --toy              # the same code on anything, in seconds: numbers without meaning

Correct: log-probs and entropies of a small model on the card, float32 and bfloat16, against float32 on the CPU, and the sampler's against
the trainer's, in the plain loop and with recorded steps. Decoding: tokens/s of common/sampling.py, both ways, of model.generate, which
is what TRL's trainer calls, and of transformers' continuous batching, against the floor (weights and cache read once a step, at
the measured copy rate). Training: tokens/s and the share of the measured bfloat16 matmul rate, 6 FLOPs a weight and token and 8
with blocks computed twice. Both also with answers of many lengths, other ones in every round, without and with cuDNN's attention,
which plans anew for every shape (common/models.py turns it off). Memory: the plan against the measured peak.
"""
import argparse
import gc
import math
import os
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2]))
from common.logprobs import micro_batches, response_logprobs  # noqa: E402
from common.models import TINY, load_tokenizer, memory_plan  # noqa: E402
from common.optim import MasterAdamW  # noqa: E402
from common.sampling import sample  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WAYS = (False, True) if DEVICE.type == "cuda" else (False,)  # sample(graphs=...)
PROMPT = list(range(5, 69))  # 64 tokens; what they are does not matter


def build(hidden: int, inner: int, blocks: int, heads: int, vocab: int, dtype, device=DEVICE, seed: int = 0):
    torch.manual_seed(seed)
    config = Qwen3Config(vocab_size=vocab, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=blocks, head_dim=128,
                         num_attention_heads=heads, num_key_value_heads=max(1, heads // 4), tie_word_embeddings=True,
                         max_position_embeddings=8192, eos_token_id=None, bos_token_id=None, pad_token_id=0)
    model = Qwen3ForCausalLM._from_config(config, dtype=dtype, attn_implementation="grouped_sdpa").to(device).eval()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model


def seconds(work, rounds: int = 3) -> float:
    """The median of several rounds, the card waited for; one before to warm up."""
    times = []
    for _ in range(rounds + 1):
        wait()
        started = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - started)
    return sorted(times[1:])[rounds // 2]


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def peak(reset: bool = False) -> float:
    if DEVICE.type != "cuda":
        return float("nan")
    if reset:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated() / 2**30


def correct(tokenizer) -> None:
    print("\n## Correct\n\n| on the card | largest difference of a log-prob | of an entropy | sampler and trainer | recorded and trainer | "
          "share of answers the same, recorded or not |\n| --- | --- | --- | --- | --- | --- |")
    reference = build(256, 512, 4, 4, 2048, torch.float32, "cpu")
    rollout = sample(reference, tokenizer, [PROMPT, PROMPT[:9]], 4, 64, seed=1)
    logp, entropy = response_logprobs(reference, rollout)
    for dtype in (torch.float32, torch.bfloat16):
        model = build(256, 512, 4, 4, 2048, torch.float32, "cpu").to(DEVICE, dtype)
        model.model.rotary_emb.inv_freq = reference.model.rotary_emb.inv_freq.to(DEVICE)  # float32, as from_pretrained leaves it
        here = type(rollout)(**{k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in vars(rollout).items()})
        with torch.no_grad():
            found = [x.cpu() for x in response_logprobs(model, here)]
            ways = [sample(model, tokenizer, [PROMPT, PROMPT[:9]], 4, 600, seed=2, graphs=graphs) for graphs in WAYS]
            gaps = [(response_logprobs(model, own)[0] - own.logp).abs().max().item() for own in ways]
            ways += [sample(model, tokenizer, [PROMPT, PROMPT[:9]], 4, 600, top_p=0.9, repetition_penalty=1.15, seed=2, graphs=graphs)
                     for graphs in WAYS]
        same = torch.cat([(a.tokens == b.tokens).all(1) for a, b in zip(ways[::len(WAYS)], ways[len(WAYS) - 1::len(WAYS)])]).float().mean()
        print(f"| {dtype} | {(found[0] - logp).abs().max():.2e} | {(found[1] - entropy).abs().max():.2e} | {gaps[0]:.2e} | "
              f"{gaps[-1]:.2e} | {same:.2f} |")


def decoding(model, tokenizer, rows: int, new: int) -> None:
    numel = sum(p.numel() for p in model.parameters())
    x = torch.empty(1 << (28 if DEVICE.type == "cuda" else 22), dtype=torch.bfloat16, device=DEVICE)
    copied = 4 * x.numel() / seconds(lambda: x.clone())  # bytes read and written a second
    config = model.config
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2 * rows * (len(PROMPT) + new / 2)
    floor = rows * copied / (2 * numel + cache)
    print(f"\n## Decoding\n\n{rows} answers of {new} tokens; copy rate {copied / 1e9:.0f} GB/s\n\n| | tokens/s | times the floor's seconds |")
    print("| --- | --- | --- |")
    row = lambda name, rate: print(f"| {name} | {rate:.0f} | {floor / rate:.2f} |", flush=True)
    row("floor: weights and cache read once a step", floor)
    for graphs in WAYS:
        row(f"common/sampling.py{', --cuda-graphs' * graphs}", rows * new / seconds(
            lambda g=graphs: sample(model, tokenizer, [PROMPT], rows, new, max_rows=rows, graphs=g), 1))
    model.generation_config.eos_token_id = list(range(4, 4 + max(1, 2 * config.vocab_size // new)))  # ends after half, in the mean
    for cudnn in (False, True):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        drawn = []
        elapsed = seconds(lambda d=drawn: d.append(sample(model, tokenizer, [PROMPT], rows, new, seed=len(d), max_rows=rows)), 1)
        row(f"common/sampling.py, ends at different times{', cuDNN' * cudnn}", int(drawn[-1].lengths.sum()) / elapsed)
    torch.backends.cuda.enable_cudnn_sdp(False)
    model.generation_config.eos_token_id = None
    model.set_attn_implementation("sdpa")
    ids = torch.tensor([PROMPT] * rows, device=DEVICE)
    with torch.inference_mode():
        row("model.generate", rows * new / seconds(lambda: model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0, max_new_tokens=new), 1))
    settings, found = transformers.GenerationConfig(max_new_tokens=new, do_sample=True, eos_token_id=-1, pad_token_id=0), []
    try:
        elapsed = seconds(lambda: found.append(model.generate_batch([PROMPT] * rows, generation_config=settings)), 1)
        made = sum(len(answer.generated_tokens) for answer in found[-1].values())  # it does not raise: what failed has none
        if made < rows * new:
            raise RuntimeError(f"{made} of {rows * new} tokens; {[answer.error for answer in found[-1].values()][:1]}")
        row("generate_batch (continuous batching)", made / elapsed)
    except Exception as error:  # (an interface that changes from release to release; its absence is a result)
        print(f"| generate_batch | not run: {type(error).__name__}: {str(error)[:80]} | |")
    finally:  # it may leave its own attention behind, and its cache
        model.set_attn_implementation("grouped_sdpa")
        gc.collect()
        peak(reset=True)


def training(model, tokenizer, rows: int, new: int, budget: int) -> None:
    numel = sum(p.numel() for p in model.parameters())
    n = 8192 if DEVICE.type == "cuda" else 512
    a = torch.randn(n, n, dtype=torch.bfloat16, device=DEVICE)
    matmul = 2 * n**3 / seconds(lambda: a @ a)
    peak(reset=True)
    rollout = sample(model, tokenizer, [PROMPT], rows, new, seed=3)
    sampling_peak = peak()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.train()
    optimizer = MasterAdamW(model, 1e-6)

    def step(rollout):
        for m in micro_batches(torch.arange(rows, device=DEVICE), rollout, budget):
            logp, _ = response_logprobs(model, rollout[m])
            optimizer.backward(logp.sum() / 1e6)
        optimizer.step()
    plan = memory_plan(model, rows, len(PROMPT) + new, budget)
    print(f"\n## Training\n\n{rows} answers of at most {new} tokens, {budget} tokens at once; matmul {matmul / 1e12:.0f} TFLOP/s; peak while "
          f"sampling {sampling_peak:.1f} GiB; planned {plan['peak']:.1f} GiB\n\n"
          "| answers | tokens/s | share of the matmul rate, 6 FLOPs | 8 FLOPs | peak, GiB | reserved |\n| --- | --- | --- | --- | --- | --- |")

    def ragged():
        lengths = torch.randint(new // 4, new + 1, (rows,), device=DEVICE)
        inside = (torch.arange(new, device=DEVICE) < lengths[:, None]).float()
        return replace(rollout, lengths=lengths, mask=inside, tokens=rollout.tokens * inside.long())
    for name, answers, cudnn in (("of one length", lambda: rollout, False), ("of many lengths", ragged, False),
                                 ("of many lengths, cuDNN", ragged, True)):
        peak(reset=True)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        first, second = answers(), answers()
        rounds = iter((first, second))
        try:
            rate = (rows * len(PROMPT) + int(second.lengths.sum())) / seconds(lambda r=rounds: step(next(r)), 1)
        except torch.OutOfMemoryError as error:
            optimizer.zero_grad()
            print(f"| {name} | out of memory: {str(error)[:120]} | | | {peak():.1f} | |", flush=True)
            continue
        reserved = torch.cuda.max_memory_reserved() / 2**30 if DEVICE.type == "cuda" else math.nan
        print(f"| {name} | {rate:.0f} | {6 * numel * rate / matmul:.2f} | {8 * numel * rate / matmul:.2f} | {peak():.1f} | {reserved:.1f} |",
              flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="tiny shapes, to see that it runs")
    args = parser.parse_args()
    if DEVICE.type != "cuda" and not args.toy:
        raise SystemExit("no GPU here; --toy runs the same code at tiny shapes")
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU, toy shapes: these numbers mean nothing"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}")
    tokenizer = load_tokenizer(str(TINY))
    torch.backends.cuda.enable_cudnn_sdp(False)  # as common/models.py
    correct(tokenizer)
    shape = (256, 512, 2, 4, 2048) if args.toy else (2560, 9728, 36, 32, 151936)
    model = build(*shape, torch.bfloat16)
    decoding(model, tokenizer, 4 if args.toy else 128, 16 if args.toy else 512)
    training(model, tokenizer, 4 if args.toy else 16, 32 if args.toy else 2048, 256 if args.toy else 16384)


if __name__ == "__main__":
    main()
