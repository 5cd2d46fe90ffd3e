"""What does a step cost on a CPU? grpo.py against TRL's GRPOTrainer, sampling against generate.

    python tests/benchmarks/step_time.py          # five minutes on one idle core; writes nothing
    python tests/benchmarks/step_time.py --model FOLDER --dtype bfloat16 --turns 1
    pip install trl                               # the rival; without it its rows are left out

The embedded model: 8 problems x 16 answers of at most 80 tokens; another one: 8 x 8 of at most 64,
rewarded for an even number of characters, as it may get nothing right. One thread. Both trainers
see the same problems in the same order with the same reward; one update per rollout, no KL, lr
1e-6, so that answers keep their length. They take turns; the first step of each turn is left out.
"""
import argparse
import contextlib
import importlib.util
import io
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from types import SimpleNamespace
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
import grpo
from common.data import batch_of, encode_prompt, load_problems
from common.internal_policy import first_blocks
from common.logprobs import micro_batches, response_logprobs
from common.models import load_model, load_tokenizer
from common.sampling import sample
from common.verify import verify

STEPS = 4  # per turn
CASE = SimpleNamespace(model="tiny", device="cpu", dtype="float32", lora_rank=0, answers=16,
                       length=80, reward=[])


def show(values, digits: int = 2) -> str:
    median, low, high = statistics.median(values), min(values), max(values)
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def even(text: str, row: dict) -> float:
    """A reward with signal for a model that gets no problem right."""
    return float(len(text) % 2 == 0)


def as_ended(*given, **named):
    """sample(), with answers that are cut off counted as ended, so that all of them train."""
    rollout = sample(*given, **named)
    rollout.finished[:] = True
    return rollout


def our_turn(turn: int) -> list[tuple[float, float]]:
    """Seconds of each step of grpo.py itself, and those of its call of sample()."""
    sampling = []

    def timed(*given, **named):
        started = time.perf_counter()
        rollout = sample_of(*given, **named)
        sampling.append(time.perf_counter() - started)
        return rollout

    sample_of = grpo.sample
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()), \
            contextlib.redirect_stderr(io.StringIO()), mock.patch.object(grpo, "sample", timed):
        grpo.main(["--steps", str(STEPS), "--lr", "1e-6", "--eval-problems", "0",
                   "--model", CASE.model, "--dtype", CASE.dtype, "--prompts-per-step", "8",
                   "--group-size", str(CASE.answers), "--max-new-tokens", str(CASE.length),
                   "--micro-batch-tokens", "1024", "--system", "", *CASE.reward,
                   "--seed", str(turn), "--output", f"{place}/run"])
        lines = pathlib.Path(place, "run", "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["seconds"] for line in lines]
    return list(zip(steps, sampling, strict=True))[1:]


def trl_turn(turn: int) -> list[float]:
    """Seconds of the same steps of TRL's GRPOTrainer."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())

    def right(completions, answer, **_):
        texts = [completion[0]["content"] for completion in completions]
        if CASE.reward:
            return [even(text, {}) for text in texts]
        return [verify(text, gold) for text, gold in zip(texts, answer, strict=True)]

    problems = load_problems("arithmetic", seed=turn)
    rows = []
    for step in range(STEPS):
        for row in batch_of(problems, step, 8, turn):
            chat = [{"role": "user", "content": row["problem"]}]
            rows.append({"prompt": chat, "answer": row["answer"]})
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
        config = GRPOConfig(
            place, max_steps=STEPS, per_device_train_batch_size=8 * CASE.answers,
            num_generations=CASE.answers, steps_per_generation=1,
            max_completion_length=CASE.length, temperature=1.0, learning_rate=1e-6, beta=0.0,
            loss_type="dapo", use_cpu=True, bf16=CASE.dtype == "bfloat16",
            gradient_checkpointing=False, shuffle_dataset=False, report_to="none",
            save_strategy="no", logging_steps=99,
            disable_tqdm=True, seed=turn)
        trainer = GRPOTrainer(
            load_model(CASE).train(), right, config, train_dataset=Dataset.from_list(rows),
            processing_class=load_tokenizer(CASE.model), callbacks=[Clock()])
        trainer.train()
    return [end - begin for begin, end in zip(ends, ends[1:], strict=False)]


def against_trl(turns: int) -> None:
    rows, theirs = [], []
    for turn in range(turns):
        rows += our_turn(turn)
        if importlib.util.find_spec("trl"):
            theirs += trl_turn(turn)
    ours = [step for step, _ in rows]
    print("\n| a GRPO step | seconds (lowest to highest) |\n| --- | --- |")
    print(f"| grpo.py | {show(ours)} |")
    print(f"| of these sampling | {show([sampling for _, sampling in rows])} |")
    print(f"| of these the rest | {show([step - sampling for step, sampling in rows])} |")
    if theirs:
        ratio = statistics.median(ours) / statistics.median(theirs)
        print(f"| TRL | {show(theirs)} |\n\nours / TRL: {ratio:.2f}")


def some_prompts(tokenizer) -> list[list[int]]:
    problems = load_problems("arithmetic")[:8]
    return [encode_prompt(tokenizer, row["problem"]) for row in problems]


def our_rate(model, tokenizer, prompts, seed: int) -> float:
    """Tokens per second of common/sampling.py."""
    started = time.perf_counter()
    lengths = sample(model, tokenizer, prompts, CASE.answers, CASE.length, seed=seed).lengths
    return int(lengths.sum()) / (time.perf_counter() - started)


def generate_rate(model, tokenizer, prompts, seed: int) -> float:
    """The same of model.generate."""
    width = max(len(prompt) for prompt in prompts)
    ids, seen = [], []
    for prompt in prompts:
        padding = width - len(prompt)
        ids.append([tokenizer.pad_token_id] * padding + prompt)
        seen.append([0] * padding + [1] * len(prompt))
    torch.manual_seed(seed)
    started = time.perf_counter()
    with torch.inference_mode():
        whole = model.generate(
            torch.tensor(ids), attention_mask=torch.tensor(seen), do_sample=True, top_k=0,
            top_p=1.0, temperature=1.0, max_new_tokens=CASE.length,
            num_return_sequences=CASE.answers)
    elapsed = time.perf_counter() - started
    answers = whole[:, width:]
    ended = (answers == tokenizer.eos_token_id).int()
    lengths = torch.where(ended.any(1), ended.argmax(1) + 1, answers.shape[1])
    return int(lengths.sum()) / elapsed


def against_generate(rounds: int) -> None:
    model, tokenizer = load_model(CASE, trained=False), load_tokenizer(CASE.model)
    prompts = some_prompts(tokenizer)
    ours, theirs = [], []
    for seed in range(rounds + 1):
        ours.append(our_rate(model, tokenizer, prompts, seed))
        theirs.append(generate_rate(model, tokenizer, prompts, seed))
    ours, theirs = ours[1:], theirs[1:]  # the first round warms up
    print("\n| sampling | tokens/s (lowest to highest) |\n| --- | --- |")
    print(f"| common/sampling.py | {show(ours, 0)} |\n| model.generate | {show(theirs, 0)} |")
    print(f"\nours / generate: {statistics.median(ours) / statistics.median(theirs):.2f}")


def phases(rounds: int) -> None:
    """BuPO's first phase, block 5 of 8, against the whole model, on the same answers."""
    model, tokenizer = load_model(CASE), load_tokenizer(CASE.model)
    prompts = some_prompts(tokenizer)
    seconds = {"block 5 of 8": [], "the whole model": []}
    for seed in range(rounds + 1):
        rollout = sample(model, tokenizer, prompts, CASE.answers, CASE.length, seed=seed)
        for name, found in seconds.items():
            trunk = first_blocks(model, 5) if name.startswith("block") else None
            started = time.perf_counter()
            for part in micro_batches(rollout, torch.arange(len(rollout.lengths)), 1024):
                logp = response_logprobs(model, rollout[part], trunk=trunk)
                logp.sum().backward()
            found.append(time.perf_counter() - started)
    print("\n| training on a rollout | seconds (lowest to highest) |\n| --- | --- |")
    for name, found in seconds.items():
        print(f"| {name} | {show(found[1:])} |")


def where() -> None:
    """The operations that take most of training on a rollout, forward and backward."""
    model, tokenizer = load_model(CASE).train(), load_tokenizer(CASE.model)
    rollout = sample(model, tokenizer, some_prompts(tokenizer), CASE.answers, CASE.length)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        for part in micro_batches(rollout, torch.arange(len(rollout.lengths)), 1024):
            response_logprobs(model, rollout[part]).sum().backward()
    seconds = {}
    for event in found.key_averages():
        seconds[event.key] = event.self_cpu_time_total / 1e6
    whole = sum(seconds.values())
    print(f"\n| of training, {whole:.1f} s under the profiler | share |\n| --- | --- |")
    for name in sorted(seconds, key=seconds.get, reverse=True)[:8]:
        print(f"| {name} | {seconds[name] / whole:.0%} |")


def machine() -> None:
    """What the machine can do at best: a large product in both types, a copy of 256 MiB."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2048, 2048).to(dtype)
        seconds = best_of(3, torch.mm, x, x)
        print(f"{dtype} product: {2 * 2048**3 / seconds / 1e9:.0f} GFLOP/s")
    x = torch.zeros(1 << 26)
    print(f"copy: {2 * 4 * len(x) / best_of(3, torch.clone, x) / 1e9:.1f} GB/s read and written")


def best_of(times: int, function, *given) -> float:
    """The fewest seconds a call takes."""
    found = []
    for _ in range(times + 1):
        started = time.perf_counter()
        function(*given)
        found.append(time.perf_counter() - started)
    return min(found[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--model", default="tiny", help="tiny or a model's folder")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    CASE.model, CASE.dtype = args.model, args.dtype
    if args.model != "tiny":
        CASE.answers, CASE.length, CASE.reward = 8, 64, ["--reward", f"{__file__}:even"]
        grpo.sample = as_ended
    machine()
    against_generate(3 * args.turns)
    against_trl(args.turns)
    if args.model == "tiny":
        phases(3 * args.turns)
    else:
        where()


if __name__ == "__main__":
    main()
