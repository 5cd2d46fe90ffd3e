"""Sampling: n answers to each prompt, in plain torch on a transformers model and its cache.

    rollout = sample(model, tokenizer, prompts, n=16, max_new_tokens=80)   # prompts: token ids
    rollout.tokens, rollout.mask, rollout.logp, rollout.texts, rollout.finished

Axes: P prompts, B = P * n answers (row p * n + g is answer g to prompt p), R rows that are still
running, S prompt and answer tokens, T answer tokens, V vocabulary.

Each token of each answer has a random number of its own, so an answer depends on (seed, row) and
the model alone: not on which rows are decoded together, nor on the number of processes. logp is
that of the full softmax at the sampling temperature, which training computes again.
"""
from dataclasses import dataclass, fields

import torch
from transformers import DynamicCache

from common.distributed import gathered, rank, size
from common.models import autocast, causal_lm, linear_maps_cast, rows_at_once, stop_ids


@dataclass
class Rollout:
    """B answers, padded on the right to the longest of them, T tokens."""
    prompts: list[list[int]]   # B lists of token ids
    tokens: torch.Tensor       # (B, T) answer ids, the stop token included, 0 behind it
    lengths: torch.Tensor      # (B,)   tokens of each answer
    mask: torch.Tensor         # (B, T) 1.0 inside the answer; from lengths, never from ids
    logp: torch.Tensor         # (B, T) log-probs of the tokens when they were drawn, nats
    entropy: torch.Tensor      # (B, T) of the distributions they were drawn from, nats
    finished: torch.Tensor     # (B,)   False: cut off at max_new_tokens
    texts: list[str]           # B decoded answers, special tokens left out

    def __getitem__(self, rows: torch.Tensor) -> "Rollout":
        """The rows with these numbers (b,). T stays, so they line up with the whole rollout."""
        chosen = {}
        for field in fields(self):
            value = getattr(self, field.name)
            is_tensor = torch.is_tensor(value)
            chosen[field.name] = value[rows] if is_tensor else [value[i] for i in rows.tolist()]
        return Rollout(**chosen)


def sample(model, tokenizer, prompts: list[list[int]], n: int, max_new_tokens: int,
           temperature: float = 1.0, top_p: float = 1.0, repetition_penalty: float = 1.0,
           seed: int = 0, max_rows: int | None = None, alone: bool = False) -> Rollout:
    """n answers of at most max_new_tokens tokens to each prompt -> Rollout of P * n rows.

    temperature 0 is greedy. top_p < 1 and repetition_penalty > 1 (CTRL, arXiv 1909.05858) change
    what is drawn, while logp and entropy stay the model's: for evaluation, biased in a policy
    gradient. max_rows bounds how many are decoded at once; default: what fits in memory. On
    several ranks `prompts` are this rank's share and get the answers that one process would give
    them; alone: each rank draws all of them itself. Raises ValueError for values out of range.
    """
    if not prompts or not all(prompts):
        raise ValueError("sample needs at least one prompt and no empty one")
    if n < 1 or max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"sample: {n=}, {max_new_tokens=}, {temperature=} or {top_p=} is wrong")
    if repetition_penalty <= 0:
        raise ValueError(f"sample: {repetition_penalty=} must be above 0")
    lm = causal_lm(model)
    was_training = model.training
    model.eval()

    # A random number for every token of every answer of all ranks, of which this rank takes its.
    generator = torch.Generator().manual_seed(seed)
    ranks = 1 if alone else size()
    all_noise = torch.rand(len(prompts) * ranks, n, max_new_tokens, dtype=torch.float64,
                           generator=generator)
    noise = all_noise[0 if alone else rank()::ranks].flatten(0, 1)                # (B, T)
    owner = torch.arange(len(prompts)).repeat_interleave(n)                       # (B,)

    longest = max(len(prompt) for prompt in prompts) + max_new_tokens
    max_rows = max_rows or rows_at_once(model, longest)
    stop = torch.tensor(stop_ids(lm, tokenizer), device=lm.device)
    pieces = []
    with gathered(lm), linear_maps_cast(model), autocast(model):
        for part, part_noise in zip(owner.split(max_rows), noise.split(max_rows), strict=True):
            first, last = int(part[0]), int(part[-1])
            pieces.append(decode(lm, prompts[first:last + 1], part - first, part_noise, stop,
                                 temperature, top_p, repetition_penalty))
    model.train(was_training)

    tokens, logp, entropy, lengths, finished = (
        torch.cat(tensors) for tensors in zip(*pieces, strict=True))
    T = int(lengths.max())
    mask = (torch.arange(T, device=lm.device) < lengths[:, None]).float()         # (B, T)
    answers = [row[:k] for row, k in zip(tokens.tolist(), lengths.tolist(), strict=True)]
    return Rollout(
        prompts=[prompts[i] for i in owner.tolist()], tokens=tokens[:, :T], lengths=lengths,
        mask=mask, logp=logp[:, :T], entropy=entropy[:, :T], finished=finished,
        texts=tokenizer.batch_decode(answers, skip_special_tokens=True))


@torch.inference_mode()
def decode(lm, prompts, owner, noise, stop, temperature, top_p, repetition_penalty):
    """One answer for each of owner (B,), the numbers of their prompts; noise (B, T) in [0, 1).

    -> tokens (B, T), logp (B, T), entropy (B, T), lengths (B,), finished (B,).
    """
    device = lm.device
    B, max_new_tokens = noise.shape
    precise = torch.float32 if device.type == "mps" else torch.float64            # Apple has none
    noise, owner = noise.to(device, precise), owner.to(device)

    # 1. Read each prompt once, padded on the left, and copy its cache to its answers.
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)       # (P, S)
    is_token = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    visible = torch.tensor(is_token, device=device)                                        # (P, S)
    position = (visible.cumsum(1) - 1).clamp(min=0)                                        # (P, S)
    cache = DynamicCache(config=lm.config)
    logits = lm(ids, visible, position, cache, use_cache=True, logits_to_keep=1).logits    # by place
    cache.batch_select_indices(owner)
    logits = logits[owner, -1]                                                             # (B, V)
    visible, position = visible[owner], position[owner, -1:]                       # (B, S), (B, 1)

    # 2. Draw a token for every answer until all of them have stopped.
    tokens = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)               # (B, T)
    logp = torch.zeros(B, max_new_tokens, device=device)                                   # (B, T)
    entropy = torch.zeros_like(logp)                                                       # (B, T)
    lengths = torch.zeros(B, dtype=torch.long, device=device)                              # (B,)
    running = torch.arange(B, device=device)                                               # (R,)
    said = None
    if repetition_penalty != 1:
        said = torch.zeros_like(logits, dtype=torch.bool)                                  # (B, V)
        for row, prompt in enumerate(owner.tolist()):
            said[row, prompts[prompt]] = True
    for t in range(max_new_tokens):
        scores = logits.float()                                                            # (R, V)
        full = (scores / (temperature or 1.0)).log_softmax(-1)                             # (R, V)
        drawn_from = full
        if said is not None:
            weaker = torch.where(scores > 0, scores / repetition_penalty,
                                 scores * repetition_penalty)
            scores = torch.where(said[running], weaker, scores)
            drawn_from = (scores / (temperature or 1.0)).log_softmax(-1)
        if top_p < 1:
            drawn_from = keep_top_p(drawn_from, top_p)
        token = pick(drawn_from.exp(), noise[running, t])                                  # (R,)
        if temperature == 0:
            token = drawn_from.argmax(-1)
        tokens[running, t] = token
        logp[running, t] = full.gather(1, token[:, None])[:, 0]
        entropy[running, t] = -(full.exp() * full.clamp(min=-1e4)).sum(-1)
        lengths[running] = t + 1
        if said is not None:
            said[running, token] = True

        # Answers that have stopped leave the batch.
        going_on = ~torch.isin(token, stop)                                                # (R,)
        if not going_on.all():
            running, token = running[going_on], token[going_on]
            visible, position = visible[going_on], position[going_on]
            cache.batch_select_indices(going_on.nonzero()[:, 0])
        if len(running) == 0 or t + 1 == max_new_tokens:
            break
        visible = torch.cat([visible, torch.ones_like(token[:, None])], 1)
        position = position + 1
        logits = lm(token[:, None], visible, position, cache, use_cache=True).logits[:, -1]

    # 3. What is still running has been cut off.
    finished = torch.ones(B, dtype=torch.bool, device=device)                              # (B,)
    finished[running] = False
    return tokens, logp, entropy, lengths, finished


def pick(probs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The first token at which the running sum of probs (R, V) exceeds noise (R,). -> (R,)

    probs need not be normalised; sums are in noise's dtype. A row with a NaN gives the last token.
    """
    upto = probs.cumsum(-1, dtype=noise.dtype)                                             # (R, V)
    below_one = noise.clamp(max=1 - torch.finfo(noise.dtype).eps)                          # (R,)
    goal = below_one[:, None] * upto[:, -1:]                                               # (R, 1)
    token = torch.searchsorted(upto, goal, right=True)[:, 0]                               # (R,)
    return token.clamp(max=probs.shape[-1] - 1)


def keep_top_p(logp: torch.Tensor, top_p: float) -> torch.Tensor:
    """Log-probs (R, V), -inf outside the smallest set of tokens whose probabilities reach top_p."""
    ordered, order = logp.sort(dim=-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()    # the token that crosses the line stays in
    outside = (before >= top_p).scatter(-1, order, before >= top_p)
    return logp.masked_fill(outside, -torch.inf)


def join(prompts: list[list[int]], tokens: torch.Tensor, lengths: torch.Tensor):
    """Prompts and answers, padded on the right -> ids (B, S), predicts (B, S).

    predicts is True where the *next* token belongs to the answer, so hidden[predicts] (N, D) are
    the states that predict the answers' tokens, row after row. No row at all becomes one of a
    single token that predicts nothing.
    """
    rows = []
    predicts = []
    for prompt, answer, k in zip(prompts, tokens.tolist(), lengths.tolist(), strict=True):
        rows.append(prompt + answer[:k])
        predicts.append([False] * (len(prompt) - 1) + [True] * k + [False])
    rows, predicts = rows or [[0]], predicts or [[False]]
    S = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (S - len(row)) for row in rows], device=tokens.device)
    inside = [row + [False] * (S - len(row)) for row in predicts]
    return ids, torch.tensor(inside, device=tokens.device)
