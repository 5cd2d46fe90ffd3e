"""A run's book-keeping: set-up, its folder, metrics, checkpoints, evaluation before and after. Knows no algorithm.

    run = start(cfg, "grpo")               # loads, checks, prints; nothing is written before everything has been checked
    for step in run.steps():               # evaluates first; a tqdm bar; checkpoints; Ctrl-C ends it after the current step
        with run.clock("sampling"): ...    # seconds go into the metrics
        run.log(rollout, rewards, parts, gaps)    # one row of metrics.jsonl
    run.finish()                           # evaluates, saves the model, prints where everything lies

Nothing random is kept between steps: data order and answers follow from (seed, step). So a checkpoint is the weights, the
optimiser and a step number, and a resumed run gives the weights of an uninterrupted one. Every file and folder is written
beside its place and renamed into it: whatever moment a run dies at, what has its final name is whole.
"""
import contextlib
import json
import math
import os
import pathlib
import platform
import signal
import statistics
import time

import torch
import transformers
from tqdm import tqdm

from common.checkpoints import (
    clean,
    newest,
    save_model,
    sync,
    tell_small_disk,
    whole_folder,
    whole_weights,
    write_atomically,
    write_checkpoint,
    writing,
)
from common.data import encode_prompts, load_train_and_eval
from common.distributed import everyone, rank, size, split_like, total, whole
from common.errors import BadInput
from common.evaluate import describe, evaluate
from common.flags import read_config
from common.models import causal_lm, load_model, load_tokenizer, memory_plan, peak_bytes
from common.optim import MasterAdamW
from common.plot import plot_run


class Run:
    """One run: .cfg .folder .model .tokenizer .optimizer .train .held_out, filled by start(); .rows (metrics), .summary."""

    def __init__(self, cfg, name: str):
        self.cfg, self.name, self.seconds, self.notes = cfg, name, {}, set()
        self.first, self.checkpoint, self.stopping, self.parts = 0, None, False, {}
        self.folder = pathlib.Path(everyone(cfg.resume or cfg.output or str(self.free_folder(name)))[0])
        if not cfg.resume and self.folder.exists() and (
                not self.folder.is_dir() or any(path.suffix != ".tmp" for path in self.folder.iterdir())):
            raise BadInput(f"--output {self.folder}: holds something already; take another folder, or --resume {self.folder}")
        if cfg.resume:
            self.find_checkpoint()
        summary = self.folder / "summary.json"
        self.summary = json.loads(summary.read_text()) if cfg.resume and summary.exists() else {}

    @staticmethod
    def free_folder(name: str) -> pathlib.Path:
        numbered = (pathlib.Path("runs") / (name if i == 1 else f"{name}-{i}") for i in range(1, 10_000))
        return next(folder for folder in numbered if not folder.exists())

    def find_checkpoint(self) -> None:
        """With --resume: the .checkpoint to go on from and its step, .first; None and 0 if the run died before the first one."""
        config, flags = read_config(self.folder), vars(self.cfg)
        if config["script"] != self.name:
            raise BadInput(f"--resume {self.folder}: a run of {config['script']}.py, not of {self.name}.py")
        for name in ("model", "dtype", "lora_rank"):  # a checkpoint fits no others
            had = config["flags"].get(name, flags[name])
            if flags[name] != had:
                raise BadInput(f"--{name.replace('_', '-')} {flags[name]}: the run in {self.folder} has {had}, and keeps it")
        self.checkpoint, self.first = newest(self.folder, self.name)
        if self.first > self.cfg.steps:
            raise BadInput(f"--steps {self.cfg.steps}: the run in {self.folder} has done {self.first} already")

    def attach(self, name: str, part):
        """Keeps part, anything with state_dict and load_state_dict, as <name>.pt in checkpoints -> part, restored on --resume."""
        self.parts[name] = part
        if self.checkpoint:
            try:
                saved = torch.load(self.checkpoint / f"{name}.pt", "cpu", weights_only=True, mmap=size() > 1)
                now = part.state_dict()
                part.load_state_dict({key: split_like(value, now[key]) if torch.is_tensor(value) and key in now else value
                                      for key, value in saved.items()})
            except Exception as error:  # a stranger's file fails in any way it likes
                reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
                raise BadInput(f"{self.checkpoint}/{name}.pt does not fit this run: {reason[0][:200]}") from error
        return part

    def begin(self) -> None:
        """Makes the folder, or brings an old one back to its checkpoint: rows of steps that will be done again are dropped."""
        if rank() == 0:
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                clean(self.folder)
        self.write("config.json", json.dumps({
            "script": self.name, "flags": {**vars(self.cfg), "resume": None, "output": str(self.folder)},
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__,
                         "python": platform.python_version()},
        }, indent=1))
        self.write("summary.json", json.dumps(self.summary, indent=1))  # what a script chose before its first step
        metrics = self.folder / "metrics.jsonl"
        lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []  # a line cut short has no end
        self.rows = [row for row in map(json.loads, lines) if row["step"] <= self.first]
        self.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))

    def write(self, name: str, text: str) -> None:
        if rank() == 0:
            with writing(self.folder):
                write_atomically(self.folder / name, text)

    def steps(self):
        """Yields the steps that remain, 0-based. The folder is made here: what a script checks before leaves nothing behind."""
        cfg = self.cfg
        self.begin()
        if self.held_out and self.first == 0 and "avg_at_k_before" not in self.summary:
            self.measure("before")
        self.started = time.time()
        previous = {s: signal.signal(s, self.ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        self.bar = tqdm(total=cfg.steps, initial=self.first, desc=self.name, unit="step", dynamic_ncols=True,
                        disable=rank() > 0)
        try:
            for step in range(self.first, cfg.steps):
                self.step, self.seconds, self.updates = step, {}, self.count_updates()
                torch.manual_seed(cfg.seed * 100_000 + step)  # dropout, if a model has any, follows from (seed, step) as well
                yield step
                self.bar.update()
                stuck = 5 == sum(bool(row.get("skipped")) or math.isnan(row.get("entropy", 0.0)) for row in self.rows[-5:])
                asked = self.stopping or (self.folder / "stop").exists()
                self.stopping = total(int(asked)) > 0  # a signal may have reached one rank before the other
                if self.stopping or stuck or (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
                    self.save(step + 1)
                if self.stopping and rank() == 0:
                    (self.folder / "stop").unlink(missing_ok=True)
                if stuck:
                    raise BadInput(f"step {step + 1} is the fifth in a row without sane numbers: {self.diagnosis()}")
                if self.stopping and step + 1 < cfg.steps:
                    self.bar.close()
                    print(f"stopped after step {step + 1}, nothing is lost; go on: python {self.name}.py --resume {self.folder}")
                    raise SystemExit(130)
        finally:
            self.bar.close()
            for s, handler in previous.items():
                signal.signal(s, handler)

    def ask_to_stop(self, signum, _frame) -> None:
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        os.write(2, b"\nfinishing this step, then saving (press Ctrl-C again to leave at once)\n")  # print may be what it cut

    @contextlib.contextmanager
    def clock(self, part: str):
        """Adds the seconds of a block to `seconds_<part>` of the current step. Memory that runs out in it is one line."""
        started = time.perf_counter()
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "CPUAllocator" not in str(error):
                raise
            raise self.out_of_memory(part) from error
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started

    def count_updates(self) -> list[int]:
        return [part.updates for part in self.parts.values() if hasattr(part, "updates")]

    def out_of_memory(self, part: str) -> BadInput:
        """In training a run is taken up once more, as --resume does, with half the micro-batch: no gradient counts twice.

        If nothing has been updated since the step began, its start becomes a checkpoint; else the last one is gone back to.
        """
        now = self.cfg.micro_batch_tokens
        lower = {"training": f"--micro-batch-tokens {now}", "evaluating": "--eval-k or --max-new-tokens"}
        error = BadInput(f"out of memory while {part}: lower {lower.get(part, '--group-size or --max-new-tokens')}, "
                         f"then --resume {self.folder}")
        if part == "training" and now > 1 and size() == 1:
            if self.step > self.first and self.updates == self.count_updates():
                self.save(self.step)
            error.retry = ["--resume", str(self.folder), "--micro-batch-tokens", str(now // 2)]
        return error

    def diagnosis(self) -> str:
        """Why no update could be made, as far as it can be seen, and what to do."""
        broken = next((name for name, weight in self.model.named_parameters() if not weight.isfinite().all()), None)
        if broken:
            return f"the weights are not finite ({broken}), take another --model"
        what = "gradient is" if math.isfinite(self.rows[-1].get("loss", 0.0)) else "loss and its gradient are"
        return f"the weights are finite, the {what} not; lower --lr with --resume {self.folder}, or start anew in --dtype float32"

    def log(self, rollout=None, rewards=None, parts=(), gaps=(), **values) -> None:
        """Writes one row for the current step, of all ranks together, shows the bar, warns of what tends to go wrong.

        rollout and rewards ((P, G) or None) add reward, length, share truncated, entropy (nats, of the policy that was sampled,
        mean over tokens) and the share of groups without signal. parts: metrics of micro-batches, summed and divided by
        the updates of the step (names in _max: the largest). gaps: tensors of log-prob differences between the trainer and
        the sampler on the same weights and tokens, nats; their mean and largest size are logged.
        """
        gap = torch.cat([gap.abs() for gap in gaps]) if gaps else torch.zeros(0)                # (N,)
        row, ranks = {"step": self.step + 1}, everyone({
            "rewards": None if rewards is None else rewards.tolist(), "lengths": rollout.lengths.tolist() if rollout else [],
            "finished": rollout.finished.tolist() if rollout else [], "entropy": rollout.entropy.sum().item() if rollout else 0.0,
            "parts": [{name: x for name, x in part.items() if rank() == 0 or not name.endswith("grad_norm")} for part in parts],
            "gap": (gap.sum().item(), len(gap), gap.max().item() if len(gap) else 0.0), "peak": peak_bytes(), "values": values})
        together = lambda name: [x for of in ranks for x in of[name] or ()]
        if rollout is not None:
            lengths, groups = together("lengths"), together("rewards")
            answers, tokens = len(lengths), sum(lengths)
            if groups:
                row |= {"reward": statistics.fmean(x for group in groups for x in group),
                        "no_signal": statistics.fmean(min(group) == max(group) for group in groups)}
            row |= {"length": tokens / answers, "truncated": 1 - sum(together("finished")) / answers,
                    "entropy": sum(of["entropy"] for of in ranks) / max(1, tokens),
                    "tokens": tokens, "tokens_per_second": tokens / sum(self.seconds.values())}
        updates, parts = getattr(self.cfg, "updates_per_rollout", 1) * getattr(self.cfg, "ppo_epochs", 1), together("parts")
        for name in sorted({name for part in parts for name in part}):
            found = [part[name] for part in parts if name in part]
            row[name] = max(found) if name.endswith("_max") else sum(found) / updates
        if "grad_norm" in row:
            row["skipped"] = sum(not math.isfinite(part.get("grad_norm", 0.0)) for part in parts)
        gaps, counts, largest = zip(*(of["gap"] for of in ranks))
        if sum(counts):
            row |= {"gap_mean": sum(gaps) / sum(counts), "gap_max": max(largest)}
        mean = lambda of: of[0] if all(x == of[0] for x in of) else statistics.fmean(of)
        row |= {name: mean([of["values"][name] for of in ranks]) for name in values}
        row |= {f"seconds_{part}": s for part, s in self.seconds.items()} | {"peak_gb": max(of["peak"] for of in ranks) / 2**30}
        row = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}
        self.rows.append(row)
        if rank() == 0:
            with writing(self.folder), open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
        shown = {"reward": "reward", "loss": "loss", "length": "length", "entropy": "entropy", "tokens_per_second": "tok/s"}
        skipped = sum(row.get("skipped", 0) for row in self.rows)
        self.bar.set_postfix({short: f"{row[name]:.3g}" for name, short in shown.items() if name in row} | (
            {"skipped": skipped} if skipped else {}))
        self.warn(row)

    def warn(self, row: dict) -> None:
        """Says once what a row shows to be wrong."""
        first = next((r["entropy"] for r in self.rows if "entropy" in r), math.inf)
        for key, seen, line in (
            ("truncated", row.get("truncated", 0) > 0.5,
             "over half of the answers hit --max-new-tokens before they ended: raise it"),
            ("signal", row.get("no_signal", 0) > 0.8 and "value_loss" not in row,  # a critic needs no group
             "in over 80 % of the groups all answers are right or all wrong, nothing to learn: other problems or larger groups"),
            ("entropy", "reward" in row and row["entropy"] < 0.1 * first,  # without rewards to fall is its purpose
             "the entropy has fallen below a tenth of its start, groups will soon be all right or all wrong: lower --lr"),
            ("finite", row.get("skipped"),
             "the loss or its gradient is not finite, so the update was left out; five such steps in a row end the run"),
        ):
            if seen and key not in self.notes:
                self.notes.add(key)
                tqdm.write(f"note: step {row['step']}: {line}")

    def measure(self, when: str) -> dict:
        """Evaluates on the held-out problems, prints the line, keeps it in summary.json."""
        with self.clock("evaluating"):
            result = evaluate(self.model, self.tokenizer, self.held_out, self.cfg.eval_k, self.cfg.max_new_tokens, seed=10_000,
                              label=f"evaluating {when}")
        print(f"{when + ':':7} {describe(result)}", flush=True)
        self.summary |= {f"avg_at_k_{when}": result["avg_at_k"], f"standard_error_{when}": result["standard_error"],
                         f"pass_at_{when}": result["pass_at"], f"length_{when}": result["length"],
                         f"reflection_{when}": result["reflection"], "k": self.cfg.eval_k}
        self.write("summary.json", json.dumps(self.summary, indent=1))
        return result

    def save(self, step: int) -> None:
        """A checkpoint after `step` steps, the same for any number of ranks; the last two stay."""
        folder = self.folder / "checkpoints" / f"step-{step:06}"
        weights, states = whole_weights(self.model), {name: whole(part.state_dict()) for name, part in self.parts.items()}
        if rank() > 0:
            return
        with writing(self.folder):
            sync(self.folder / "metrics.jsonl")  # rows up to here are not made again
            write_checkpoint(folder, self.model, self.tokenizer, weights, states, self.name, step)

    def finish(self) -> None:
        """Evaluates, saves the model, draws curve.png, prints sample answers and where everything lies."""
        weights = whole_weights(self.model)
        if rank() == 0:
            with writing(self.folder), whole_folder(self.folder / "model") as temporary:
                save_model(self.model, self.tokenizer, temporary, weights)
        if self.held_out:
            result = self.measure("after")
            if "avg_at_k_before" in self.summary:
                gain, error = (self.summary["avg_at_k_after"] - self.summary["avg_at_k_before"],
                               math.hypot(self.summary["standard_error_after"], self.summary["standard_error_before"]))
                print(f"change: {gain:+.3f} ± {error:.3f}\n")
            for row in result["answers"][:3]:
                verdict = "right" if row["correct"][0] else "wrong"
                print(f"  {str(row['problem'])[-300:]}  gold {row['answer']}\n    {verdict}: {row['responses'][0][:600]}")
        seconds = self.summary.get("seconds", 0) + time.time() - self.started
        self.summary |= {"seconds": round(seconds, 1), "steps": len(self.rows)}
        self.write("summary.json", json.dumps(self.summary, indent=1))
        if rank() > 0:
            return
        with writing(self.folder):
            plot_run(self.folder)
        if self.cfg.merge and self.cfg.lora_rank:
            with writing(self.folder), whole_folder(self.folder / "merged") as temporary:
                merged = self.model if size() == 1 else load_model(
                    self.cfg.model, "cpu", self.cfg.dtype, self.cfg.lora_rank, str(self.folder / "model"), split=False)
                save_model(merged.merge_and_unload(), self.tokenizer, temporary)
        print(f"\nmodel: {self.folder}/model   metrics: {self.folder}/metrics.jsonl   figure: {self.folder}/curve.png")


def start(cfg, name: str) -> Run:
    """Checks and loads everything a run needs, prints what a reader should see before it begins -> Run. Raises BadInput."""
    if cfg.offload_optimizer and size() > 1:
        raise BadInput(f"--offload-optimizer: for one process; {size()} split the optimiser already")
    run = Run(cfg, name)
    torch.manual_seed(cfg.seed)  # only new adapters draw from it: everything later has generators of its own
    run.tokenizer = load_tokenizer(cfg.model)
    saved = str(run.checkpoint / "model") if run.checkpoint else None
    weights, adapter = (cfg.model, saved) if cfg.lora_rank else (saved or cfg.model, None)
    run.model = load_model(weights, cfg.device, cfg.dtype, cfg.lora_rank, adapter, cuda_graphs=cfg.cuda_graphs)
    context = causal_lm(run.model).config.max_position_embeddings
    train, held_out = load_train_and_eval(cfg)
    prompts = (cfg.system, cfg.thinking, context - cfg.max_new_tokens)
    run.train, run.held_out = (encode_prompts(run.tokenizer, rows, *prompts) for rows in (train, held_out))
    run.optimizer = run.attach("optimizer", MasterAdamW(run.model, cfg.lr, offload=cfg.offload_optimizer))
    run.model.train()  # for gradient checkpointing; sampling switches to eval by itself
    lm, first = causal_lm(run.model), run.train[0]
    weight = next(lm.parameters())
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    numel = sum(p.numel() for p in lm.parameters())
    print(f"model: {cfg.model}, {lm.config.model_type}, {numel / 1e6:.2f} M parameters ({trained / 1e6:.2f} M trained), "
          f"{lm.config.num_hidden_layers} blocks, {weight.dtype} on {weight.device}, {torch.get_num_threads()} thread(s)")
    print(f"data:  {cfg.data}, {len(run.train)} problems to train on, {len(run.held_out)} held out")
    print(f"first prompt ({len(first['prompt'])} tokens): {run.tokenizer.decode(first['prompt'])!r} -> gold {first['answer']!r}")
    rows = cfg.prompts_per_step * cfg.group_size // size()
    tokens = cfg.max_new_tokens + max(len(row["prompt"]) for row in run.train)
    frozen, critic = getattr(cfg, "kl_coef", 0) > 0 and not cfg.lora_rank, getattr(cfg, "critic", "") == "copy"
    plan = memory_plan(run.model, rows, tokens, cfg.micro_batch_tokens, None, frozen, cfg.offload_optimizer, critic)
    scale, unit = (1, "GiB") if plan["peak"] >= 1 else (1024, "MiB")
    print(f"memory plan, {unit}: " + ", ".join(f"{part} {gib * scale:.1f}" for part, gib in plan.items() if gib))
    item = (getattr(lm, "narrow", None) or weight.dtype).itemsize
    masters = item < 4 or size() > 1 or cfg.offload_optimizer
    one = ((trained if cfg.lora_rank else numel) * item + trained * (8 + 4 * masters)) * (1 + critic)  # weights, moments, masters
    tell_small_disk(run.folder, one)
    if cfg.resume:
        print(f"going on from step {run.first} of {cfg.steps} in {run.folder}" + " (no checkpoint yet)" * (not run.checkpoint))
    return run
