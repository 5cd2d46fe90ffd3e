"""Long chain-of-thought by fine-tuning: take a teacher's long answers, keep those that come out right, imitate them.

Paper: Demystifying Long Chain-of-Thought Reasoning in LLMs (arXiv 2502.03373), sections 3 to 5; ppo.py is its RL half.
Run:   python long_cot_sft.py                                   the embedded model learns to check itself, a minute on a laptop
       python long_cot_sft.py --teacher-style short             the paper's rival: short chains, sampled at temperature 0.7
       python long_cot_sft.py --source construct                chains built action by action instead of sampled whole
       python long_cot_sft.py --label-noise 0.3 --filter agree  labels of which three in ten are wrong, and a filter
       python long_cot_sft.py --model Qwen/Qwen2.5-Math-7B --traces demystify-long-cot/math-train-qwq-rs-n32
       python ppo.py --model runs/long_cot_sft                  reinforcement learning after it
See:   the share of answers kept and a histogram of their lengths; then the loss falls within one pass, and the student, unasked,
       writes the teacher's long chains: answers grow longer, more of them are right, "wait" appears.
       <run>/traces.jsonl is what it learnt from, <run>/problems.jsonl the labels, for --data of ppo.py or grpo.py.

The teacher shares the student's device while it samples. One that needs a server is sampled there; its answers come by --traces.

Deviations ledger: paper | the authors' code | here, and why
  problems         | 7,500 of MATH | the same | the training part of --data
  long chains      | QwQ-32B-Preview, T 1, top-p 0.95, 8,192 tokens | data sets released | --teacher-style long, as there;
      the embedded teacher is asked for its long style, which the student's prompt does not name
  short chains     | Qwen2.5-Math-72B-Instruct, T 0.7, top-p 0.95, 4,096 tokens; T 1 failed | the same | --teacher-style short
  answers a problem| N in 32 .. 256, all right ones kept | the same | --samples; repeated ones once, those that did not end never
  verifier         | SymEval | SymEval for the data, strings by default in RL | common/verify.py
  SFT              | batch 256, lr 5e-6, 2 epochs, 128k tokens | Adam betas 0.9 and 0.95, no decay, clip 1, cosine to 10 %, 3 % of
      warm-up from 0 | the same for larger models; warm-up from the first share; longer than the context: dropped and counted
  loss             | not said | mean per answer (micro-batch 1), prompt masked, stop token in | mean over all tokens of an update,
      so that micro-batching changes nothing
  evaluation       | T 0.7, top-p 0.95, 4 answers or more, 16,384 tokens | the same | T 1; common.evaluate --temperature --top-p
  long contexts    | RoPE theta x 10 for Qwen2.5-Math-7B | in the model's config | the same way: edit config.json of a local copy
  silver data, SFT | WebInstruct: one answer, not verified; 0, 50 or 100 % of the mix | a data set | --keep all --samples 1
  silver data, RL  | 2 answers a problem, dropped if neither matches its label: 115k problems, 189k answers | not released |
      --filter agree, by the first two of --samples; wrong labels are made by --label-noise on the embedded task
  constructed      | Qwen2.5-72B-Instruct, o1-mini reflects; each reply names the next state | not released; how it is asked
      to is unknown | prompts of our own, one model for all; only reflection decides: on, done, or "Alternatively, ..."
  constructed kept | about 200k samples | - | those whose final box verifies; --max-turns bounds the loop.
      On the embedded task a script plays the chat model: it is a demonstration, the model must first learn the foreign format
  keyword rates    | five words, by benchmark; counter unpublished | - | share of answers with the whole word, before and after
"""
import gc
import json
import math
import pathlib
import random
import re
import sys
from dataclasses import dataclass

import torch
from tqdm import tqdm

from common.arithmetic import solve
from common.data import batch_of, encode_prompt
from common.distributed import rank, share, size, total
from common.errors import BadInput
from common.evaluate import describe_reflection, reflection_rates  # noqa: F401  (the paper's measure, offered from here too)
from common.flags import BOXED, Shared, exit_on_bad_input, flag, parse_flags
from common.logprobs import micro_batches, response_logprobs
from common.models import causal_lm, is_small, load_model, load_tokenizer
from common.run import start
from common.sampling import sample_texts
from common.traces import (
    as_rollout,
    collect,
    describe_lengths,
    encode_traces,
    fingerprint,
    judge,
    load_traces,
    noisy_labels,
    question,
    read_sampled,
)
from common.verify import reward

PATIENCE = 64  # problems without one kept answer before sampling gives up
ROWS = 256     # answers that are drawn together and written at once: a kill costs at most so many


def sft_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean of -log p(label) over the labels that are not -100, nats. (B, T, V), (B, T) -> scalar.

    Already shifted: logits[:, t] predicts labels[:, t]. For reading and testing: main() computes the same without a (B, T, V).
    """
    inside = labels != -100                                                             # (B, T)
    logp = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])    # (B, T, 1)
    return -(logp[..., 0] * inside).sum() / inside.sum().clamp(min=1)


def lr_at(step: int, total: int, peak: float, warmup: float = 0.03, floor: float = 0.1) -> float:
    """Learning rate of update `step` (0-based) of `total`: a straight rise to the peak, then half a cosine to floor x peak."""
    rise = math.ceil(warmup * total)
    if step < rise:
        return peak * (step + 1) / rise
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * (step - rise) / (total - rise))) / 2)


ACTIONS = {  # paper, section 5.1: five actions; the wording is ours
    "clarify": "Say in your own words what the problem gives and what it wants. Do not solve anything yet.",
    "decompose": "Given the thoughts so far, propose the next goal that brings us closer, and two other ways to go on, each "
                 "beginning with 'Alternatively,'. Close with a line 'NEXT: ' and the goal you choose.",
    "solve": "Work on the current goal and on nothing else. Write out the calculation with symbols.",
    "reflect": "Check the last thought by a way of its own: another method, putting the result in, or working backwards. "
               "Then write the lines 'GOAL: yes' or 'GOAL: no' (is the current goal reached?) and 'PROBLEM: yes' or "
               "'PROBLEM: no' (is the whole problem solved?). If the goal is not reached, close with a line "
               "'NEXT: Alternatively, ' and a new goal.",
    "answer": "State the final answer of the thoughts so far within \\boxed{}.",
}
MARK = re.compile(r"^(GOAL|PROBLEM|NEXT):[ \t]*(.*)$", re.MULTILINE)


def chain_turns(problem: str, max_turns: int, joint: str):
    """The state machine, a generator: yields the messages of a turn, is sent the reply, returns the chain, None if out of turns.

    clarify -> decompose -> solve -> reflect; then answer if the problem is solved, decompose if only the goal is reached, and
    else solve again with the goal that reflection names. Thoughts become the chain; the lines with the verdicts do not.
    """
    state, goal, thoughts = "clarify", problem, []
    for _ in range(max_turns):
        reply = yield [{"role": "system", "content": ACTIONS[state]}, {"role": "user", "content":
                       f"Problem: {problem}\nThoughts so far: {''.join(thoughts)}\nCurrent goal: {goal}"}]
        if reply is None:  # cut off, or no room left to ask
            return None
        marks = {name: value.strip() for name, value in MARK.findall(reply)}
        thought = MARK.sub("", reply).strip("\n")
        if state == "answer":
            return "".join(thoughts) + (thought if "\\boxed" in thought else f"\\boxed{{{thought}}}")
        thoughts.append(thought + joint)
        if state != "reflect":
            state, goal = {"clarify": "decompose", "decompose": "solve", "solve": "reflect"}[state], marks.get("NEXT", goal)
        elif marks.get("PROBLEM", "").lower() == "yes":
            state = "answer"
        elif marks.get("GOAL", "").lower() == "yes":
            state = "decompose"
        else:
            state, goal = "solve", marks.get("NEXT", goal)
            thoughts.append(goal + joint)
    return None


def construct_chains(ask_all, problems: list[str], max_turns: int, joint: str = "\n") -> list[str | None]:
    """A chain to each problem, all in step. ask_all(list of conversations, turn) -> list of replies. joint: between thoughts."""
    chains, machines = [None] * len(problems), [chain_turns(problem, max_turns, joint) for problem in problems]
    waiting = {i: next(machine) for i, machine in enumerate(machines)}
    for turn in range(max_turns):
        for i, reply in zip(list(waiting), ask_all(list(waiting.values()), turn) if waiting else ()):
            try:
                waiting[i] = machines[i].send(reply)
            except StopIteration as end:
                chains[i] = end.value
                del waiting[i]
    return chains


def construct_chain(ask, problem: str, max_turns: int, joint: str = "\n") -> str | None:
    """One chain by asking ask(messages) -> reply at most max_turns times; None if that was not enough."""
    return construct_chains(lambda turns, _: [ask(messages) for messages in turns], [problem], max_turns, joint)[0]


def scripted_actor(problem: str, rng: random.Random, slip: float = 0.2, missed: float = 0.1):
    """ask(messages) -> reply for one problem of the embedded task: rules that perform the five actions, no model.

    A result is wrong with probability slip, and the check lets a wrong one pass with probability missed: work for reflection.
    Of the words only those that the embedded model writes already: others, "Alternatively" too, cost it more than they teach.
    """
    numbers, operators, result = [int(n) for n in re.findall(r"\d+", problem)], re.findall(r"[-+*]", problem), 0

    def ask(messages: list[dict]) -> str:
        nonlocal result
        action = next(name for name, text in ACTIONS.items() if text == messages[0]["content"])
        if action in ("clarify", "answer"):
            return problem[len("Compute "):-1] if action == "clarify" else f"\\boxed{{{numbers[0]}}}"
        i = operators.index("*") if "*" in operators else 0
        a, b, operator = numbers[i], numbers[i + 1], operators[i]
        right = solve([a, b], [operator])[-1][3]
        if action == "decompose":
            return f"{a}{operator}{b}\nNEXT: {a}{operator}{b}"
        if action == "solve":
            result = max(0, right + (rng.choice((-10, -2, -1, 1, 2, 10)) if rng.random() < slip else 0))
            return f"{a}{operator}{b}={result}"
        back, inverse = {"+": (result - b, "-"), "-": (result + b, "+"), "*": (result // max(b, 1), "/")}[operator]
        if result != right and rng.random() >= missed:
            return f" check {result}{inverse}{b}={back} wait\nGOAL: no\nPROBLEM: no\nNEXT: {a}{operator}{b}"
        numbers[i:i + 2] = [result]
        del operators[i]
        return f" check {result}{inverse}{b}={a} ok\nGOAL: yes\nPROBLEM: {'no' if operators else 'yes'}"
    return ask


def make_teacher(cfg):
    """--teacher, loaded -> answers(first, problems): --samples texts to each, None where one did not end. Raises BadInput."""
    if cfg.source == "construct" and is_small(cfg.teacher):
        if cfg.data != "arithmetic":
            raise BadInput(f"--source construct: {cfg.teacher} cannot follow instructions, give --teacher a chat model (on "
                           "--data arithmetic a script takes its place)")
        rngs = lambda row: (random.Random(f"actor {cfg.seed} {row['problem']} {i}") for i in range(cfg.samples))
        return lambda _, rows: [[construct_chain(scripted_actor(row["problem"], rng), row["problem"], cfg.max_turns, ", ")
                                 for rng in rngs(row)] for row in rows]
    tokenizer = load_tokenizer(cfg.teacher)
    model = load_model(cfg.teacher, cfg.device, cfg.dtype, cuda_graphs=cfg.cuda_graphs, frozen=True)
    longest = causal_lm(model).config.max_position_embeddings - cfg.teacher_max_new_tokens
    if longest < 1:
        raise BadInput(f"--teacher-max-new-tokens {cfg.teacher_max_new_tokens}: leaves no room for a prompt in its context")

    def ask(prompts, n, seed):  # prompts that do not fit get no answer
        encoded = [encode_prompt(tokenizer, prompt, cfg.teacher_system, cfg.thinking) for prompt in prompts]
        fitting, texts = [ids for ids in encoded if len(ids) <= longest], iter(())
        if fitting:
            found = sample_texts(model, tokenizer, fitting, n, cfg.teacher_max_new_tokens, cfg.teacher_temperature,
                                 cfg.teacher_top_p, seed)
            texts = iter([text if ended else None for text, _, ended in found])
        return [next(texts) if len(ids) <= longest else None for ids in encoded for _ in range(n)]

    def answers(first, rows):
        n, seed = cfg.samples, cfg.seed * 100_000_000 + first * 1000
        if cfg.source == "construct":
            questions = [question(row["problem"]) for row in rows for _ in range(n)]
            texts = construct_chains(lambda conversations, turn: ask(conversations, 1, seed + turn), questions, cfg.max_turns)
        else:
            texts = ask([row["problem"] for row in rows], n, seed)
        return [texts[i * n:(i + 1) * n] for i in range(len(rows))]
    return answers


def sampled_traces(run) -> list[dict]:
    """Asks the teacher, or goes on where that was stopped -> {"problem", "completion"} rows. Writes problems.jsonl too."""
    cfg = run.cfg
    problems = noisy_labels(run.train[:cfg.teacher_problems or None], cfg.label_noise, cfg.seed)
    path = pathlib.Path(cfg.traces_out or run.folder / "traces.jsonl")
    settings = fingerprint({name: getattr(cfg, name) for name in (
        "source", "teacher", "teacher_system", "samples", "teacher_temperature", "teacher_top_p", "teacher_max_new_tokens",
        "thinking", "max_turns", "keep", "filter", "label_noise", "seed")})
    lines = read_sampled(path, problems, settings)
    answers = make_teacher(cfg) if len(lines) < len(problems) else None  # all that can be refused has been refused now
    run.begin()

    def draw(first, rows):
        return [judge(row, texts, [text is not None and reward(text, row["answer"]) == 1 for text in texts], cfg.keep,
                      cfg.filter == "agree", settings) for row, texts in zip(rows, answers(first, rows))]
    rows, size = [], max(1, ROWS // cfg.samples)
    for row in tqdm(collect(path, lines, problems, size, draw), desc="sampling traces", unit="problem", total=len(problems),
                    disable=rank() > 0):
        rows.append(row)
        if len(rows) == PATIENCE and not any(row["completions"] for row in rows):
            break
    counts = {name: sum(row[name] for row in rows) for name in ("sampled", "finished", "right", "agrees")}
    kept = sum(len(row["completions"]) for row in rows)
    of_all = lambda count: f"{count} ({count / counts['sampled']:.1%})"
    print(f"traces: {counts['sampled']} answers to {len(rows)} problems: {of_all(counts['finished'])} ended, "
          f"{of_all(counts['right'])} right, {of_all(kept)} kept, each once; {counts['agrees']} labels agree with one of two "
          "answers")
    if not kept:
        raise BadInput(f"--teacher {cfg.teacher}: none of {counts['sampled']} answers to {len(rows)} problems was kept, "
                       f"{of_all(counts['right'])} were right, {of_all(counts['finished'])} ended; try more --samples or "
                       "--teacher-max-new-tokens, see that --teacher-system asks for a \\boxed{} answer, or take easier problems")
    labels = [{name: row[name] for name in ("problem", "answer")} for row in rows if row["agrees"] or cfg.filter == "none"]
    run.write("problems.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in labels))
    run.summary["sampling"] = {**counts, "problems": len(rows), "labels": len(labels), "kept": kept,
                               "kept_share": kept / counts["sampled"]}
    return [{"problem": row["problem"], "completion": text} for row in rows for text in row["completions"]]


@dataclass
class Config:
    traces: str = flag(None, "learn from this file or hub set of messages, or prompt + completion; ask no teacher", type=str)
    traces_out: str = flag(None, "where sampled traces go, and are continued; default: traces.jsonl in the run", type=str)
    source: str = flag("teacher", "whole answers, or chains built of five actions", choices=("teacher", "construct"))
    teacher: str = flag("tiny", "model that answers; the paper: QwQ-32B-Preview, for short chains Qwen2.5-Math-72B-Instruct")
    teacher_style: str = flag("long", "long or short chains: sets the defaults of the next two", choices=("long", "short"))
    teacher_temperature: float = flag(None, "1.0 for long, 0.7 for short, as in the paper", type=float, above=0)
    teacher_system: str = flag(None, "system message for it; default: `style: ...` for the embedded one, else a box", type=str)
    teacher_top_p: float = flag(0.95, "the paper: 0.95", above=0, high=1)
    teacher_max_new_tokens: int = flag(160, "longest trace, none that hits it is kept; the paper: 8192 or 4096", real=8192, low=1)
    teacher_problems: int = flag(256, "problems to ask; 0: all, as in the paper", real=0, low=0)
    samples: int = flag(8, "N, answers to each; the paper: 32 to 256", real=32, low=1)
    max_turns: int = flag(40, "replies that a constructed chain may take", low=5)
    keep: str = flag("verified", "answers that match the label, or all that end", choices=("verified", "all"))
    filter: str = flag("none", "agree: drop problems whose label is none of the first two answers", choices=("none", "agree"))
    label_noise: float = flag(0.0, "share of wrong labels, arithmetic only", low=0, high=1)
    epochs: int = flag(2, "passes over the traces; the paper: 2", low=1)
    batch_size: int = flag(32, "traces an update; the paper: 256", real=256, low=1)
    lr: float = flag(1e-3, "peak; 3 % warm-up, a cosine to a tenth; the paper: 5e-6", real=5e-6, above=0)
    max_new_tokens: int = flag(160, "longest answer in the evaluation, in tokens; the paper: 16384", real=4096, low=1)


@exit_on_bad_input
def main(argv=None):
    cfg = parse_flags(Config, Shared, description=__doc__, argv=argv)
    if cfg.label_noise and (cfg.data != "arithmetic" or cfg.traces):
        raise BadInput(f"--label-noise {cfg.label_noise}: only for traces that are sampled on --data arithmetic")
    if cfg.filter == "agree" and cfg.samples < 2:
        raise BadInput("--filter agree: looks at two answers a problem, so --samples must be at least 2")
    if cfg.traces_out and pathlib.Path(cfg.traces_out).is_dir():
        raise BadInput(f"--traces-out {cfg.traces_out}: a folder, give a .jsonl file in it")
    cfg.teacher_temperature = cfg.teacher_temperature or {"long": 1.0, "short": 0.7}[cfg.teacher_style]
    if cfg.teacher_system is None:
        cfg.teacher_system = f"style: {cfg.teacher_style}" if is_small(cfg.teacher) else BOXED
    cfg.steps, cfg.prompts_per_step, cfg.group_size = sys.maxsize, cfg.batch_size, 1  # the first is known after sampling
    run = start(cfg, "long_cot_sft")
    model, optimizer, device = run.model, run.optimizer, next(run.model.parameters()).device
    traces = load_traces(cfg.traces, cfg.split) if cfg.traces else sampled_traces(run)
    gc.collect(), torch.cuda.empty_cache()  # the teacher has gone
    rows = encode_traces(run.tokenizer, traces, cfg.system, cfg.thinking, causal_lm(model).config.max_position_embeddings,
                         {question(row["problem"]) for row in run.held_out})
    run.summary["traces"] = statistics = describe_lengths(rows)
    print(f"        {statistics['tokens']} tokens, {statistics['mean_length']:.0f} on average; lengths:")
    for span, count in statistics["histogram"].items():
        print(f"        {span:>13} {count:7} {'#' * math.ceil(50 * count / len(rows))}")
    visits = cfg.epochs * len(rows)
    cfg.steps = math.ceil(visits / cfg.batch_size)
    nothing = {"prompt": rows[0]["prompt"], "response": []}  # so that all ranks have equally many rows

    for step in run.steps():
        batch = batch_of(rows, step, cfg.batch_size, cfg.seed)[:visits - step * cfg.batch_size]
        batch = share(batch + [nothing] * (-len(batch) % size()))
        rollout, lr = as_rollout(batch, device), lr_at(step, cfg.steps, cfg.lr)
        for group in optimizer.adamw.param_groups:
            group.update(lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
        tokens, parts = total(int(rollout.lengths.sum())), []
        with run.clock("training"):
            for m in micro_batches(torch.arange(len(batch), device=device), rollout, cfg.micro_batch_tokens):   # (b,) row numbers
                logp, entropy = response_logprobs(model, rollout[m])                            # (b, T)
                loss = -logp.sum() / tokens                                                     # this part's share of sft_loss
                optimizer.backward(loss)
                rollout.entropy[m] = entropy
                parts.append({"loss": loss.item()})
            parts.append({"grad_norm": optimizer.step(max_norm=1.0)})
        seen = run.rows[-1]["tokens_seen"] if run.rows else 0
        run.log(rollout[rollout.lengths.nonzero()[:, 0]], parts=parts, tokens_seen=seen + tokens, lr=lr)
    run.finish()
    for when in ("before", "after"):
        if f"reflection_{when}" in run.summary:
            print(f"{when + ':':8}{describe_reflection(run.summary[f'reflection_{when}'])}")


if __name__ == "__main__":
    main()
