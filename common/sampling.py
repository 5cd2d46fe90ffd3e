"""Sampling: n answers to each prompt, in plain torch on a transformers model and its cache.

    rollout = sample(model, tokenizer, prompts, n=16, max_new_tokens=80)   # prompts: token ids
    rollout.tokens, rollout.mask, rollout.logp, rollout.texts, rollout.finished

Axes: P prompts, B = P * n answers (row p * n + g is answer g to prompt p), R rows that are still
running, S prompt and answer tokens, T answer tokens, V vocabulary.

Each token of each answer has a random number of its own, so up to rounding an answer depends on
(seed, row), n, max_new_tokens and the model alone: not on which rows are decoded together, nor on
the number of processes. logp is that of the full softmax at the sampling temperature, which
training computes again.
"""
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache

from common.distributed import gathered, rank, size
from common.models import autocast, causal_lm, rows_at_once, stop_ids


@dataclass
class Rollout:
    """B answers, padded on the right to the longest of them, T tokens."""
    prompts: list[list[int]]   # B lists of token ids
    tokens: torch.Tensor       # (B, T) answer ids, the stop token included, 0 behind it
    lengths: torch.Tensor      # (B,)   tokens of each answer
    logp: torch.Tensor         # (B, T) log-probs of the tokens when they were drawn, nats
    entropy: torch.Tensor      # (B, T) of the distributions they were drawn from, nats
    finished: torch.Tensor     # (B,)   False: cut off at max_new_tokens
    texts: list[str]           # B decoded answers, special tokens left out

    @property
    def mask(self) -> torch.Tensor:
        """(B, T), 1.0 on an answer's tokens, the stop token included; by length, never by ids."""
        place = torch.arange(self.tokens.shape[1], device=self.tokens.device)    # (T,)
        return (place < self.lengths[:, None]).float()

    def __getitem__(self, rows: torch.Tensor) -> "Rollout":
        """The rows with these numbers (b,). T stays, so they line up with the whole rollout."""
        chosen = {}
        for name, value in vars(self).items():
            if torch.is_tensor(value):
                chosen[name] = value[rows]
            else:
                chosen[name] = [value[i] for i in rows.tolist()]
        return Rollout(**chosen)


def sample(model, tokenizer, prompts: list[list[int]], n: int, max_new_tokens: int,
           temperature: float = 1.0, top_p: float = 1.0, seed: int = 0,
           max_rows: int | None = None, alone: bool = False) -> Rollout:
    """n answers of at most max_new_tokens tokens to each prompt -> Rollout of P * n rows.

    temperature 0 is greedy. top_p < 1 changes what is drawn, while logp and entropy stay the
    model's: for evaluation, biased in a policy gradient. max_rows bounds how many are decoded at
    once; default: what fits in memory. On several ranks `prompts` are this rank's share and get
    the answers that one process would give them; alone: each rank draws all of them itself.
    Raises ValueError for values out of range.
    """
    if not prompts or not all(prompts):
        raise ValueError("sample needs at least one prompt and no empty one")
    if n < 1 or max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"sample: {n=}, {max_new_tokens=}, {temperature=}, {top_p=} out of range")
    lm = causal_lm(model)
    was_training = model.training
    model.eval()

    # A random number for every token of every answer of all ranks; this rank takes its own.
    ranks = 1 if alone else size()
    mine = 0 if alone else rank()
    shape = (len(prompts) * ranks, n, max_new_tokens)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(shape, dtype=torch.float64, generator=generator)
    noise = noise[mine::ranks].flatten(0, 1)                                      # (B, T)
    owner = torch.arange(len(prompts)).repeat_interleave(n)                       # (B,)

    longest = max(len(prompt) for prompt in prompts) + max_new_tokens
    stop = torch.tensor(stop_ids(lm, tokenizer), device=lm.device)
    pieces = []
    with gathered(lm), autocast(model):
        max_rows = max_rows or rows_at_once(model, longest)  # as many as fit in memory
        for rows in torch.arange(len(owner)).split(max_rows):
            prompt = owner[rows]
            first = int(prompt[0])
            asked = prompts[first:int(prompt[-1]) + 1]
            piece = decode(
                lm, asked,
                owner=prompt - first,
                noise=noise[rows],
                stop=stop,
                temperature=temperature,
                top_p=top_p)
            pieces.append(piece)
    model.train(was_training)

    tokens, logp, entropy, lengths, finished = map(torch.cat, zip(*pieces, strict=True))
    T = int(lengths.max())
    answers = []
    for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True):
        answers.append(row[:length])
    return Rollout(
        prompts=[prompts[i] for i in owner.tolist()],
        tokens=tokens[:, :T],
        lengths=lengths,
        logp=logp[:, :T],
        entropy=entropy[:, :T],
        finished=finished,
        texts=tokenizer.batch_decode(answers, skip_special_tokens=True))


@torch.no_grad()
def decode(lm, prompts, owner, noise, stop, temperature, top_p):
    """One answer for each of owner (B,), the numbers of their prompts; noise (B, T) in [0, 1).

    -> tokens (B, T), logp (B, T), entropy (B, T), lengths (B,), finished (B,). Without
    inference_mode, in which autocast would cast the weights anew for each token.
    """
    device = lm.device
    B, max_new_tokens = noise.shape
    precise = torch.float32 if device.type == "mps" else torch.float64  # Apple's has no float64
    noise = noise.to(device, precise)
    owner = owner.to(device)

    # 1. Read each prompt once, padded on the left, and copy its cache to its answers.
    rows = [torch.tensor(prompt, device=device) for prompt in prompts]
    ones = [torch.ones_like(row) for row in rows]
    ids = pad_sequence(rows, batch_first=True, padding_side="left")      # (P, S)
    visible = pad_sequence(ones, batch_first=True, padding_side="left")  # (P, S)
    position = (visible.cumsum(1) - 1).clamp(min=0)                      # (P, S)
    cache = DynamicCache(config=lm.config)
    last = torch.tensor([ids.shape[1] - 1], device=device)  # a 1 leaves a strided view: slow head
    output = lm(ids, visible, position, cache, use_cache=True, logits_to_keep=last)
    logits = output.logits[owner, -1]                                    # (B, V)
    cache.batch_select_indices(owner)
    visible = visible[owner]                                             # (B, S)
    position = position[owner, -1:]                                      # (B, 1)

    # 2. Draw a token for every answer until all of them have stopped.
    tokens = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)  # (B, T)
    logp = torch.zeros(B, max_new_tokens, device=device)                 # (B, T)
    entropy = torch.zeros(B, max_new_tokens, device=device)              # (B, T)
    lengths = torch.zeros(B, dtype=torch.long, device=device)            # (B,)
    running = torch.arange(B, device=device)                             # (R,)
    bar = tqdm(
        desc="sampling",
        unit=" tokens",
        delay=5,  # seconds until it shows
        leave=False,
        disable=rank() > 0)
    for t in range(max_new_tokens):
        scores = logits.float() / (temperature or 1.0)                   # (R, V)
        full = scores.log_softmax(-1)                                    # (R, V)
        drawn_from = full if top_p == 1 else keep_top_p(full, top_p)     # (R, V)
        if temperature == 0:
            token = full.argmax(-1)                                      # (R,)
        else:
            token = pick(drawn_from.exp(), noise[running, t])            # (R,)
        tokens[running, t] = token
        its_logp = full.gather(1, token[:, None])                        # (R, 1)
        logp[running, t] = its_logp[:, 0]
        weighted = full.exp() * full.clamp(min=-1e4)                     # (R, V), p log p
        entropy[running, t] = -weighted.sum(-1)
        lengths[running] = t + 1
        bar.update(len(running))

        # Answers that have stopped leave the batch.
        going_on = ~torch.isin(token, stop)                              # (R,)
        if not going_on.all():
            running = running[going_on]
            token = token[going_on]
            visible = visible[going_on]
            position = position[going_on]
            cache.batch_select_indices(going_on.nonzero()[:, 0])
            bar.set_postfix_str(f"{B - len(running)} of {B} answers ended", refresh=False)
        if len(running) == 0 or t + 1 == max_new_tokens:
            break
        token = token[:, None]                                           # (R, 1)
        one = torch.ones_like(token)                                     # (R, 1)
        visible = torch.cat([visible, one], 1)                           # (R, S)
        position = position + 1
        output = lm(token, visible, position, cache, use_cache=True)
        logits = output.logits[:, -1]                                    # (R, V)
    bar.close()

    # 3. What is still running has been cut off.
    finished = torch.ones(B, dtype=torch.bool, device=device)            # (B,)
    finished[running] = False
    return tokens, logp, entropy, lengths, finished


def pick(probs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The first token at which the running sum of probs (R, V) exceeds noise (R,). -> (R,)

    probs need not be normalised; sums are in noise's dtype. A row with a NaN gives the last token.
    """
    upto = probs.cumsum(-1, dtype=noise.dtype)                                             # (R, V)
    below_one = noise.clamp(max=1 - torch.finfo(noise.dtype).eps)                          # (R,)
    goal = below_one[:, None] * upto[:, -1:]                                               # (R, 1)
    place = torch.searchsorted(upto, goal, right=True)                                     # (R, 1)
    last = probs.shape[-1] - 1
    return place[:, 0].clamp(max=last)                                                     # (R,)


def keep_top_p(logp: torch.Tensor, top_p: float) -> torch.Tensor:
    """Log-probs (R, V), -inf outside the smallest set of tokens whose probabilities reach top_p."""
    ordered, order = logp.sort(dim=-1, descending=True)
    probs = ordered.exp()                                                                  # (R, V)
    before = probs.cumsum(-1) - probs         # the token that crosses the line stays in   # (R, V)
    too_far = before >= top_p                                                              # (R, V)
    outside = too_far.scatter(-1, order, too_far)              # back in the vocabulary's order
    return logp.masked_fill(outside, -torch.inf)


def join(prompts: list[list[int]], tokens: torch.Tensor, lengths: torch.Tensor):
    """Prompts and answers, padded on the right -> ids (B, S), predicts (B, S).

    predicts is True where the *next* token belongs to the answer, so hidden[predicts] (N, D) are
    the states that predict the answers' tokens, row after row. No row at all becomes one of a
    single token that predicts nothing.
    """
    if not prompts:
        return tokens.new_zeros(1, 1), tokens.new_zeros(1, 1, dtype=torch.bool)
    rows = []
    for prompt, answer, length in zip(prompts, tokens, lengths.tolist(), strict=True):
        rows.append(torch.cat([tokens.new_tensor(prompt), answer[:length]]))
    ids = pad_sequence(rows, batch_first=True)                                   # (B, S)
    start = lengths.new_tensor([len(prompt) for prompt in prompts])[:, None]     # (B, 1)
    end = start + lengths[:, None]                                               # (B, 1)
    following = torch.arange(ids.shape[1], device=ids.device) + 1                # (S,)
    predicts = (start <= following) & (following < end)                          # (B, S)
    return ids, predicts
