"""Long chain-of-thought SFT: keep the right ones among a teacher's long answers and imitate them.

Paper: Demystifying Long Chain-of-Thought (arXiv 2502.03373), sections 3 to 5; ppo.py is its RL.
Run:   python long_cot_sft.py                        the embedded model learns to check itself
       python long_cot_sft.py --teacher-style short  the paper's rival: short chains
       python long_cot_sft.py --model Qwen/Qwen2.5-Math-7B --traces TRACES.jsonl
See:   the share of answers kept and a histogram of their lengths. The loss falls, and the student
       writes long chains unasked: more of its answers are right, "wait" appears in them.
       <run>/traces.jsonl is what it learns from; python ppo.py --model runs/long_cot_sft goes on.

Deviations from the paper, and why:
1. The loss is a mean over all tokens of an update, so that micro-batches change nothing (authors:
   per answer first). Prompts are masked; the one stop token behind an answer is trained.
2. The schedule is theirs, 3 % warm-up and a cosine to 10 %, at a higher rate for small models.
3. The teacher shares the student's device. One that needs a server (theirs: QwQ-32B-Preview, short
   chains Qwen2.5-Math-72B-Instruct) is sampled there, and its answers come by --traces.
4. Repeated answers are kept once, those that were cut off never; a trace that is longer than the
   context is dropped, not cut.
5. Their counter of reflection words is not published; ours counts answers with the whole word.

Axes: B traces, T answer tokens, V vocabulary; b a micro-batch's share of B.
"""
import gc
import json
import math
import pathlib
import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig

from common.data import batch_of, drop_long_prompts, encode_prompt, is_chat, is_text, read_rows
from common.distributed import everyone, rank, share, size, total
from common.flags import BOXED, BadInput, Shared, exit_on_bad_input, flag, parse_args
from common.logprobs import micro_batches, response_logprobs
from common.models import causal_lm, from_pretrained, is_small, load_model, load_tokenizer, stop_ids
from common.run import Run
from common.sampling import Rollout, sample
from common.verify import verify

WORDS = ("wait", "recheck", "alternatively", "retry", "however")
TEMPERATURE = {"long": 1.0, "short": 0.7}
SETTINGS = ("teacher", "teacher_style", "teacher_temperature", "teacher_top_p",
            "teacher_max_new_tokens", "system", "samples", "keep", "seed")
ROWS = 256     # answers that are drawn and written together: a kill loses no more
PATIENCE = 64  # problems without an answer to keep before the teacher is given up


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
    pairs, unusable = [], 0
    for row in rows:
        problem, answers = row.get("prompt"), [row.get("completion")]
        if isinstance(row.get("completions"), list):
            problem, answers = row.get("problem"), row["completions"]
        elif is_chat(row.get("messages")):
            *problem, last = row["messages"]
            answers = [last["content"] if last["role"] == "assistant" else None]
        for answer in answers:
            if is_chat(answer):
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


def read_sampled(path: pathlib.Path, problems: list[dict], settings: str, batch: int):
    """-> rows, the bytes they take: all that is in a file, or whole batches if some are missing.

    What is behind the last newline was cut short. BadInput for other problems or settings.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    ours = True
    for line, row in zip(lines, problems, strict=False):
        start = json.dumps({"settings": settings, "problem": row["problem"]}, ensure_ascii=False)
        start = start.encode()[:-1]  # without the closing brace
        ours = ours and line[:len(start)] == start[:len(line)]
    whole = lines[:-1][:len(problems)]
    try:
        rows = [json.loads(line) for line in whole]
    except ValueError:
        ours = False
    if not ours:
        raise BadInput(f"{path}: not of these problems and flags (teacher, style, samples, seed, "
                       "...); give another --traces-out, or learn from it by --traces")
    count = len(rows)
    if count < len(problems):
        count -= count % batch
    return rows[:count], sum(len(line) + 1 for line in whole[:count])


def write_sampled(path: pathlib.Path, place: int, rows: list[dict]) -> int:
    """Puts rows behind the first `place` bytes of a file -> where they end."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        file.truncate(place)
        file.seek(place)
        file.write("".join(lines).encode())
        return file.tell()


def ask_teacher(teacher, tokenizer, problems, system: str, seed: int, args) -> list[dict]:
    """-> what the teacher's answers to each problem come to, the same on every rank."""
    padding = problems[-1:] * (-len(problems) % size())  # every rank needs one
    mine = share(problems + padding)
    prompts = [encode_prompt(tokenizer, row["problem"], system) for row in mine]
    rollout = sample(teacher, tokenizer, prompts, args.samples, args.teacher_max_new_tokens,
                     args.teacher_temperature, args.teacher_top_p, seed=seed)
    found = []
    for i, row in enumerate(mine):
        group = range(i * args.samples, (i + 1) * args.samples)
        ended = [rollout.texts[j] for j in group if rollout.finished[j]]
        right = [text for text in ended if reward(text, row) >= 1]
        kept = ended if args.keep == "all" else right
        found.append({"problem": row["problem"], "answer": row["answer"],
                      "completions": list(dict.fromkeys(kept)),
                      "sampled": args.samples, "ended": len(ended), "right": len(right)})
    together = zip(*everyone(found), strict=True)
    answered = [row for of_ranks in together for row in of_ranks]
    return answered[:len(problems)]


def sample_traces(run) -> list[tuple]:
    """Asks the teacher, or goes on where that was stopped -> (problem, answer) pairs. BadInput."""
    # What to ask, and what has been answered.
    args = run.args
    system = args.system or BOXED
    if is_small(args.teacher):
        system = f"style: {args.teacher_style}"  # the embedded model knows both
    tokenizer = load_tokenizer(args.teacher)
    config = from_pretrained(AutoConfig, args.teacher).get_text_config()
    longest = config.max_position_embeddings - args.teacher_max_new_tokens
    if longest < 1:
        raise BadInput(f"--teacher-max-new-tokens {args.teacher_max_new_tokens}: the teacher's "
                       "context has no room for a prompt beside them")
    problems = run.train[:args.teacher_problems or None]
    problems = drop_long_prompts(tokenizer, problems, system, longest)
    settings = " ".join(f"{name}={getattr(args, name)}" for name in SETTINGS)
    batch = max(1, ROWS // args.samples)
    rows, place = [], 0
    if args.traces_out or args.resume:
        path = pathlib.Path(args.traces_out or run.folder / "traces.jsonl")
        rows, place = read_sampled(path, problems, settings, batch)
    missing = range(len(rows), len(problems), batch)
    teacher = load_model(args, trained=False, name=args.teacher) if missing else None
    run.make_folder()  # all flags have been checked
    path = pathlib.Path(args.traces_out or run.folder / "traces.jsonl")

    # Ask.
    bar = tqdm(desc="asking the teacher", unit=" tokens", disable=rank() > 0)

    def count_tokens(module, inputs, output):  # each pass draws one for every unended answer
        bar.update(len(output.logits))

    if teacher is not None:
        teacher.register_forward_hook(count_tokens)
    for first in missing:
        if first >= PATIENCE and not any(row["completions"] for row in rows):
            break
        asked = problems[first:first + batch]
        seed = args.seed * 100_000_000 + first * 1000
        answered = ask_teacher(teacher, tokenizer, asked, system, seed, args)
        answered = [{"settings": settings, **row} for row in answered]
        if rank() == 0:
            place = write_sampled(path, place, answered)
        rows += answered
        ended = sum(row["ended"] for row in rows)
        bar.set_description_str(f"{ended} answers ended, {len(rows)} of {len(problems)} problems")
    bar.close()

    # Count.
    pairs = [(row["problem"], text) for row in rows for text in row["completions"]]
    counts = {"problems": len(rows), "kept": len(pairs)}
    for name in ("sampled", "ended", "right"):
        counts[name] = sum(row[name] for row in rows)
    run.summary["sampling"] = counts
    kept_share = len(pairs) / counts["sampled"]
    line = (f"{counts['sampled']} answers to {len(rows)} problems: {counts['ended']} ended, "
            f"{counts['right']} right, {len(pairs)} kept ({kept_share:.1%})")
    if not pairs:
        raise BadInput(f"--teacher {args.teacher}: {line}; raise --teacher-max-new-tokens or "
                       "--samples, ask for a \\boxed{} by --system, or take easier problems")
    print(f"traces: {line}, each once")
    return pairs


def use_stop_token(tokenizer, model) -> None:
    """The token that ends an assistant's turn in the chat template becomes the eos token.

    BadInput if there is neither.
    """
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
        end = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("ANSWER")[2]
        added = tokenizer.added_tokens_decoder
        ids = tokenizer(end, add_special_tokens=False)["input_ids"]
        ends = [added[i].content for i in ids if i in added and added[i].special]
        if ends and ends[0] != tokenizer.eos_token:
            print(f"note: {ends[0]} ends an answer, as in the chat template, and not the "
                  f"tokenizer's eos token, {tokenizer.eos_token}")
            tokenizer.eos_token = ends[0]
    if tokenizer.eos_token_id is None:
        raise BadInput("the tokenizer has no eos token, so answers would have no end: name one in "
                       "its tokenizer_config.json")
    model.generation_config.eos_token_id = stop_ids(model, tokenizer)


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
    rows, dropped = {}, Counter()
    for problem, answer in pairs:
        key = json.dumps([problem, answer])
        prompt = encode_prompt(tokenizer, problem, system)
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
            rows[key] = {"prompt": prompt, "response": [*response, tokenizer.eos_token_id]}
        if answer.lstrip().startswith("<think>"):
            if tokenizer.decode(prompt).rstrip().endswith(("<think>", "</think>")):
                raise BadInput("traces begin with <think>, which the chat template opens as well: "
                               "take it out of them")
    counts = [f"{count} {reason}" for reason, count in dropped.items()]
    print(f"traces: {len(rows)} to train on; dropped: {', '.join(counts) or 'none'}")
    if not rows:
        raise BadInput(f"none of the {len(pairs)} traces is left to train on: see the counts above")
    rows = list(rows.values())
    prompt, response = rows[0]["prompt"], rows[0]["response"]
    text = tokenizer.decode(response)
    if len(text) > 1000:
        text = f"{text[:600]} ... {text[-400:]}"
    print(f"first pair: {tokenizer.decode(prompt)!r} -> {text!r}")
    if prompt[-1] in stops:
        print("note: the prompt ends with a stop token, behind which models do not go on")
    return rows


def as_rollout(rows: list[dict], device) -> Rollout:
    """Encoded traces as what the sampler hands over, so that the same functions serve."""
    answers = [torch.tensor(row["response"], dtype=torch.long) for row in rows]
    tokens = pad_sequence(answers, batch_first=True).to(device)                     # (B, T)
    lengths = torch.tensor([len(answer) for answer in answers], device=device)      # (B,)
    place = torch.arange(tokens.shape[1], device=device)                            # (T,)
    mask = (place < lengths[:, None]).float()                                       # (B, T)
    unknown = torch.zeros_like(mask)                                                # (B, T)
    return Rollout([row["prompt"] for row in rows], tokens, lengths, mask, logp=unknown,
                   entropy=unknown, finished=lengths > 0, texts=[""] * len(rows))


def count_reflections(run, when: str, result: dict) -> None:
    """Prints and keeps the reflection words of an evaluation's answers."""
    rates = reflection_rates([text for row in result["answers"] for text in row["responses"]])
    run.summary[f"reflection_{when}"] = rates
    shares = ", ".join(f"{word} {rate:.1%}" for word, rate in rates.items())
    print(f"{when + ':':7} share of answers with a reflection word: {shares}")


@dataclass
class Args(Shared):
    traces: str = flag(None, "learn from this file or hub set and ask no teacher")
    traces_out: str = flag(None, "where sampled traces go, and are gone on with; default: "
                           "traces.jsonl in the run")
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
    model, lm = run.model, causal_lm(run.model)
    use_stop_token(run.tokenizer, lm)

    # 1. Traces, of a file or of the teacher, whose memory goes before training.
    pairs = load_traces(args.traces) if args.traces else sample_traces(run)
    gc.collect()
    torch.cuda.empty_cache()
    rows = encode_traces(run.tokenizer, pairs, lm.config.max_position_embeddings,
                         stop_ids(lm, run.tokenizer), args.system, run.held_out)
    lengths = [len(row["response"]) for row in rows]
    about = {"traces": len(rows), "tokens": sum(lengths), "histogram": histogram(lengths)}
    print(f"        {sum(lengths)} tokens, {sum(lengths) / len(rows):.0f} per trace; lengths:")
    for span, count in about["histogram"].items():
        print(f"        {span:>13} {count:7} {'#' * math.ceil(50 * count / len(rows))}")
    if run.summary.setdefault("traces", about) != about:
        raise BadInput(f"--resume {run.folder}: its traces have changed since")

    # 2. Before.
    visits = args.epochs * len(rows)
    args.steps = math.ceil(visits / args.batch_size)
    if run.held_out and "reflection_before" not in run.summary:
        count_reflections(run, "before", run.measure("before"))
    on_card = model.device.type == "cuda"  # where a fused update needs no copies
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.95),
                                  weight_decay=0.0, fused=on_card)
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
        run.write("summary.json", run.summary)


if __name__ == "__main__":
    main()
