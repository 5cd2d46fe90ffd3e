"""Trains the embedded model beside this file: a Qwen3 of 0.8 M parameters that can do arithmetic
but samples it badly.

    python -m common.tiny.train       # about 27 minutes on one CPU core; overwrites common/tiny

It stands in for a pretrained base model: it has seen three styles of answer, a bare one, a short
chain of steps and a long chain in which every step is checked by its inverse and mended after a
"wait". One step in five is wrong on purpose, so the skill is there (the best of eight samples is
usually right) while a single sample at temperature 1 is right only now and then. That gap is what
reinforcement learning closes. Without a system message the styles are mixed; `style: direct`,
`style: short` or `style: long` as a system message asks for one.

Shape: 8 narrow blocks, an untied head and weight decay, because then the un-normed layer policies
(common/internal_policy.py) fall gradually from near ln V to near 0. With tied embeddings they
collapse after the first block. The scale of the residual stream is free (every reader normalises
it) but not to an un-normed policy: at the end it is doubled, which puts the boundary of BuPO's
exploration region at block 5; as trained, every block's FFN raised the entropy.
"""

import argparse
import json
import math
import pathlib
import random
import time

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from common.tiny.arithmetic import LARGEST, make_problem

HERE = pathlib.Path(__file__).parent
STYLES = {
    "direct": 0.45,
    "short": 0.40,
    "long": 0.15,
}  # how often each style is used when none is asked for
WRONG_STEP, MISSED_CHECK = (
    0.2,
    0.1,
)  # share of false results; of false results that a check waves through
INVERSE = {"+": "-", "-": "+", "*": "/"}
WORDS = [
    "Compute ",
    "style: ",
    "direct",
    "short",
    "long",
    "system",
    "user",
    "assistant",
    "\\boxed{",
    " check ",
    " ok",
    " wait",
    ", ",
    ". ",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token per printable ASCII character, and one per word that the answers are made of."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"]
    pieces = special + WORDS + ["\n"] + [chr(c) for c in range(32, 127)]
    tokenizer = Tokenizer(
        models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>")
    )
    escaped = "|".join(
        w.replace("\\", "\\\\").replace("{", "\\{").replace(".", "\\.") for w in WORDS
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{escaped}|[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


def make_answer(rng: random.Random, numbers: list[int], operators: list[str], style: str) -> str:
    """An answer in one style. A result is wrong with probability WRONG_STEP, and is built on."""
    numbers, operators, text = list(numbers), list(operators), []
    while operators:
        i = operators.index("*") if "*" in operators else 0
        a, b, operator = numbers[i], numbers[i + 1], operators.pop(i)
        right = {"+": a + b, "-": a - b, "*": a * b}[operator]
        for attempt in range(4):
            wrong = rng.random() < WRONG_STEP
            result = max(0, right + rng.choice((-10, -2, -1, 1, 2, 10))) if wrong else right
            text.append(f"{' wait, ' if attempt else ''}{a}{operator}{b}={result}")
            if style != "long":
                break
            back, rest = (
                divmod(result, b)
                if operator == "*"
                else (result - b if operator == "+" else result + b, 0)
            )
            if result == right or rng.random() < MISSED_CHECK:
                text.append(f" check {result}{INVERSE[operator]}{b}={a} ok")
                break
            text.append(f" check {result}{INVERSE[operator]}{b}={back}{'+' if rest else ''}")
        text.append(", " if operators else ". ")
        numbers[i : i + 2] = [result]
    return ("" if style == "direct" else "".join(text)) + f"\\boxed{{{numbers[0]}}}"


def make_batch(rng: random.Random, tokenizer, rows: int) -> list[tuple[list[int], list[int]]]:
    """-> rows of (ids, labels), sorted by length; labels are -100 outside the answer.

    Three rows in ten name their style.
    """
    batch = []
    for _ in range(rows):
        problem, numbers, operators = make_problem(rng, held_out=False)
        style = rng.choices(list(STYLES), STYLES.values())[0]
        system = rng.random() < 0.3
        if system:
            style = rng.choice(list(STYLES))
        messages = [{"role": "system", "content": f"style: {style}"}] * system + [
            {"role": "user", "content": problem}
        ]
        prompt = tokenizer(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        )["input_ids"]
        answer = tokenizer(make_answer(rng, numbers, operators, style) + "<|im_end|>")["input_ids"]
        batch.append((prompt + answer, [-100] * len(prompt) + answer))
    return sorted(batch, key=lambda row: len(row[0]))


def pad(rows: list[list[int]], value: int) -> torch.Tensor:
    """Lists of different lengths -> (B, T), filled on the right."""
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


@torch.no_grad()
def scale_residual(model, factor: float) -> None:
    """Multiplies all that is written into the residual stream.

    Norms read it, so the model says what it said, to the norms' epsilon; only the un-normed layer
    policies see the factor.
    """
    model.model.embed_tokens.weight.mul_(factor)
    for block in model.model.layers:
        block.self_attn.o_proj.weight.mul_(factor)
        block.mlp.down_proj.weight.mul_(factor)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rows", type=int, default=96, help="answers a step")
    parser.add_argument(
        "--lr",
        type=float,
        default=3e-3,
        help="peak; 100 steps of warm-up, then a cosine to a twentieth",
    )
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--residual-scale", type=float, default=2.0, help="see scale_residual")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads", type=int, default=1, help="two are a third faster, on an idle machine only"
    )
    parser.add_argument("--output", type=pathlib.Path, default=HERE)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = make_tokenizer()
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=args.width,
            intermediate_size=args.width * 8 // 3,
            num_hidden_layers=args.blocks,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=args.width // 4,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    matrices = [p for p in model.parameters() if p.dim() == 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": args.weight_decay},
            {"params": [p for p in model.parameters() if p.dim() != 2], "weight_decay": 0.0},
        ],
        lr=args.lr,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / 100, 0.05 + 0.475 * (1 + math.cos(math.pi * step / args.steps))
        ),
    )
    bar, started = tqdm(range(args.steps), unit="step"), time.time()
    for _ in bar:
        batch = make_batch(rng, tokenizer, args.rows)
        tokens = sum(label != -100 for _, labels in batch for label in labels)
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for start in range(0, args.rows, args.rows // 8):  # neighbours in length: little padding
            ids, labels = zip(*batch[start : start + args.rows // 8], strict=True)
            logits = model(input_ids=pad(ids, tokenizer.pad_token_id)).logits[:, :-1]  # (B, T-1, V)
            loss = (
                F.cross_entropy(
                    logits.flatten(0, 1), pad(labels, -100)[:, 1:].flatten(), reduction="sum"
                )
                / tokens
            )
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{total:.3f}")
    scale_residual(model, args.residual_scale)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    (args.output / "training.json").write_text(
        json.dumps(
            {
                **{k: v for k, v in vars(args).items() if k != "output"},
                "parameters": model.num_parameters(),
                "styles": STYLES,
                "wrong_step": WRONG_STEP,
                "missed_check": MISSED_CHECK,
                "largest": LARGEST,
                "loss": round(total, 4),
                "seconds": round(time.time() - started),
                "torch": torch.__version__,
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
