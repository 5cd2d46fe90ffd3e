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
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache, TopPLogitsWarper

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
    def mask(self):
        """(B, T), 1.0 on an answer's tokens, the stop token included; by length, never by ids."""
        place = torch.arange(self.tokens.shape[1], device=self.tokens.device)    # (T,)
        return (place < self.lengths[:, None]).float()

    def __getitem__(self, rows):
        """The rows with these numbers (b,). T stays, so they line up with the whole rollout."""
        chosen = {}
        for name, value in vars(self).items():
            if torch.is_tensor(value):
                chosen[name] = value[rows]
            else:
                chosen[name] = [value[i] for i in rows.tolist()]
        return Rollout(**chosen)


def sample(model, tokenizer, prompts, n, max_new_tokens, temperature=1.0, top_p=1.0, seed=0,
           alone=False):
    """n answers of at most max_new_tokens tokens to each prompt, a list of token ids.

    temperature 0 is greedy. top_p < 1 changes what is drawn, while logp and entropy stay the
    model's: for evaluation, biased in a policy gradient. On several ranks `prompts` are this rank's
    share and get the answers that one process would give them; alone: each rank draws all of them
    itself.
    """
    lm = causal_lm(model)
    was_training = model.training
    model.eval()

    # A random number for every token of every answer of all ranks; this rank takes its own.
    first, ranks = (0, 1) if alone else (rank(), size())
    shape = (len(prompts) * ranks, n, max_new_tokens)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(shape, dtype=torch.float64, generator=generator)
    noise = noise[first::ranks].flatten(0, 1)                                     # (B, T)
    owner = torch.arange(len(prompts)).repeat_interleave(n)                       # (B,)

    # As many rows at once as fit in memory.
    longest = max(map(len, prompts)) + max_new_tokens
    stop = torch.tensor(stop_ids(lm, tokenizer), device=lm.device)
    pieces = []
    with gathered(lm), autocast(model):
        for rows in torch.arange(len(owner)).split(rows_at_once(model, longest)):
            whose, place = owner[rows].unique(return_inverse=True)  # prompts that have a row here
            asked = [prompts[i] for i in whose]
            piece = decode(
                lm, asked, place, noise[rows],
                stop, temperature, top_p)
            pieces.append(piece)
    model.train(was_training)

    tokens, logp, entropy, lengths, finished = map(torch.cat, zip(*pieces, strict=True))
    T = int(lengths.max())
    pairs = zip(tokens.tolist(), lengths.tolist(), strict=True)
    answers = [row[:length] for row, length in pairs]
    return Rollout(
        prompts=[prompts[i] for i in owner],
        tokens=tokens[:, :T],
        lengths=lengths,
        logp=logp[:, :T],
        entropy=entropy[:, :T],
        finished=finished,
        texts=tokenizer.batch_decode(answers, skip_special_tokens=True))


class Cache(DynamicCache):
    """Keeps keys in the dtype of values, as attention reads them: autocast leaves them in float32,
    which is twice the memory and a copy of all of them per token."""

    def update(self, key, value, *rest, **named):
        return super().update(key.to(value.dtype), value, *rest, **named)


@torch.no_grad()
def decode(lm, prompts, owner, noise, stop, temperature, top_p):
    """One answer for each of owner (B,), the numbers of their prompts; noise (B, T) in [0, 1).

    -> tokens (B, T), logp (B, T), entropy (B, T), lengths (B,), finished (B,). Without
    inference_mode, in which autocast would cast the weights anew for each token.
    """
    device = lm.device
    B, max_new_tokens = noise.shape
    if device.type == "mps":  # which has no float64
        noise = noise.float().clamp(max=1 - 2**-24)
    noise = noise.to(device)
    owner = owner.to(device)

    # 1. Read each prompt once, padded on the left, and copy its cache to its answers.
    rows = [torch.tensor(prompt, device=device) for prompt in prompts]
    ids = pad_sequence(
        rows,
        batch_first=True,
        padding_value=-1,
        padding_side="left")                                             # (P, S)
    visible = (ids >= 0).long()                                          # (P, S)
    position = visible.cumsum(1) - 1                                     # (P, S)
    cache = Cache(config=lm.config)
    output = lm(
        ids.clamp(min=0),
        visible,
        position,
        cache,
        use_cache=True,
        logits_to_keep=1)
    logits = output.logits[owner, -1]                                    # (B, V)
    cache.batch_select_indices(owner)
    visible = visible[owner]                                             # (B, S)

    # 2. Draw a token for every answer until all of them have stopped.
    logp = torch.zeros(B, max_new_tokens, device=device)                 # (B, T)
    entropy = torch.zeros_like(logp)                                     # (B, T)
    tokens = torch.zeros_like(logp, dtype=torch.long)                    # (B, T)
    running = torch.arange(B, device=device)                             # (R,)
    lengths = torch.zeros_like(running)                                  # (B,)
    for t in tqdm(range(max_new_tokens), "sampling", delay=5, leave=False, disable=rank() > 0):
        full = (logits.float() / (temperature or 1.0)).log_softmax(-1)   # (R, V)
        probs = full.exp()                                               # (R, V)
        entropy[running, t] = -(probs * full).sum(-1)
        if top_p < 1:
            probs = TopPLogitsWarper(top_p)(None, full).exp()            # (R, V)
        if temperature == 0:
            token = full.argmax(-1)                                      # (R,)
        else:
            token = pick(probs, noise[running, t])                       # (R,)
        tokens[running, t] = token
        logp[running, t] = full.gather(1, token[:, None])[:, 0]
        lengths[running] = t + 1

        # Answers that have stopped leave the batch.
        going_on = ~torch.isin(token, stop)                              # (R,)
        if not going_on.all():
            running = running[going_on]
            token = token[going_on]
            visible = visible[going_on]
            cache.batch_select_indices(going_on.nonzero()[:, 0])
        if len(running) == 0 or t + 1 == max_new_tokens:
            break
        visible = F.pad(visible, (0, 1), value=1)                        # (R, S)
        position = visible.sum(1, keepdim=True) - 1                      # (R, 1)
        output = lm(token[:, None], visible, position, cache, use_cache=True)
        logits = output.logits[:, -1]                                    # (R, V)

    # 3. What is still running has been cut off.
    finished = lengths > 0                                               # (B,), True
    finished[running] = False
    return tokens, logp, entropy, lengths, finished


def pick(probs, noise):
    """The first token at which the running sum of probs (R, V) exceeds noise (R,) -> (R,).

    probs need not be normalised; sums are in noise's dtype. A row with a NaN gives the last token.
    """
    upto = probs.cumsum(-1, dtype=noise.dtype)                           # (R, V)
    goal = noise[:, None] * upto[:, -1:]                                 # (R, 1)
    place = torch.searchsorted(upto, goal, right=True)                   # (R, 1)
    return place[:, 0].clamp(max=probs.shape[1] - 1)


def join(rollout):
    """Prompts and answers as rows that are padded on the right -> ids (B, S), predicts (B, S).

    predicts is True where the *next* token belongs to the answer, so hidden[predicts] (N, D) are
    the states that predict the answers' tokens, row after row. No row at all becomes one of a
    single token that predicts nothing.
    """
    if not rollout.prompts:
        nothing = rollout.tokens.new_zeros(1, 1)
        return nothing, nothing.bool()
    rows = []
    answers = zip(rollout.prompts, rollout.tokens, rollout.lengths, strict=True)
    for prompt, answer, length in answers:
        rows.append(torch.cat([answer.new_tensor(prompt), answer[:length]]))
    ids = pad_sequence(rows, batch_first=True)                           # (B, S)
    following = torch.arange(ids.shape[1], device=ids.device) + 1        # (S,), the next place
    start = rollout.lengths.new_tensor([len(prompt) for prompt in rollout.prompts])
    start = start[:, None]                                               # (B, 1)
    end = start + rollout.lengths[:, None]                               # (B, 1)
    return ids, (start <= following) & (following < end)
