"""What does a step cost on a CPU? grpo.py against TRL's GRPOTrainer, sampling against model.generate, BuPO's phases, and
how cost grows.

    python tests/benchmarks/step_time.py                    # ten minutes on one idle core; writes nothing
    pip install trl                                         # the rival; without it that table is left out

Both trainers: the embedded model, 8 problems x 16 answers of at most 80 tokens, the same problems in the same order, the same verifier,
float32, one update a rollout, no KL, no gradient checkpointing; lr 1e-6, so that answers keep their length. They take turns,
three steps each; the first step of each turn is left out.
"""
import argparse
import contextlib
import importlib.util
import io
import json
import logging
import os
import pathlib
import statistics
import sys
import tempfile
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
import grpo  # noqa: E402
from common.data import batch_of, encode_prompts, load_problems  # noqa: E402
from common.logprobs import micro_batches, response_logprobs  # noqa: E402
from common.models import TINY, load_model, load_tokenizer  # noqa: E402
from common.sampling import sample  # noqa: E402
from common.verify import reward  # noqa: E402

TURN = 4  # steps a turn
show = lambda values: f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def our_turn(turn: int) -> list[dict]:
    """Rows of metrics.jsonl of TURN steps of grpo.py itself, without the first."""
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        grpo.main(["--steps", str(TURN), "--lr", "1e-6", "--eval-problems", "0", "--seed", str(turn), "--save-every", "99",
                   "--output", f"{place}/run"])
        return [json.loads(line) for line in pathlib.Path(place, "run", "metrics.jsonl").read_text().splitlines()][1:]


def trl_turn(turn: int) -> list[dict]:
    """Seconds and tokens of the same steps of TRL's GRPOTrainer."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        def __init__(self):
            self.ends, self.tokens = [], []

        def on_step_end(self, *args, **kwargs):
            self.ends.append(time.perf_counter())
    clock, train = Clock(), load_problems("arithmetic", seed=turn)
    rows = [row for step in range(TURN) for row in batch_of(train, step, 8, turn)]

    def right(completions, completion_ids, answer, **_):
        clock.tokens.append(sum(map(len, completion_ids)))
        return [reward(completion[0]["content"], gold) for completion, gold in zip(completions, answer)]
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
        config = GRPOConfig(place, max_steps=TURN, per_device_train_batch_size=128, num_generations=16, steps_per_generation=1,
                            max_completion_length=80, temperature=1.0, learning_rate=1e-6, beta=0.0, loss_type="dapo", use_cpu=True,
                            bf16=False, gradient_checkpointing=False, shuffle_dataset=False, report_to="none", save_strategy="no",
                            logging_steps=99, disable_tqdm=True, seed=turn)
        trainer = GRPOTrainer(load_model("tiny").train(), right, config, processing_class=load_tokenizer("tiny"), callbacks=[clock],
                              train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": row["problem"]}],
                                                                "answer": row["answer"]} for row in rows]))
        trainer.train()
    return [{"seconds": b - a, "tokens": n} for a, b, n in zip(clock.ends, clock.ends[1:], clock.tokens[1:])]


def against_trl(turns: int) -> None:
    ours, theirs = [], []
    seconds = lambda row: sum(value for name, value in row.items() if name.startswith("seconds_"))
    trl = importlib.util.find_spec("trl") is not None
    for turn in range(turns):
        ours += our_turn(turn)
        theirs += trl_turn(turn) if trl else []
    mine = [seconds(row) for row in ours]
    print("\n| a GRPO step, seconds | median (lowest to highest) | tokens a step |\n| --- | --- | --- |")
    print(f"| grpo.py | {show(mine)} | {statistics.fmean(row['tokens'] for row in ours):.0f} |")
    if theirs:
        other = [row["seconds"] for row in theirs]
        print(f"| TRL | {show(other)} | {statistics.fmean(row['tokens'] for row in theirs):.0f} |")
        print(f"\nratio of medians: {statistics.median(mine) / statistics.median(other):.2f}")
    parts = {name: [row[f"seconds_{name}"] for row in ours] for name in ("sampling", "verifying", "training")}
    print("\nof our step: " + ", ".join(f"{name} {show(values)}" for name, values in parts.items()))


def against_generate(rounds: int) -> None:
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    prompts = [row["prompt"] for row in encode_prompts(tokenizer, load_problems("arithmetic")[:8], "", False, 400)]
    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts])
    seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    rates = {"sample()": [], "model.generate": []}
    for r in range(rounds + 1):
        started = time.perf_counter()
        tokens = int(sample(model, tokenizer, prompts, 16, 80, seed=r).lengths.sum())
        ours = tokens / (time.perf_counter() - started)
        torch.manual_seed(r)
        started = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=seen, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=80,
                                 num_return_sequences=16)[:, width:]
        elapsed = time.perf_counter() - started
        ended = (out == tokenizer.eos_token_id).int()
        lengths = torch.where(ended.any(1), ended.argmax(1) + 1, out.shape[1])
        if r:  # the first round warms up
            rates["sample()"].append(ours)
            rates["model.generate"].append(int(lengths.sum()) / elapsed)
    print("\n| sampling, tokens/s | median (lowest to highest) |\n| --- | --- |")
    for name, values in rates.items():
        print(f"| {name} | {statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f}) |")
    print(f"\nratio of medians: {statistics.median(rates['sample()']) / statistics.median(rates['model.generate']):.2f}")


def phases(rounds: int) -> None:
    """What bupo.py trains in its first phase, block 5 of 8, against the whole model: forward and backward of the same answers."""
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    prompts = [row["prompt"] for row in encode_prompts(tokenizer, load_problems("arithmetic")[:8], "", False, 400)]
    seconds = {5: [], None: []}
    for r in range(rounds + 1):
        rollout = sample(model, tokenizer, prompts, 16, 80, seed=r)
        for layer, found in seconds.items():
            started = time.perf_counter()
            for m in micro_batches(torch.arange(len(rollout.lengths)), rollout, 1024):
                (response_logprobs(model, rollout[m], layer=layer)[0].sum() / 1e4).backward()
            found.append(time.perf_counter() - started)
    first, whole = seconds[5][1:], seconds[None][1:]
    print("\n| training on the same answers, seconds | median (lowest to highest) |\n| --- | --- |")
    print(f"| the policy of block 5 of 8 | {show(first)} |\n| the whole model's | {show(whole)} |")
    print(f"\nratio of medians: {statistics.median(first) / statistics.median(whole):.2f}")


def growth() -> None:
    """Random weights, whose answers seldom end: group size, length and width, one changed at a time."""
    from transformers import AutoConfig, AutoModelForCausalLM
    tokenizer = load_tokenizer("tiny")
    prompts = [row["prompt"] for row in encode_prompts(tokenizer, load_problems("arithmetic")[:8], "", False, 400)]
    print("\n| width | answers a problem | tokens an answer, at most | tokens | sampling, s | training, s | ms a token |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for width, group, length in ((96, 8, 80), (96, 16, 80), (96, 32, 80), (96, 16, 40), (96, 16, 160), (96, 16, 320), (192, 16, 80),
                                 (384, 16, 80)):
        config = AutoConfig.from_pretrained(TINY)
        config.hidden_size, config.intermediate_size = width, config.intermediate_size * width // 96
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        model.generation_config.eos_token_id = None
        seconds = {"sampling": [], "training": []}
        for r in range(3):
            started = time.perf_counter()
            rollout = sample(model, tokenizer, prompts, group, length, seed=r)
            seconds["sampling"].append(time.perf_counter() - started)
            started = time.perf_counter()
            for m in micro_batches(torch.arange(len(rollout.lengths)), rollout, 1024):
                (response_logprobs(model, rollout[m])[0].sum() / 1e4).backward()
            seconds["training"].append(time.perf_counter() - started)
        s, t, tokens = *(statistics.median(values) for values in seconds.values()), int(rollout.lengths.sum())
        print(f"| {width} | {group} | {length} | {tokens} | {s:.2f} | {t:.2f} | {1000 * (s + t) / tokens:.3f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", choices=("trl", "generate", "phases", "growth"))
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if args.only in (None, "trl"):
        against_trl(args.turns)
    if args.only in (None, "generate"):
        against_generate(10)
    if args.only in (None, "phases"):
        phases(10)
    if args.only in (None, "growth"):
        growth()


if __name__ == "__main__":
    main()
