"""Long chain-of-thought SFT: keep the right ones among a teacher's long answers and imitate them.

Paper: Demystifying Long Chain-of-Thought (arXiv 2502.03373), sections 3 to 5; ppo.py is its RL.
Run:   python long_cot_sft.py                        the embedded model learns to check itself
       python long_cot_sft.py --teacher-style short  the paper's rival: short chains
       python long_cot_sft.py --model Qwen/Qwen2.5-Math-7B --traces TRACES.jsonl
See:   how many answers are right, and a histogram of the lengths of those that are kept. The loss
       falls, and the student writes long chains unasked: more of its answers are right, "wait"
       appears in them. <run>/traces.jsonl is what it learns from, and
       python ppo.py --model runs/long_cot_sft goes on with it.

Deviations from the paper, and why:
1. The loss is a mean over all tokens of an update, so that micro-batches change nothing (authors:
   per answer first). Prompts are masked; the one stop token behind an answer is trained.
2. The teacher shares the student's device. One that needs a server (theirs: QwQ-32B-Preview, short
   chains Qwen2.5-Math-72B-Instruct) is sampled there, and its answers come by --traces.
3. Repeated answers are kept once, those that were cut off never; a trace that is longer than the
   context is dropped, not cut. In evaluation an answer that is cut off is wrong.
4. Their counter of reflection words is not published; ours counts answers with the whole word.

Axes: B traces, T answer tokens, V vocabulary; b a micro-batch's share of B.
"""
import gc
import json
import math
import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from common.data import (
    batch_of,
    drop_long_prompts,
    encode_prompt,
    is_chat,
    is_text,
    read_rows,
    write_whole,
)
from common.distributed import everyone, rank, share, size, total
from common.flags import BOXED, BadInput, Shared, exit_on_bad_input, flag, parse_args
from common.logprobs import check_model, micro_batches, response_logprobs
from common.models import (
    causal_lm,
    context_of,
    end_of_turn,
    is_small,
    load_model,
    load_tokenizer,
    stop_ids,
)
from common.run import Run, json_lines
from common.sampling import Rollout, sample
from common.verify import verify

WORDS = ("wait", "recheck", "alternatively", "retry", "however")
TEMPERATURE = {"long": 1.0, "short": 0.7}
ROWS = 256  # answers that are drawn and written together: a kill loses no more


def reward(text: str, row: dict) -> float:
    """What an answer is worth; 1 is right. Put your own here: row has every column."""
    return verify(text, row["answer"])


def sft_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean of -log p(label), nats, where the label is not -100. (B, T, V), (B, T) -> scalar.

    Already shifted: logits[:, t] predicts labels[:, t]. main() computes it without a (B, T, V).
    """
    inside = labels != -100                                             # (B, T)
    targets = labels.clamp(min=0)[..., None]                            # (B, T, 1)
    logp = logits.float().log_softmax(-1)                               # (B, T, V)
    logp = logp.gather(-1, targets)[..., 0] * inside                    # (B, T)
    return -logp.sum() / inside.sum().clamp(min=1)


def lr_at(step: int, total: int, peak: float, warmup: float = 0.03, floor: float = 0.1) -> float:
    """Learning rate of update `step` (0-based): straight up to the peak, half a cosine down."""
    rise = math.ceil(warmup * total)
    if step < rise:
        return peak * (step + 1) / rise
    done = (step - rise) / (total - rise)
    cosine = (1 + math.cos(math.pi * done)) / 2
    return peak * (floor + (1 - floor) * cosine)


def reflection_rates(texts: list[str]) -> dict[str, float]:
    """Share of texts that hold each of five words, whole and in any case; NaN without texts."""
    rates = {}
    for word in WORDS:
        whole = re.compile(rf"\b{word}\b", re.IGNORECASE)
        found = [text for text in texts if whole.search(text)]
        rates[word] = len(found) / len(texts) if texts else math.nan
    return rates


def histogram(lengths: list[int], bins: int = 8) -> dict[str, int]:
    """{"from-to": how many}, in equal bins from the shortest to the longest, tokens."""
    shortest = min(lengths)
    width = (max(lengths) - shortest) // bins + 1
    counts = {}
    for low in range(shortest, shortest + bins * width, width):
        inside = [length for length in lengths if low <= length < low + width]
        counts[f"{low}-{low + width - 1}"] = len(inside)
    return counts


def load_traces(name: str) -> list[tuple]:
    """--traces, with messages, prompt and completion, or sampled here -> (problem, answer) pairs.

    Of messages the last is learnt, which must be the assistant's. BadInput if no row is usable.
    """
    rows = read_rows(name, "train", "--traces")
    pairs = []
    unusable = 0
    for row in rows:
        problem = row.get("prompt")
        answers = [row.get("completion")]
        if isinstance(row.get("completions"), list):
            problem = row.get("problem")
            answers = row["completions"]
        elif is_chat(row.get("messages")):
            problem = row["messages"][:-1]
            answers = [row["messages"][-1:]]
        for answer in answers:
            if is_chat(answer) and answer[-1]["role"] == "assistant":
                answer = answer[-1]["content"]
            if is_text(answer) and (is_text(problem) or is_chat(problem)):
                pairs.append((problem, answer))
            else:
                unusable += 1
    print(f"traces: {name}: {len(rows)} rows, {unusable} answers without a text or a prompt")
    if not pairs:
        raise BadInput(f"--traces {name}: no row has messages that end with the assistant's, or a "
                       f"prompt and a completion; it has {', '.join(rows[0])}")
    return pairs


def ask_teacher(teacher, tokenizer, problems, system: str, seed: int, args) -> list[dict]:
    """A row for each problem, with the answers worth keeping; the same on every rank."""
    padding = problems[-1:] * (-len(problems) % size())  # every rank needs equally many
    mine = share(problems + padding)
    prompts = [encode_prompt(tokenizer, row["problem"], system) for row in mine]
    rollout = sample(
        teacher, tokenizer, prompts,
        n=args.samples,
        max_new_tokens=args.teacher_max_new_tokens,
        temperature=args.teacher_temperature,
        top_p=args.teacher_top_p,
        seed=seed)
    found = []
    for i, row in enumerate(mine):
        group = range(i * args.samples, (i + 1) * args.samples)
        ended = [rollout.texts[j] for j in group if rollout.finished[j]]  # not those cut off
        right = [text for text in ended if reward(text, row) >= 1]
        kept = ended if args.keep == "all" else right
        found.append({"problem": row["problem"], "answer": row["answer"], "completions": kept,
                      "ended": len(ended), "right": len(right)})
    together = zip(*everyone(found), strict=True)
    answered = [row for of_ranks in together for row in of_ranks]
    return answered[:len(problems)]


def sample_traces(run) -> list[tuple]:
    """Asks the teacher, or goes on where that was stopped -> (problem, answer) pairs. BadInput."""
    args = run.args
    system = args.system or BOXED
    if is_small(args.teacher):
        system = f"style: {args.teacher_style}"  # the embedded model knows both
    tokenizer = load_tokenizer(args.teacher)
    longest = context_of(args.teacher) - args.teacher_max_new_tokens
    if longest < 1:
        raise BadInput(f"--teacher-max-new-tokens {args.teacher_max_new_tokens}: the teacher's "
                       "context has no room for a prompt beside them")
    problems = run.train[:args.teacher_problems or None]
    problems = drop_long_prompts(tokenizer, problems, system, longest)

    # What a run that was stopped has left: the file is written whole after each batch.
    rows = []
    path = run.folder / "traces.jsonl"
    if args.resume and path.exists():
        rows = read_rows(str(path), "train", "--resume")
    found = [row.get("problem") for row in rows]
    if found != [row["problem"] for row in problems[:len(rows)]]:
        raise BadInput(f"--resume {path}: not of these problems; give it as --traces to a new run")

    # Ask, a batch of problems at a time.
    batch = max(1, ROWS // args.samples)
    missing = range(len(rows), len(problems), batch)
    teacher = None
    if missing:
        teacher = load_model(args, trained=False, name=args.teacher)
        prompt = encode_prompt(tokenizer, problems[0]["problem"], system)
        check_model(teacher, tokenizer, prompt, trained=False)
    run.make_folder()  # all flags have been checked
    path = run.folder / "traces.jsonl"
    bar = tqdm(desc="asking the teacher", total=len(problems), initial=len(rows), unit="problem",
               disable=rank() > 0)
    for first in missing:
        asked = problems[first:first + batch]
        seed = args.seed * 100_000_000 + first * 1000
        rows += ask_teacher(teacher, tokenizer, asked, system, seed, args)
        if rank() == 0:
            write_whole(path, json_lines(rows))
        bar.update(len(asked))
    bar.close()

    sampled = args.samples * len(rows)
    ended = sum(row["ended"] for row in rows)
    right = sum(row["right"] for row in rows)
    print(f"traces: {sampled} answers to {len(rows)} problems: {ended} ended, {right} right "
          f"({right / sampled:.1%})")
    return [(row["problem"], text) for row in rows for text in row["completions"]]


def use_stop_token(tokenizer, lm) -> list[int]:
    """What ends an assistant's turn in the chat template becomes the eos token -> all stop tokens.

    BadInput if there is neither.
    """
    stop = end_of_turn(tokenizer)
    if stop is not None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop)
    if tokenizer.eos_token_id is None:
        raise BadInput("the tokenizer has no eos token, so answers would have no end: name one in "
                       "its tokenizer_config.json")
    stops = stop_ids(lm, tokenizer)
    lm.generation_config.eos_token_id = stops
    return stops


def question(problem) -> str:
    """A problem's text, of a chat that of its last message."""
    return problem if isinstance(problem, str) else problem[-1]["content"]


def encode_traces(tokenizer, pairs: list[tuple], context: int, stops: list[int], system: str = "",
                  held_out: list[dict] = ()) -> list[dict]:
    """(problem, answer) pairs -> rows {"prompt", "response"} of token ids, eos behind the answer.

    stops: all token ids that end an answer. held_out: rows with "problem". Pairs are dropped
    whole, with a count. BadInput if none is left, or if a think block would be opened twice.
    """
    avoided = {question(row["problem"]) for row in held_out}
    rows = {}
    dropped = Counter()
    for problem, answer in pairs:
        key = json.dumps([problem, answer])
        prompt = encode_prompt(tokenizer, problem, system)
        opened = tokenizer.decode(prompt).rstrip().endswith(("<think>", "</think>"))
        if opened and answer.lstrip().startswith("<think>"):
            raise BadInput("traces begin with <think>, which the chat template opens as well: "
                           "take it out of them")
        response = tokenizer(answer.rstrip(), add_special_tokens=False)["input_ids"]
        while response and response[-1] in stops:
            response.pop()
        if key in rows:
            dropped["repeated"] += 1
        elif question(problem) in avoided:
            dropped["of held-out problems"] += 1
        elif not response or set(stops) & set(response):
            dropped["empty or with a stop token inside"] += 1
        elif len(prompt) + len(response) + 1 > context:
            dropped[f"longer than the context of {context} tokens"] += 1
        else:
            response.append(tokenizer.eos_token_id)
            rows[key] = {"prompt": prompt, "response": response}
    counts = [f"{count} {reason}" for reason, count in dropped.items()]
    print(f"traces: {len(rows)} to train on; dropped: {', '.join(counts) or 'none'}")
    if not rows:
        raise BadInput(f"none of the {len(pairs)} traces is left to train on: see the counts above")
    return list(rows.values())


def describe(tokenizer, rows: list[dict], stops: list[int]) -> dict:
    """Prints the first pair, special tokens and all, and the lengths -> what the summary keeps."""
    first = rows[0]
    text = tokenizer.decode(first["response"])
    if len(text) > 1000:
        text = f"{text[:600]} ... {text[-400:]}"
    print(f"first pair: {tokenizer.decode(first['prompt'])!r} -> {text!r}")
    if first["prompt"][-1] in stops:
        print("note: the prompt ends with a stop token, behind which models do not go on")
    lengths = [len(row["response"]) for row in rows]
    counts = histogram(lengths)
    print(f"        {sum(lengths)} tokens, {sum(lengths) / len(rows):.0f} per trace; lengths:")
    for span, count in counts.items():
        print(f"        {span:>13} {count:7} {'#' * math.ceil(50 * count / len(rows))}")
    return {"traces": len(rows), "tokens": sum(lengths), "histogram": counts}


def as_rollout(rows: list[dict], device) -> Rollout:
    """Encoded traces as what the sampler hands over, so that the same functions serve."""
    answers = [torch.tensor(row["response"], dtype=torch.long) for row in rows]
    tokens = pad_sequence(answers, batch_first=True).to(device)                     # (B, T)
    lengths = torch.tensor([len(answer) for answer in answers], device=device)      # (B,)
    place = torch.arange(tokens.shape[1], device=device)                            # (T,)
    mask = (place < lengths[:, None]).float()         # (B, T), 1.0 up to and on the stop token
    unknown = torch.zeros_like(mask)                                                # (B, T)
    return Rollout(
        prompts=[row["prompt"] for row in rows],
        tokens=tokens,
        lengths=lengths,
        mask=mask,
        logp=unknown,
        entropy=unknown,
        finished=lengths > 0,
        texts=[""] * len(rows))


def count_reflections(run, when: str, result: dict) -> None:
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
    teacher_temperature: float = flag(None, "1.0 for long, 0.7 for short chains, as in the paper",
                                      above=0, kind=float)
    teacher_top_p: float = flag(0.95, "the paper: 0.95", above=0, high=1)
    teacher_max_new_tokens: int = flag(160, "longest trace; the paper: 8192, short: 4096", low=1)
    teacher_problems: int = flag(256, "problems to ask; 0: all, as in the paper", low=0)
    samples: int = flag(8, "answers to each; the paper: 32 to 256", low=1)
    keep: str = flag("verified", "answers of reward 1 and more, or all that end",
                     choices=("verified", "all"))
    epochs: int = flag(2, "passes over the traces; the paper: 2", low=1)
    batch_size: int = flag(32, "traces per update; the paper: 256", low=1)
    lr: float = flag(1e-3, "AdamW, peak; ten times that with --lora-rank; the paper: 5e-6", above=0)
    max_new_tokens: int = flag(160, "longest answer in evaluation; the paper: 16384", low=1)


REAL = {"teacher_max_new_tokens": 8192, "teacher_problems": 0, "samples": 32, "batch_size": 256,
        "lr": 5e-6, "max_new_tokens": 4096}


@exit_on_bad_input
def main(argv=None):
    args = parse_args(Args, REAL, __doc__, argv)
    if args.teacher_temperature is None:
        args.teacher_temperature = TEMPERATURE[args.teacher_style]
    run = Run("long_cot_sft", args, reward)
    model = run.model
    lm = causal_lm(model)
    stops = use_stop_token(run.tokenizer, lm)

    # 1. Traces, of a file or of the teacher, whose memory goes before training.
    pairs = load_traces(args.traces) if args.traces else sample_traces(run)
    gc.collect()
    rows = encode_traces(run.tokenizer, pairs, lm.config.max_position_embeddings, stops,
                         args.system, run.held_out)
    largest = max(max(row["prompt"] + row["response"]) for row in rows)
    if largest >= len(lm.get_input_embeddings().weight):
        raise BadInput(f"a trace has the token {largest}, which the model does not have: the "
                       "tokenizer is another model's")
    about = describe(run.tokenizer, rows, stops)
    if run.summary.setdefault("traces", about) != about:
        raise BadInput(f"--resume {run.folder}: its traces have changed since")

    # 2. Before.
    visits = args.epochs * len(rows)
    args.steps = math.ceil(visits / args.batch_size)
    if run.held_out and "reflection_before" not in run.summary:
        count_reflections(run, "before", run.measure("before"))
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.95),
                                  weight_decay=0.0, foreach=False)
    nothing = {"prompt": rows[0]["prompt"], "response": []}

    for step in range(run.begin(optimizer=optimizer), args.steps):
        # 3. The traces of this update, equally many on every rank; the last pass may end early.
        batch = batch_of(rows, step, args.batch_size, args.seed)
        batch = batch[:visits - step * args.batch_size]
        padded = batch + [nothing] * (-len(batch) % size())
        rollout = as_rollout(share(padded), model.device)                   # B traces
        num_tokens = total(int(rollout.lengths.sum()))

        # 4. The mean of -log p over all answer tokens, the stop token among them.
        parts = []
        rows_here = torch.arange(len(rollout.lengths), device=model.device)  # (B,)
        for part in micro_batches(rollout, rows_here, args.micro_batch_tokens):
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
        run.lap("training")

        # 6. Book-keeping.
        seen = run.rows[-1]["tokens_seen"] if run.rows else 0
        speed = num_tokens / run.seconds["training"]
        run.log(step, parts=parts, grad_norms=[grad_norm], lr=lr, tokens_seen=seen + num_tokens,
                length=num_tokens / len(batch), tokens_per_second=speed)
        run.save(step + 1)
    result = run.finish()
    if result is not None:
        count_reflections(run, "after", result)
        run.write_summary()


if __name__ == "__main__":
    main()
