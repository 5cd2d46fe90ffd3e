"""A run's book-keeping: its model, data and folder, metrics, checkpoints. Knows no algorithm.

    run = Run("grpo", args, reward)               # loads, checks, prints; nothing is written yet
    for step in range(run.begin(optimizer=optimizer), args.steps):
        ...
        run.log(step, problems, rollout, rewards, parts, grad_norms)     # a row of metrics.jsonl
        run.save(step + 1)                                     # a checkpoint when one is due
    run.finish()                                               # evaluates again, saves the model

Nothing random is kept between steps: data order and answers follow from (seed, step). So a
checkpoint is weights, optimiser and a step number, and on a CPU a resumed run ends with the very
weights of an uninterrupted one. Configuration, summary and checkpoint are written beside their
place and renamed into it, so they are whole whatever moment a run dies at.
"""
import json
import math
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from functools import partial

import torch
import transformers
from tqdm import tqdm

from common.checkpoint import load_checkpoint, save_checkpoint, save_model
from common.data import (
    drop_long_prompts,
    encode_prompt,
    fingerprint,
    load_train_and_eval,
    write_whole,
)
from common.distributed import everyone, rank, size, total
from common.evaluate import describe, evaluate, mean_and_error
from common.flags import BadInput, read_config
from common.logprobs import check_model
from common.models import causal_lm, end_of_turn, load_model, load_tokenizer, memory_estimate
from common.track import library, tracker

EVAL_K = 8   # answers to each held-out problem
SAVES = 10   # checkpoints in a run, evenly spaced; the last one stays
SHOWN = 4    # answers per rank and step in rollouts.jsonl, half of them to the first problem


class Run:
    """Public: args, model, tokenizer, train and held_out (rows), folder, summary, rows."""

    def __init__(self, name: str, args, reward):
        """Loads and checks everything. reward(text, row) rates held-out answers. BadInput."""
        self.name = name
        self.args = args
        self.reward = reward
        self.folder = pathlib.Path(args.resume or args.output or f"runs/{name}")
        self.made = False
        self.summary = {}
        self.rows = []       # of metrics
        self.seconds = {}    # of this step, by part
        self.warned = set()
        if args.resume:
            self.resumed = self.check_resumed()
        elif args.output and any(self.folder.glob("*")):
            raise BadInput(f"--output {self.folder}: holds something already; take another folder, "
                           f"or --resume {self.folder}")
        updates = size() * getattr(args, "updates_per_rollout", 1)
        if hasattr(args, "prompts_per_step") and args.prompts_per_step % updates:
            raise BadInput(f"--prompts-per-step {args.prompts_per_step}: must be divisible by "
                           f"--updates-per-rollout x processes, {updates}")
        if args.track:
            library(args.track)  # found missing before anything is done
        torch.manual_seed(args.seed)  # new adapters draw from it
        self.tokenizer = load_tokenizer(args.model)
        self.model = load_model(args).train()  # sampling switches to eval by itself
        longest = causal_lm(self.model).config.max_position_embeddings - args.max_new_tokens
        self.train, self.held_out = [
            drop_long_prompts(self.tokenizer, rows, args.system, longest)
            for rows in load_train_and_eval(args)]
        self.data = fingerprint(self.train, self.held_out)
        if args.resume and self.resumed["data"] != self.data:
            raise BadInput(f"--resume {self.folder}: the data has changed since")
        self.describe()

    def check_resumed(self) -> dict:
        """-> config.json. BadInput if --resume names a run of another script, model or data."""
        config = read_config(self.folder)
        if config["script"] != self.name:
            raise BadInput(f"--resume {self.folder}: a run of {config['script']}.py")
        for name in ("model", "seed", "lora_rank", "layer"):
            had, now = config["flags"].get(name), getattr(self.args, name, None)
            if had != now:
                raise BadInput(f"--{name.replace('_', '-')} {now}: the run in {self.folder} has "
                               f"{had}, and keeps it")
        summary = self.folder / "summary.json"
        if summary.exists():
            self.summary = read_json(summary.read_text(encoding="utf-8"), summary)
        elif (self.folder / "checkpoint.pt").exists():
            raise BadInput(f"--resume {self.folder}: summary.json is lost")
        return config

    def describe(self) -> None:
        """Prints model, data, the decoded first prompt, memory."""
        args = self.args
        lm = causal_lm(self.model)
        weights = list(self.model.parameters())
        numel = sum(p.numel() for p in weights) / 1e6
        trained = sum(p.numel() for p in weights if p.requires_grad) / 1e6
        prompt = self.encode(self.train[:1])[0]
        check_model(self.model, self.tokenizer, prompt)
        end = end_of_turn(self.tokenizer)
        if end not in (None, self.tokenizer.eos_token_id):
            print(f"note: answers also end at {self.tokenizer.decode(end)!r}, with which the chat "
                  "template ends a turn")
        print(f"model: {args.model}, {lm.config.model_type}, {numel:.2f} M parameters "
              f"({trained:.2f} M trained), {lm.config.num_hidden_layers} blocks, "
              f"{lm.compute_dtype} on {lm.device}")
        print(f"data:  {args.data}, {len(self.train)} problems to train on, "
              f"{len(self.held_out)} held out")
        print(f"first prompt ({len(prompt)} tokens): {self.tokenizer.decode(prompt)!r} "
              f"-> gold {self.train[0]['answer']!r}")
        rows = getattr(args, "prompts_per_step", 1) * getattr(args, "group_size", 1)
        rows = getattr(args, "batch_size", rows)
        print(memory_estimate(self.model, rows, len(prompt) + args.max_new_tokens,
                              args.micro_batch_tokens))

    def encode(self, rows: list[dict]) -> list[list[int]]:
        """The prompts of some rows as token ids."""
        return [encode_prompt(self.tokenizer, row["problem"], self.args.system) for row in rows]

    def make_folder(self) -> None:
        """Makes the folder, unless it is there, and writes config.json. begin() does this too."""
        if self.made:
            return
        if rank() == 0 and not self.args.resume:
            self.folder = new_folder(self.folder, self.args.output is not None)
        self.folder = pathlib.Path(everyone(str(self.folder))[0])
        self.made = True
        versions = {"torch": torch.__version__, "transformers": transformers.__version__,
                    "python": platform.python_version()}
        config = {
            "script": self.name,
            "flags": {**vars(self.args), "output": str(self.folder), "resume": None},
            "command": sys.argv,
            "data": self.data,
            "device": str(causal_lm(self.model).device),
            "commit": commit(),
            "versions": versions}
        if self.args.resume:
            config = {**self.resumed, "flags": config["flags"]}
        self.write("config.json", json.dumps(config, indent=1))

    def begin(self, **parts) -> int:
        """Makes the folder or restores its checkpoint, evaluates -> the first step to make.

        parts: what checkpoints keep beside the trained weights, name -> anything with state_dict()
        and load_state_dict(), such as optimizer=optimizer.
        """
        self.parts = parts
        first = self.restore() if self.args.resume else 0
        self.rows = self.read_rows("metrics.jsonl", first)
        answers = self.read_rows("rollouts.jsonl", first)
        if len(self.rows) != first:
            raise BadInput(f"--resume {self.folder}: metrics.jsonl has lost rows")
        self.make_folder()
        self.write("metrics.jsonl", json_lines(self.rows))  # without steps that are made again
        self.write("rollouts.jsonl", json_lines(answers))
        if first == 0 and self.held_out and "avg_at_k_before" not in self.summary:
            self.measure("before")
        self.write_summary()
        self.track = None
        if self.args.track and rank() == 0:
            flags = {**vars(self.args), "output": str(self.folder)}
            self.track = tracker(self.args.track, self.name, flags)
        self.bar = tqdm(total=self.args.steps, initial=first, desc=self.name, unit="step",
                        dynamic_ncols=True, disable=rank() > 0)
        self.lap_started = time.perf_counter()
        return first

    def read_rows(self, name: str, step: int) -> list[dict]:
        """The rows of a resumed run's file up to a step. BadInput if they are damaged."""
        path = self.folder / name
        if not self.args.resume or not path.exists():
            return []
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # the last may be half a row
        rows = [read_json(line, path) for line in lines]
        return [row for row in rows if row.get("step", math.inf) <= step]

    def write(self, name: str, text: str) -> None:
        if rank() == 0:
            write_whole(self.folder / name, text)

    def write_summary(self) -> None:
        self.write("summary.json", json.dumps(self.summary, indent=1))

    def append(self, name: str, rows: list[dict]) -> None:
        if rank() == 0:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write(json_lines(rows))

    def lap(self, part: str) -> None:
        """Adds the seconds since the last lap to `seconds_<part>` of this step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.lap_started
        self.lap_started = now

    def log(self, step: int, problems=(), rollout=None, rewards=None, parts=(), grad_norms=(),
            **values) -> None:
        """Writes a row of metrics of all ranks together and some answers, moves the bar, warns.

        problems: the rows that rollout answers. It adds length, share cut off and entropy (nats,
        mean over tokens); rewards (P, G) their mean and the share of groups without signal.
        parts: metrics of micro-batches, which add up over an update; the largest of those in
        _max. grad_norms: one per update.
        """
        row = {"step": step + 1, **values}
        if rewards is not None:
            row["reward"] = total(rewards.sum().item()) / total(rewards.numel())
            equal = rewards.max(1).values == rewards.min(1).values                      # (P,)
            row["no_signal"] = total(int(equal.sum())) / total(len(rewards))
        if rollout is not None:
            answers, tokens = total(len(rollout.mask)), total(int(rollout.lengths.sum()))
            row["length"] = tokens / answers
            row["truncated"] = 1 - total(int(rollout.finished.sum())) / answers
            row["entropy"] = total(rollout.entropy.sum().item()) / max(1, tokens)
            row["tokens_per_second"] = tokens / sum(self.seconds.values())
        for name in parts[0] if parts else ():
            found = [part[name] for part in parts]
            if name.endswith("_max"):
                row[name] = max(max(everyone(found)))
            else:
                row[name] = total(sum(found)) / len(grad_norms)
        if grad_norms:
            row["grad_norm"] = statistics.fmean(grad_norms)
            row["skipped"] = sum(not math.isfinite(norm) for norm in grad_norms)
        row.update({f"seconds_{part}": seconds for part, seconds in self.seconds.items()})
        if torch.cuda.is_available():
            row["peak_gb"] = torch.cuda.max_memory_allocated() / 2**30
        every = self.args.eval_every
        if every and (step + 1) % every == 0 and step + 1 < self.args.steps and self.held_out:
            row["avg_at_k"] = self.evaluate()["avg_at_k"]
        for name, value in row.items():
            row[name] = float(f"{value:.5g}") if isinstance(value, float) else value
        self.rows.append(row)
        self.append("metrics.jsonl", [row])
        if rollout is not None:
            self.append("rollouts.jsonl", some_answers(step + 1, problems, rollout, rewards))
        if self.track is not None:
            self.track(row)
        shown = ("reward", "loss", "length", "entropy", "tokens_per_second")
        self.bar.set_postfix({name: f"{row[name]:.3g}" for name in shown if name in row})
        self.bar.update()
        self.warn(row)
        self.seconds = {}
        self.lap_started = time.perf_counter()

    def warn(self, row: dict) -> None:
        """Says once what a row shows to be wrong."""
        notes = []
        if row.get("truncated", 0) > 0.5:
            notes.append("over half of the answers are cut off at --max-new-tokens, which is "
                         "wrong: raise it")
        if row.get("no_signal", 0) > 0.8:
            notes.append("over 80 % of the groups are all right or all wrong, nothing to learn "
                         "from: other problems, or larger groups")
        if "reward" in row and row["entropy"] < 0.1 * self.rows[0].get("entropy", 0.0):
            notes.append("the entropy is below a tenth of its start, answers will soon be all "
                         "alike: lower --lr")
        exact = causal_lm(self.model).compute_dtype == torch.float32
        if row.get("gap_max", 0) > (0.1 if exact else 1.0):
            notes.append("sampler and trainer differ by over 0.1 nats on a token (in bfloat16: "
                         "1): what is trained is not what was sampled")
        if row.get("skipped", 0) > 0:
            notes.append("a gradient was not finite, its update was left out")
        for note in notes:
            if note not in self.warned:
                self.warned.add(note)
                tqdm.write(f"note: step {row['step']}: {note}")

    def evaluate(self) -> dict:
        """On the held-out problems, with the same random numbers each time."""
        return evaluate(self.model, self.tokenizer, self.held_out, self.reward, EVAL_K,
                        self.args.max_new_tokens, seed=10_000, system=self.args.system)

    def measure(self, when: str) -> dict:
        """Evaluates, prints the line, keeps it in the summary as <name>_<when>."""
        result = self.evaluate()
        print(f"{when + ':':7} {describe(result)}", flush=True)
        self.summary["k"] = EVAL_K
        for name in ("avg_at_k", "standard_error", "pass_at", "length", "by_problem"):
            self.summary[f"{name}_{when}"] = result[name]
        return result

    def save(self, step: int) -> None:
        """A checkpoint after `step` steps, if one is due."""
        if step % max(1, self.args.steps // SAVES) and step < self.args.steps:
            return
        save_checkpoint(self.folder / "checkpoint.pt", step, self.model, self.parts)

    def restore(self) -> int:
        """Weights and optimisers of the last checkpoint -> its step, 0 if there is none."""
        place = self.folder / "checkpoint.pt"
        if not place.exists():
            print(f"going on in {self.folder}, which has no checkpoint yet")
            return 0
        step = load_checkpoint(place, self.model, self.parts)
        if step > self.args.steps:
            raise BadInput(f"--steps {self.args.steps}: {step} are done already")
        print(f"going on from step {step} of {self.args.steps} in {self.folder}")
        return step

    def finish(self) -> dict | None:
        """Saves the model, evaluates, prints some answers and places -> what measure() gave."""
        result = None
        self.bar.close()
        seconds = [row[key] for row in self.rows for key in row if key.startswith("seconds_")]
        self.summary["seconds"] = round(sum(seconds), 1)
        base = None
        if self.args.merge:
            base = partial(load_model, self.args, trained=False, split=False)
        save_model(self.folder, self.model, self.tokenizer, base)
        if self.held_out:
            result = self.measure("after")
            before, after = self.summary["by_problem_before"], self.summary["by_problem_after"]
            gain, error = mean_and_error([b - a for a, b in zip(before, after, strict=True)])
            print(f"change: {gain:+.3f} ± {error:.3f}, paired by problem\n")
            for row in result["answers"][:3]:
                print(f"  {str(row['problem'])[-300:]}  gold {row['answer']}")
                print(f"    reward {row['rewards'][0]:g}: {row['responses'][0][:600]}")
        self.write_summary()
        self.write("model/README.md", model_card(self))
        print(f"\nmodel: {self.folder}/model   metrics: {self.folder}/metrics.jsonl   "
              f"figure: python -m analysis.plot {self.folder}")
        return result


def some_answers(step: int, problems: list[dict], rollout, rewards) -> list[dict]:
    """Rows of rollouts.jsonl: the first answers to the first two problems."""
    n = len(rollout.texts) // len(problems)
    rows = []
    for place, problem in enumerate(problems[:2]):
        for i in range(place * n, place * n + min(n, SHOWN // 2)):
            rows.append({
                "step": step,
                "problem": problem["problem"],
                "answer": problem.get("answer"),
                "reward": None if rewards is None else rewards.flatten()[i].item(),
                "length": int(rollout.lengths[i]),
                "finished": bool(rollout.finished[i]),
                "text": rollout.texts[i]})
    return rows


def model_card(run) -> str:
    """README.md of model/: base, method, data, command, accuracy before and after."""
    lines = ["---", f"base_model: {run.args.model}", "library_name: transformers", "---", "",
             f"# {run.args.model}, trained by {run.name}.py", "",
             f"Data: {run.args.data}, {len(run.train)} problems. Command: `{' '.join(sys.argv)}`.",
             f"Steps: {run.args.steps}. Seed: {run.args.seed}."]
    for when in ("before", "after"):
        if f"avg_at_k_{when}" in run.summary:
            lines.append(f"Avg@{EVAL_K} {when}, {len(run.held_out)} held-out problems: "
                         f"{run.summary[f'avg_at_k_{when}']:.3f} ± "
                         f"{run.summary[f'standard_error_{when}']:.3f}.")
    return "\n".join(lines) + "\n"


def commit() -> str | None:
    """The commit of this code, if it lies in a git repository."""
    here = pathlib.Path(__file__).parent
    try:
        found = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True,
                               text=True)
    except OSError:
        return None
    return found.stdout.strip() or None


def new_folder(place: pathlib.Path, exact: bool) -> pathlib.Path:
    """Makes a folder and no other run's: the place itself if exact, else place, place-2, ..."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if exact:
        place.mkdir(exist_ok=True)
        return place
    number = 1
    folder = place
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
            folder = place.with_name(f"{place.name}-{number}")


def read_json(text: str, place: pathlib.Path) -> dict:
    """An object of one of a run's files. BadInput if it is damaged."""
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise BadInput(f"{place}: damaged, {error}") from error


def json_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
