"""A run's book-keeping: its model, data and folder, metrics, checkpoints. Knows no algorithm.

    run = Run("grpo", args, reward)               # loads, checks, prints; nothing is written yet
    for step in range(run.begin(optimizer), args.steps):
        ...
        run.log(step, problems, rollout, rewards, parts, grad_norms)     # a row of metrics.jsonl
        run.save(step + 1)                                     # a checkpoint when one is due
    run.finish()                                               # evaluates again, saves the model

Nothing random is kept between steps: data order and answers follow from (seed, step). So a
checkpoint is weights, moments and what has been logged, and on a CPU a resumed run ends with the
very weights of an uninterrupted one. Every file but those of model/ is written under another name
and renamed, so a kill leaves the old one or the new one.
"""
import importlib
import itertools
import json
import math
import pathlib
import statistics
import subprocess
import sys
import time

import torch
import transformers
from tqdm import tqdm

from common.data import (
    drop_long_prompts,
    encode_prompt,
    fingerprint,
    load_train_and_eval,
    write_whole,
)
from common.distributed import everyone, rank, size, split_like, total, whole
from common.evaluate import describe, evaluate, mean_and_error
from common.flags import BadInput, read_config
from common.logprobs import check_model
from common.models import end_of_turn, load_model, load_tokenizer, memory_estimate

EVAL_K = 8   # answers to each held-out problem
SAVES = 10   # checkpoints in a run, evenly spaced; only the newest is kept
SHOWN = 4    # answers per step in rollouts.jsonl
FIXED = ("script", "model", "seed", "lora_rank", "layer", "data_hash")  # --resume keeps these


class Run:
    """Public: args, model, tokenizer, train and held_out (rows), folder, summary, rows."""

    def __init__(self, name, args, reward):
        """Loads and checks everything. reward(text, row) rates held-out answers. BadInput."""
        self.name = name
        self.args = args
        self.reward = reward
        self.summary = {}
        self.rows = []     # of metrics.jsonl
        self.answers = []  # of rollouts.jsonl
        self.tensors = []  # of the checkpoint to resume from
        self.warned = set()
        args.output = args.resume or args.output
        self.folder = pathlib.Path(args.output or f"runs/{name}")
        if args.output and not args.resume and any(self.folder.glob("*")):
            raise BadInput(f"--output {self.folder}: holds something already; take another folder, "
                           f"or --resume {self.folder}")
        updates = size() * getattr(args, "updates_per_rollout", 1)
        if getattr(args, "prompts_per_step", updates) % updates:
            raise BadInput(f"--prompts-per-step {args.prompts_per_step}: must be divisible by "
                           f"--updates-per-rollout x processes, {updates}")
        if args.track:
            importlib.import_module(args.track)  # if it is not there, that is known at once
        train, held_out = load_train_and_eval(args)
        here = pathlib.Path(__file__).parent
        self.config = {
            "script": name,
            "command": sys.argv,
            "data_hash": fingerprint(train, held_out),
            "commit": subprocess.getoutput(f"git -C '{here}' rev-parse HEAD"),  # or why none
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "flags": vars(args)}
        if args.resume:
            self.resume()
        torch.manual_seed(args.seed)  # new adapters draw from it
        self.tokenizer = load_tokenizer(args.model)
        self.model = load_model(args).train()  # sampling switches to eval by itself
        longest = self.model.config.max_position_embeddings - args.max_new_tokens
        self.train = drop_long_prompts(self.tokenizer, train, args.system, longest)
        self.held_out = drop_long_prompts(self.tokenizer, held_out, args.system, longest)
        self.check_and_print()

    def resume(self):
        """Reads config.json and checkpoint. BadInput if they are damaged or another run's."""
        config = read_config(self.folder)
        had = {**config["flags"], **config}
        has = {**vars(self.args), **self.config}
        for name in FIXED:
            if had.get(name) != has.get(name):
                raise BadInput(f"--resume {self.folder}: {name} is {had.get(name)} there and "
                               f"{has.get(name)} here, and must be the same")
        self.config = {**self.config, **config, "flags": vars(self.args)}
        place = self.folder / "checkpoint.pt"
        try:
            state = torch.load(place, "cpu", weights_only=True, mmap=True)
            self.summary, self.rows, self.answers, self.tensors = state
        except FileNotFoundError:
            pass  # killed before the first one: starts from the beginning
        except Exception as error:  # a damaged file fails in any way it likes
            raise BadInput(f"{place}: cannot be resumed from ({type(error).__name__})") from error

    def check_and_print(self):
        """Checks the model on the first prompt, prints model, data, that prompt, memory."""
        prompt = self.encode(self.train[:1])[0]
        check_model(self.model, self.tokenizer, prompt)
        end = end_of_turn(self.tokenizer)
        if end not in (None, self.tokenizer.eos_token_id):
            print(f"note: answers also end at {self.tokenizer.decode(end)!r}, with which the chat "
                  "template ends a turn")
        print(f"model: {self.args.model}, {self.model.num_parameters() / 1e6:.2f} M parameters, "
              f"{self.model.compute_dtype} on {self.model.device}")
        print(f"{len(self.train)} problems to train on, {len(self.held_out)} held out")
        print(f"first prompt ({len(prompt)} tokens): {self.tokenizer.decode(prompt)!r} "
              f"-> gold {self.train[0]['answer']!r}")
        print(memory_estimate(self.model, self.args.micro_batch_tokens))

    def encode(self, rows):
        """The prompts of some rows as token ids."""
        return [encode_prompt(self.tokenizer, row["problem"], self.args.system) for row in rows]

    def make_folder(self):
        """Makes the folder, unless it is there, and writes config.json. begin() does this too."""
        args = self.args
        if rank() == 0 and args.output is None:
            args.output = str(new_folder(self.folder))
        args.output = everyone(args.output)[0]
        self.folder = pathlib.Path(args.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config["device"] = str(self.model.device)
        self.write("config.json", json.dumps(self.config, indent=1))

    def begin(self, optimizer, *others):
        """Restores the checkpoint, or evaluates and saves a first one -> the first step to make.

        others: tensors that checkpoints keep beside the optimiser's weights and moments.
        """
        self.optimizer = optimizer
        self.kept = list(others)
        for group in optimizer.param_groups:
            self.kept += [weight for weight in group["params"] if weight.requires_grad]
        if self.tensors:
            self.restore()
        self.make_folder()
        self.write_logs()  # without steps that are made again
        if self.held_out and "avg_at_k_before" not in self.summary:
            self.measure("before")
        first = len(self.rows)
        if first == 0:
            self.save(0)
        self.track = None
        if self.args.track and rank() == 0:
            self.track = tracker(self.args.track, self.folder, vars(self.args))
        self.bar = tqdm(total=self.args.steps, initial=first, desc=self.name, unit="step",
                        disable=rank() > 0)
        self.started = time.perf_counter()
        return first

    def restore(self):
        """Puts the checkpoint's tensors and their moments back; the learning rate is the flag's.
        BadInput if they are another model's, or more steps are done than are asked for."""
        done = len(self.rows)
        if done > self.args.steps:
            raise BadInput(f"--steps {self.args.steps}: {done} are done in {self.folder}")
        try:
            for tensor, saved in zip(self.kept, self.tensors, strict=True):
                moments = {name: split_like(value, tensor) for name, value in saved.items()}
                tensor.data.copy_(moments.pop("value"))
                if moments:
                    self.optimizer.state[tensor] = moments
        except (ValueError, RuntimeError) as error:  # fewer tensors, other shapes
            raise BadInput(f"--resume {self.folder}: its checkpoint is another model's") from error
        self.tensors = []  # closes the file
        print(f"resuming at step {done} of {self.args.steps} in {self.folder}")

    def write(self, name, text):
        if rank() == 0:
            write_whole(self.folder / name, text)

    def write_logs(self):
        self.write("metrics.jsonl", json_lines(self.rows))
        self.write("rollouts.jsonl", json_lines(self.answers))

    def log(self, step, problems=(), rollout=None, rewards=None, parts=(), grad_norms=(),
            **values):
        """Writes a row of metrics of all ranks together and some answers, moves the bar, warns.

        problems: the rows that rollout answers. It adds length, share cut off and entropy (nats,
        mean over tokens); rewards (P, G) their mean and the share of groups without signal.
        parts: metrics of micro-batches, summed over an update; of names ending in _max the
        largest is taken. grad_norms: one per update.
        """
        done = step + 1
        row = {"step": done, **values, "seconds": time.perf_counter() - self.started}
        if rewards is not None:
            row["reward"] = mean(rewards)
            row["no_signal"] = mean(rewards.amax(1) == rewards.amin(1))
        if rollout is not None:
            tokens = total(rollout.lengths)
            row["length"] = mean(rollout.lengths)
            row["truncated"] = 1 - mean(rollout.finished)
            row["entropy"] = total(rollout.entropy) / tokens
            row["tokens_per_second"] = tokens / row["seconds"]
            self.answers += some_answers(done, problems, rollout, rewards)
        for name in parts[0] if parts else ():
            found = [part[name] for part in parts]
            if name.endswith("_max"):
                row[name] = max(map(max, everyone(found)))
            else:
                row[name] = total(sum(found)) / len(grad_norms)
        row["grad_norm"] = statistics.fmean(grad_norms)
        row["skipped"] = sum(not math.isfinite(norm) for norm in grad_norms)
        every = self.args.eval_every
        if every and done % every == 0 and done < self.args.steps and self.held_out:
            row["avg_at_k"] = self.measure(f"step {done}")["avg_at_k"]
        self.rows.append(row)
        self.write_logs()
        if self.track:
            self.track(row, step=done)
        shown = ("reward", "loss", "length", "entropy", "tokens_per_second")
        self.bar.set_postfix({name: f"{row[name]:.3g}" for name in shown if name in row})
        self.bar.update()
        self.warn(row)
        self.started = time.perf_counter()

    def warn(self, row):
        """Says once what a row shows to be wrong."""
        exact = self.model.compute_dtype == torch.float32
        notes = {
            "over half of the answers are cut off at --max-new-tokens, which is wrong: raise it":
                row.get("truncated", 0) > 0.5,
            "over 80 % of the groups are all right or all wrong, nothing to learn from: other "
            "problems, or larger groups":
                row.get("no_signal", 0) > 0.8,
            "the entropy is below a tenth of its start, answers will soon be all alike: lower --lr":
                "reward" in row and row["entropy"] < 0.1 * self.rows[0]["entropy"],
            "sampler and trainer differ by over 0.1 nats on a token (in bfloat16: 1): what is "
            "trained is not what was sampled":
                row.get("gap_max", 0) > (0.1 if exact else 1.0),
            "a gradient was not finite, its update was left out":
                row["skipped"] > 0}
        for note, holds in notes.items():
            if holds and note not in self.warned:
                self.warned.add(note)
                tqdm.write(f"note: step {row['step']}: {note}")

    def measure(self, when):
        """Evaluates on the held-out problems, with the same random numbers each time, prints the
        line and keeps it in the summary as <name>_<when> -> what evaluate() gives."""
        result = evaluate(
            self.model, self.tokenizer, self.held_out, self.reward, EVAL_K,
            self.args.max_new_tokens,
            seed=10_000,
            system=self.args.system)
        tqdm.write(f"{when + ':':7} {describe(result)}")
        self.summary["k"] = EVAL_K
        for name in ("avg_at_k", "standard_error", "pass_at", "length", "by_problem"):
            self.summary[f"{name}_{when}"] = result[name]
        return result

    def save(self, step):
        """A checkpoint after `step` steps, if one is due. OSError if it cannot be written."""
        if step % max(1, self.args.steps // SAVES) and step < self.args.steps:
            return
        tensors = []
        for tensor in self.kept:
            saved = {"value": tensor.data, **self.optimizer.state[tensor]}
            tensors.append({name: whole(value) for name, value in saved.items()})
        if rank() > 0:
            return
        temporary = self.folder / "checkpoint.tmp"
        try:
            torch.save((self.summary, self.rows, self.answers, tensors), temporary)
        except RuntimeError as error:  # what torch raises where the disk is full
            raise OSError(f"{temporary} cannot be written: is the disk full?") from error
        temporary.replace(self.folder / "checkpoint.pt")
        self.started = time.perf_counter()  # writing is no part of the next step

    def finish(self):
        """Saves the model, evaluates, says where all is -> what measure() gave."""
        result = None
        self.bar.close()
        self.summary["seconds"] = round(sum(row["seconds"] for row in self.rows), 1)
        save_model(self.folder, self.model, self.tokenizer, self.args)
        if self.held_out:
            result = self.measure("after")
            before, after = self.summary["by_problem_before"], self.summary["by_problem_after"]
            gain, error = mean_and_error([b - a for a, b in zip(before, after, strict=True)])
            print(f"change: {gain:+.3f} ± {error:.3f}, paired by problem")
        self.write("summary.json", json.dumps(self.summary, indent=1))
        self.write("model/README.md", model_card(self))
        print(f"model: {self.folder}/model   figure: python -m analysis.plot {self.folder}")
        return result


def mean(tensor):
    """Of a tensor's elements on all ranks."""
    return total(tensor) / total(tensor.numel())


def save_model(folder, model, tokenizer, args):
    """folder/model, an ordinary save_pretrained folder, or the adapters in peft's format.

    With --merge the adapters are also merged into the model, in folder/merged. Every rank must
    call it, the first one writes.
    """
    dtype = model.compute_dtype
    saved = model.adapters[0] if model.adapters else model
    state = {}
    for name, weight in saved.state_dict().items():
        if "lora_" in name or not model.adapters:
            state[name] = whole(weight.to(dtype))
    if rank() > 0:
        return
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)  # a second copy of the embedding
    saved.save_pretrained(folder / "model", state_dict=state)
    if not model.adapters:  # save_pretrained writes the dtype of the weights that are trained
        model.config.dtype = dtype
        model.config.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    if model.adapters and args.merge:
        from peft import PeftModel
        base = load_model(args, trained=False, split=False)
        merged = PeftModel.from_pretrained(base, folder / "model").merge_and_unload()
        merged.save_pretrained(folder / "merged")
        tokenizer.save_pretrained(folder / "merged")


def some_answers(step, problems, rollout, rewards):
    """Rows of rollouts.jsonl: the first answers of a step."""
    rows = []
    for i, text in enumerate(rollout.texts[:SHOWN]):
        problem = problems[i * len(problems) // len(rollout.texts)]
        rows.append({
            "step": step,
            "problem": problem["problem"],
            "answer": problem.get("answer"),
            "reward": None if rewards is None else rewards.flatten()[i].item(),
            "length": rollout.lengths[i].item(),
            "finished": rollout.finished[i].item(),
            "text": text})
    return rows


def model_card(run):
    """README.md of model/: base, method, data, command, accuracy before and after."""
    args = run.args
    card = f"""---
base_model: {args.model}
library_name: transformers
---

# {args.model}, trained by {run.name}.py

Data: {args.data}, {len(run.train)} problems. Command: `{' '.join(sys.argv)}`.
"""
    for when in ("before", "after") if run.held_out else ():
        average, error = run.summary[f"avg_at_k_{when}"], run.summary[f"standard_error_{when}"]
        card += (f"Avg@{EVAL_K} {when}, {len(run.held_out)} held-out problems: "
                 f"{average:.3f} ± {error:.3f}.\n")
    return card


def tracker(kind, folder, flags):
    """--track: opens a run in wandb, trackio or tensorboard -> log(numbers, step)."""
    if kind != "tensorboard":
        library = importlib.import_module(kind)
        return library.init(project="reasoning", name=folder.name, config=flags).log
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(folder)

    def log(numbers, step):
        for name, number in numbers.items():
            writer.add_scalar(name, number, step)
    return log


def new_folder(place):
    """Makes the first of place, place-2, place-3, ... that no other run has."""
    folder = place
    for number in itertools.count(2):
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            folder = place.with_name(f"{place.name}-{number}")


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)
