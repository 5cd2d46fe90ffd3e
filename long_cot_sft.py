"""Long chain-of-thought SFT: keep the right ones among a teacher's long answers and imitate them.

Paper: Demystifying Long Chain-of-Thought (arXiv 2502.03373), sections 3 to 5; ppo.py is its RL.
Run:   python long_cot_sft.py                        the embedded model learns to check itself
       python long_cot_sft.py --teacher-style short  the paper's rival: short chains
       python long_cot_sft.py --model Qwen/Qwen2.5-Math-7B --traces TRACES.jsonl
See:   how many of the teacher's answers are right. The loss falls, and the student writes long
       chains unasked: more of its answers are right, "wait" appears in them. It has learnt from
       <run>/traces.jsonl, and python ppo.py --model runs/long_cot_sft goes on with it.

Deviations from the paper, and why:
1. The loss is a mean over all tokens of an update, so that micro-batches change nothing (authors:
   per answer first). Prompts are masked; the one stop token behind an answer is trained.
2. The teacher shares the student's device. One that needs a server (theirs: QwQ-32B-Preview, short
   chains Qwen2.5-Math-72B-Instruct) is sampled there, and its answers come by --traces.
3. Repeated answers are kept once, those that were cut off never; a trace that is longer than the
   context is dropped, not cut. In evaluation an answer that is cut off is wrong.
4. Their counter of reflection words is not published; ours counts answers with the whole word.

Axes: B traces (b in a micro-batch), T answer tokens, V vocabulary.
"""
import gc
import json
import math
import re
import time
from collections import Counter
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from common.data import batch_of, drop_long_prompts, encode_prompt, is_chat, is_text, read_rows
from common.distributed import rank, share, size, total
from common.evaluate import evaluate
from common.flags import BOXED, BadInput, Shared, exit_on_bad_input, flag, parse_args
from common.logprobs import check_model, micro_batches, response_logprobs
from common.models import (
    SMALL,
    end_of_turn,
    load_config,
    load_model,
    load_tokenizer,
    stop_ids,
)
from common.run import Run, json_lines
from common.sampling import Rollout
from common.verify import verify

WORDS = ("wait", "recheck", "alternatively", "retry", "however")
TEMPERATURE = {"long": 1.0, "short": 0.7}  # of the teacher, as in the paper
TOP_P = 0.95
ROWS = 256  # answers that are drawn and written together: a kill loses no more


def reward(text: str, row: dict) -> float:
    """What an answer is worth; 1 is right. Put your own here: row has every column."""
    return verify(text, row["answer"])


def sft_loss(logits, labels):
    """Mean of -log p(label), nats, where the label is not -100. (B, T, V), (B, T) -> scalar.

    Already shifted: logits[:, t] predicts labels[:, t]. main() computes it without a (B, T, V).
    """
    inside = labels != -100                                             # (B, T)
    targets = labels.clamp(min=0)[..., None]                            # (B, T, 1)
    logp = logits.float().log_softmax(-1)                               # (B, T, V)
    logp = logp.gather(-1, targets)[..., 0] * inside                    # (B, T)
    return -logp.sum() / inside.sum().clamp(min=1)


def lr_at(step, steps, peak):
    """Rate of update `step` (0-based): up to the peak in 3 % of them, half a cosine to 10 %."""
    rise = math.ceil(0.03 * steps)
    done = max(0, step - rise) / max(1, steps - rise)
    cosine = (1 + math.cos(math.pi * done)) / 2                                 # 1 to 0
    return peak * min((step + 1) / rise, 0.1 + 0.9 * cosine)


def reflection_rates(texts):
    """Share of the texts, one or more, that hold each of five words, whole and in any case."""
    rates = {}
    for word in WORDS:
        whole = re.compile(rf"\b{word}\b", re.IGNORECASE)
        found = [text for text in texts if whole.search(text)]
        rates[word] = len(found) / len(texts)
    return rates


def ask_teacher(teacher, tokenizer, problems, system, seed, args):
    """A row for each problem, with the answers worth keeping; the same on every rank."""
    result = evaluate(
        teacher, tokenizer, problems, reward, args.samples, args.teacher_max_new_tokens,
        args.teacher_temperature, TOP_P, seed, system)
    rows = []
    for row in result["answers"]:
        ended = row["finished"]
        right = [value >= 1 for value in row["rewards"]]  # never if it was cut off
        wanted = ended if args.keep == "all" else right
        kept = [text for text, keep in zip(row["responses"], wanted) if keep]
        rows.append({"problem": row["problem"], "answer": row["answer"], "completions": kept,
                     "ended": sum(ended), "right": sum(right)})
    return rows


def sample_traces(run):
    """Asks the teacher, or goes on where that was stopped -> rows with completions. BadInput."""
    args = run.args
    system = args.system or BOXED
    config = load_config(args.teacher)
    if config.hidden_size <= SMALL:
        system = f"style: {args.teacher_style}"  # the embedded model knows both
    tokenizer = load_tokenizer(args.teacher)
    longest = config.max_position_embeddings - args.teacher_max_new_tokens
    problems = run.train[:args.teacher_problems or None]
    problems = drop_long_prompts(tokenizer, problems, system, longest)
    rows = []
    path = run.folder / "traces.jsonl"
    if args.resume and path.exists():
        rows = read_rows(str(path), "train")
    batch = max(1, ROWS // args.samples)
    missing = range(len(rows), len(problems), batch)
    if missing:
        teacher = load_model(args, trained=False, name=args.teacher)
        prompt = encode_prompt(tokenizer, problems[0]["problem"], system)
        check_model(teacher, tokenizer, prompt, trained=False)
        run.make_folder()  # all flags have been checked
    for first in tqdm(missing, "asking the teacher", disable=rank() > 0):
        seed = args.seed * 100_000_000 + first * 1000
        rows += ask_teacher(teacher, tokenizer, problems[first:first + batch], system, seed, args)
        run.write("traces.jsonl", json_lines(rows))
    ended = sum(row["ended"] for row in rows)
    right = sum(row["right"] for row in rows)
    print(f"teacher: {len(rows)} x {args.samples} answers: {ended} ended, {right} right")
    return rows


def pairs_of(rows):
    """Rows of messages, of prompt and completion, or sampled here -> (problem, answer) pairs."""
    pairs = []
    for row in rows:
        messages = row.get("messages")
        problem = row.get("problem", row.get("prompt"))
        answers = row.get("completions", [row.get("completion")])
        if is_chat(messages) and messages[-1]["role"] == "assistant":
            problem = messages[:-1]
            answers = [messages[-1]["content"]]
        pairs += [(problem, answer) for answer in answers]
    return pairs


def use_stop_token(tokenizer, model):
    """What ends an assistant's turn in the chat template becomes the eos token -> all stop tokens.

    BadInput if there is neither.
    """
    stop = end_of_turn(tokenizer)
    if stop is not None:
        tokenizer.eos_token_id = stop
    if tokenizer.eos_token_id is None:
        raise BadInput("the tokenizer has no eos token, so answers would have no end: name one in "
                       "its tokenizer_config.json")
    stops = stop_ids(model, tokenizer)
    model.generation_config.eos_token_id = stops
    return stops


def question(problem):
    """What is asked in a problem, a text or a chat, whatever its system message."""
    return problem.strip() if isinstance(problem, str) else problem[-1]["content"].strip()


def encode_traces(tokenizer, pairs, context, stops, system, held_out):
    """(problem, answer) pairs -> (prompt, response) pairs of token ids, eos behind the response.

    stops: all token ids that end an answer. held_out: rows with "problem". Pairs are dropped
    whole, with a count. BadInput if none is left, or if a think block would be opened twice.
    """
    avoided = {question(row["problem"]) for row in held_out}
    rows = {}
    dropped = Counter()
    for problem, answer in pairs:
        if not is_text(answer) or not (is_text(problem) or is_chat(problem)):
            dropped["without messages, or a prompt and a completion"] += 1
            continue
        prompt = tuple(encode_prompt(tokenizer, problem, system))
        opened = tokenizer.decode(prompt).rstrip().endswith(("<think>", "</think>"))
        if opened and answer.lstrip().startswith("<think>"):
            raise BadInput("traces begin with <think>, which the chat template opens as well: "
                           "take it out of them")
        response = tokenizer(
            answer.rstrip(), add_special_tokens=False, verbose=False)["input_ids"]
        while response and response[-1] in stops:  # exactly one is appended
            response.pop()
        row = (prompt, (*response, tokenizer.eos_token_id))
        if row in rows:
            dropped["repeated"] += 1
        elif question(problem) in avoided:
            dropped["of held-out problems"] += 1
        elif not response or set(stops) & set(response):
            dropped["empty or with a stop token inside"] += 1
        elif len(prompt) + len(response) >= context:
            dropped[f"longer than the context of {context} tokens"] += 1
        else:
            rows[row] = None
    counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"
    print(f"traces: {len(rows)} to train on; dropped: {counts}")
    if not rows:
        raise BadInput(f"none of the {len(pairs)} traces is left to train on; dropped: {counts}")
    return list(rows)


def as_rollout(rows, device):
    """Encoded traces as what the sampler hands over, so that the same functions serve."""
    prompts = [prompt for prompt, _ in rows]
    answers = [torch.tensor(response, dtype=torch.long) for _, response in rows]
    tokens = pad_sequence(answers, batch_first=True).to(device)                     # (B, T)
    lengths = torch.tensor([len(answer) for answer in answers], device=device)      # (B,)
    unknown = torch.zeros(tokens.shape, device=device)                              # (B, T)
    texts = [""] * len(rows)
    return Rollout(prompts, tokens, lengths, unknown, unknown, lengths > 0, texts)


def count_reflections(run, when, result):
    """Prints and keeps the reflection words of an evaluation's answers."""
    rates = reflection_rates([text for row in result["answers"] for text in row["responses"]])
    run.summary[f"reflection_{when}"] = rates
    shares = ", ".join(f"{word} {rate:.1%}" for word, rate in rates.items())
    print(f"{when + ':':7} share of answers with a reflection word: {shares}")


@dataclass
class Args(Shared):
    traces: str = flag(None, "learn from this file or hub set and ask no teacher")
    teacher: str = flag("tiny", "model that answers; the paper: QwQ-32B-Preview")
    teacher_style: str = flag("long", "long or short chains", choices=("long", "short"))
    teacher_temperature: float = flag(None, "paper: 1.0 long, 0.7 short", low=0.01)
    teacher_max_new_tokens: int = flag(160, "longest trace; the paper: 8192, short: 4096", low=1)
    teacher_problems: int = flag(256, "problems to ask; 0: all, as in the paper", low=0)
    samples: int = flag(8, "answers to each; the paper: 32 to 256", low=1)
    keep: str = flag("verified", "what verifies, or all that ends", choices=("verified", "all"))
    epochs: int = flag(2, "passes over the traces; the paper: 2", low=1)
    batch_size: int = flag(32, "traces per update; the paper: 256", low=1)
    lr: float = flag(1e-3, "AdamW, peak; ten times that with --lora-rank; the paper: 5e-6", low=0)
    max_new_tokens: int = flag(160, "longest answer in evaluation; the paper: 16384", low=1)


REAL = {"teacher_max_new_tokens": 8192, "teacher_problems": 0, "samples": 32, "batch_size": 256,
        "lr": 5e-6, "max_new_tokens": 4096}


@exit_on_bad_input()
def main(argv=None):
    args = parse_args(Args, REAL, __doc__, argv)
    args.teacher_temperature = args.teacher_temperature or TEMPERATURE[args.teacher_style]
    run = Run("long_cot_sft", args, reward)
    model = run.model
    stops = use_stop_token(run.tokenizer, model)

    # 1. Traces, of a file or of the teacher, whose memory goes before training.
    if args.traces:
        traces = read_rows(args.traces, "train")
    else:
        traces = sample_traces(run)
    gc.collect()
    context = model.config.max_position_embeddings
    pairs = pairs_of(traces)
    rows = encode_traces(run.tokenizer, pairs, context, stops, args.system, run.held_out)
    largest = max(max(prompt + response) for prompt, response in rows)
    if largest >= model.get_input_embeddings().num_embeddings:
        raise BadInput(f"the traces have the token {largest}, which the model has not: the "
                       "tokenizer is another model's")
    if rows[0][0][-1] in stops:
        print("note: the prompt ends with a stop token, behind which models do not go on")
    prompt, response = map(run.tokenizer.decode, rows[0])
    lengths = [len(response) for _, response in rows]
    print(f"first pair: {prompt!r} -> {response[:1000]!r}\n"
          f"lengths: {sum(lengths) / len(rows):.0f} tokens on average, {max(lengths)} at most")
    about = {"traces": len(rows), "tokens": sum(lengths)}
    if run.summary.setdefault("traces", about) != about:
        raise BadInput(f"--resume {run.folder}: its traces have changed since")

    # 2. Before.
    visits = args.epochs * len(rows)
    args.steps = math.ceil(visits / args.batch_size)
    if run.held_out and "reflection_before" not in run.summary:
        count_reflections(run, "before", run.measure("before"))
    # foreach=False: one weight after another, without temporary copies of all of them.
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.95),
                                  weight_decay=0.0, foreach=False)
    nothing = (rows[0][0], ())

    for step in range(run.begin(optimizer), args.steps):
        # 3. The traces of this update, equally many on every rank; the last pass may end early.
        batch = batch_of(rows, step, args.batch_size, args.seed)
        batch = batch[:visits - step * args.batch_size]
        padded = batch + [nothing] * (-len(batch) % size())
        rollout = as_rollout(share(padded), model.device)                   # B traces
        num_tokens = total(rollout.lengths)

        # 4. The mean of -log p over all answer tokens, the stop token among them.
        parts = []
        update = torch.arange(len(rollout.lengths), device=model.device)    # row numbers
        for part in micro_batches(rollout, update, args.micro_batch_tokens):
            logp = response_logprobs(model, rollout[part])                  # (b, T)
            loss = -logp.sum() / num_tokens                                 # its part of sft_loss
            loss.backward()
            parts.append({"loss": loss.item()})

        # 5. One step of the optimiser, at the rate of the schedule.
        lr = lr_at(step, args.steps, args.lr)
        optimizer.param_groups[0]["lr"] = lr
        grad_norm = clip_grad_norm_(model.parameters(), 1.0).item()
        if math.isfinite(grad_norm):
            optimizer.step()
        optimizer.zero_grad()

        # 6. Book-keeping.
        seconds = time.perf_counter() - run.started
        run.log(step, parts=parts, grad_norms=[grad_norm], lr=lr, length=num_tokens / len(batch),
                tokens_per_second=num_tokens / seconds)
        run.save(step + 1)
    result = run.finish()
    if result is not None:
        count_reflections(run, "after", result)
        run.write("summary.json", json.dumps(run.summary, indent=1))


if __name__ == "__main__":
    main()
