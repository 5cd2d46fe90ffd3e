"""What does a step cost on a CPU? grpo.py against TRL's GRPOTrainer, sampling against generate.

    python tests/benchmarks/step_time.py          # five minutes on one idle core; writes nothing
    pip install trl                               # the rival; without it its rows are left out

The embedded model, 8 problems x 16 answers of at most 80 tokens, float32, one thread. Both trainers
see the same problems in the same order with the same verifier; one update per rollout, no KL, lr
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
ARGS = SimpleNamespace(model="tiny", device="cpu", dtype="float32", lora_rank=0)


def show(values, digits: int = 2) -> str:
    median, low, high = statistics.median(values), min(values), max(values)
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def our_turn(turn: int) -> list[dict]:
    """Rows of metrics.jsonl of grpo.py itself."""
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()), \
            contextlib.redirect_stderr(io.StringIO()):
        grpo.main(["--steps", str(STEPS), "--lr", "1e-6", "--eval-problems", "0",
                   "--seed", str(turn), "--output", f"{place}/run"])
        lines = pathlib.Path(place, "run", "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


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
        return [verify(text, gold) for text, gold in zip(texts, answer, strict=True)]

    problems = load_problems("arithmetic", seed=turn)
    rows = []
    for step in range(STEPS):
        for row in batch_of(problems, step, 8, turn):
            chat = [{"role": "user", "content": row["problem"]}]
            rows.append({"prompt": chat, "answer": row["answer"]})
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
        config = GRPOConfig(
            place, max_steps=STEPS, per_device_train_batch_size=128, num_generations=16,
            steps_per_generation=1, max_completion_length=80, temperature=1.0, learning_rate=1e-6,
            beta=0.0, loss_type="dapo", use_cpu=True, bf16=False, gradient_checkpointing=False,
            shuffle_dataset=False, report_to="none", save_strategy="no", logging_steps=99,
            disable_tqdm=True, seed=turn)
        trainer = GRPOTrainer(
            load_model(ARGS).train(), right, config, train_dataset=Dataset.from_list(rows),
            processing_class=load_tokenizer("tiny"), callbacks=[Clock()])
        trainer.train()
    return [end - begin for begin, end in zip(ends, ends[1:], strict=False)]


def against_trl(turns: int) -> None:
    rows, theirs = [], []
    for turn in range(turns):
        rows += our_turn(turn)
        if importlib.util.find_spec("trl"):
            theirs += trl_turn(turn)
    parts = ("sampling", "verifying", "training")
    ours = [sum(row[f"seconds_{part}"] for part in parts) for row in rows]
    print("\n| a GRPO step | seconds (lowest to highest) |\n| --- | --- |")
    print(f"| grpo.py | {show(ours)} |")
    for part in parts:
        print(f"| of these {part} | {show([row[f'seconds_{part}'] for row in rows])} |")
    if theirs:
        ratio = statistics.median(ours) / statistics.median(theirs)
        print(f"| TRL | {show(theirs)} |\n\nours / TRL: {ratio:.2f}")


def some_prompts(tokenizer) -> list[list[int]]:
    problems = load_problems("arithmetic")[:8]
    return [encode_prompt(tokenizer, row["problem"]) for row in problems]


def our_rate(model, tokenizer, prompts, seed: int) -> float:
    """Tokens per second of common/sampling.py."""
    started = time.perf_counter()
    lengths = sample(model, tokenizer, prompts, 16, 80, seed=seed).lengths
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
            top_p=1.0, temperature=1.0, max_new_tokens=80, num_return_sequences=16)
    elapsed = time.perf_counter() - started
    answers = whole[:, width:]
    ended = (answers == tokenizer.eos_token_id).int()
    lengths = torch.where(ended.any(1), ended.argmax(1) + 1, answers.shape[1])
    return int(lengths.sum()) / elapsed


def against_generate(rounds: int) -> None:
    model, tokenizer = load_model(ARGS), load_tokenizer("tiny")
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
    model, tokenizer = load_model(ARGS), load_tokenizer("tiny")
    prompts = some_prompts(tokenizer)
    seconds = {"block 5 of 8": [], "the whole model": []}
    for seed in range(rounds + 1):
        rollout = sample(model, tokenizer, prompts, 16, 80, seed=seed)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    against_generate(3 * args.turns)
    against_trl(args.turns)
    phases(3 * args.turns)


if __name__ == "__main__":
    main()
