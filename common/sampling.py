"""Sampling: n answers to each prompt, in plain torch on a transformers model and its cache.

    rollout = sample(model, tokenizer, prompts, n=16, max_new_tokens=80)   # prompts: token ids
    rollout.tokens, rollout.mask, rollout.logp, rollout.texts, rollout.finished

Axes: P prompts, B = P * n answers, R still running, T answer tokens, S with prompt, V vocabulary.
Row p * n + g is answer g to prompt p.

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
from common.models import autocast, rows_at_once, stop_ids


@dataclass
class Rollout:
    """B answers, padded on the right to the longest of them, T tokens."""
    prompts: list[list[int]]   # B lists of token ids
    tokens: torch.Tensor       # (B, T) answer ids, the stop token included, 0 behind it
    lengths: torch.Tensor      # (B,)   tokens of each answer
    logp: torch.Tensor         # (B, T) log-probs of the tokens when they were drawn, nats
    entropy: torch.Tensor      # (B, T) of the model's distribution at each token, nats
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
            is_list = isinstance(value, list)
            chosen[name] = [value[i] for i in rows.tolist()] if is_list else value[rows]
        return Rollout(**chosen)


def sample(model, tokenizer, prompts, n, max_new_tokens, temperature=1.0, top_p=1.0, seed=0,
           alone=False):
    """n answers of at most max_new_tokens tokens to each prompt, a list of token ids -> Rollout.

    temperature 0 is greedy. top_p < 1 changes what is drawn, while logp and entropy stay the
    model's: for evaluation, biased in a policy gradient. On several ranks `prompts` are this rank's
    share and get the answers that one process would give them; alone: each rank draws all of them
    itself.
    """
    device = model.device
    was_training = model.training
    model.eval()

    # A random number for every token of every answer of all ranks; this rank takes its own.
    first, ranks = (0, 1) if alone else (rank(), size())
    shape = (len(prompts) * ranks, n, max_new_tokens)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(shape, dtype=torch.float64, generator=generator)
    noise = noise[first::ranks].flatten(0, 1)                            # (B, T)
    if device.type == "mps":  # which has no float64
        noise = noise.float().clamp(max=1 - 2**-24)
    noise = noise.to(device)

    # As many rows at once as fit in memory.
    zeros = torch.zeros(noise.shape, device=device)                      # (B, T)
    rollout = Rollout(
        prompts=[prompt for prompt in prompts for _ in range(n)],
        tokens=zeros.long(),
        lengths=zeros[:, 0].long(),
        logp=zeros,
        entropy=zeros.clone(),
        finished=zeros[:, 0].bool(),
        texts=[])
    stop = torch.tensor(stop_ids(model, tokenizer), device=device)
    longest = max(map(len, prompts)) + max_new_tokens
    rows = torch.arange(len(noise), device=device)                       # (B,)
    with gathered(model), autocast(model):
        for part in rows.split(rows_at_once(model, longest)):
            decode(model, rollout, part, n, noise, stop, temperature, top_p)
    model.train(was_training)

    T = int(rollout.lengths.max())
    rollout.tokens = rollout.tokens[:, :T]
    rollout.logp = rollout.logp[:, :T]
    rollout.entropy = rollout.entropy[:, :T]
    pairs = zip(rollout.tokens.tolist(), rollout.lengths.tolist())
    answers = [row[:length] for row, length in pairs]
    rollout.texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return rollout


class Cache(DynamicCache):
    """Keeps keys in the dtype of values, as attention reads them: autocast leaves keys in float32,
    which is twice the memory and a copy of all of them per token."""

    def update(self, key, value, *rest, **named):
        return super().update(key.to(value.dtype), value, *rest, **named)


@torch.no_grad()
def decode(model, rollout, running, n, noise, stop, temperature, top_p):
    """Fills in the rows `running` (R,) of a rollout of n answers per prompt, until all have
    stopped; noise (B, T) in [0, 1), stop: token ids.

    no_grad, not inference_mode: under that, autocast would cast the weights again for every token.
    """
    # 1. Read each prompt once, padded on the left, and copy its cache to its answers.
    asked, owner = (running // n).unique(return_inverse=True)            # (P,), (R,)
    ids = pad_sequence(
        [asked.new_tensor(rollout.prompts[i * n]) for i in asked.tolist()],
        batch_first=True,
        padding_value=-1,
        padding_side="left")                                             # (P, S)
    visible = (ids >= 0).long()                                          # (P, S)
    position = visible.cumsum(1) - 1                                     # (P, S)
    cache = Cache(config=model.config)
    output = model(ids.clamp(min=0), visible, position, cache, logits_to_keep=1)
    logits = output.logits[owner, -1]                                    # (R, V)
    cache.batch_select_indices(owner)
    visible = visible[owner]                                             # (R, S)

    # 2. Draw a token for every answer until all of them have stopped, or are cut off.
    T = noise.shape[1]
    for t in tqdm(range(T), "sampling", delay=5, leave=False, disable=rank() > 0):
        full = (logits.float() / (temperature or 1.0)).log_softmax(-1)   # (R, V)
        probs = full.exp()                                               # (R, V)
        rollout.entropy[running, t] = -(probs * full).sum(-1)
        if top_p < 1:
            probs = TopPLogitsWarper(top_p)(None, full).exp()            # (R, V)
        if temperature == 0:
            token = full.argmax(-1)                                      # (R,)
        else:
            token = pick(probs, noise[running, t])                       # (R,)
        rollout.tokens[running, t] = token
        rollout.logp[running, t] = full.gather(1, token[:, None])[:, 0]
        rollout.lengths[running] = t + 1

        # 3. Answers that have stopped leave the batch.
        stopped = torch.isin(token, stop)                                # (R,)
        rollout.finished[running] = stopped
        if stopped.any():
            going_on = (~stopped).nonzero()[:, 0]                        # numbers of rows
            running = running[going_on]
            token = token[going_on]
            visible = visible[going_on]
            cache.batch_select_indices(going_on)
        if len(running) == 0 or t + 1 == T:
            break
        visible = F.pad(visible, (0, 1), value=1)                        # (R, S)
        position = visible.sum(1, keepdim=True) - 1                      # (R, 1)
        output = model(token[:, None], visible, position, cache)
        logits = output.logits[:, -1]                                    # (R, V)


def pick(probs, noise):
    """The first token at which the running sum of probs (R, V) exceeds noise (R,) times their total
    -> (R,).

    probs need not be normalised; sums are in noise's dtype. A row with a NaN gives the last token.
    """
    upto = probs.cumsum(-1, dtype=noise.dtype)                           # (R, V)
    goal = noise[:, None] * upto[:, -1:]                                 # (R, 1)
    place = torch.searchsorted(upto, goal, right=True)                   # (R, 1)
    return place[:, 0].clamp(max=probs.shape[1] - 1)


def join(rollout):
    """Prompts and answers as rows that are padded on the right -> ids (B, S), predicts (B, S).

    predicts is True where the *next* token belongs to the answer, so hidden[predicts] (N, D) are
    the states that predict the answers' tokens, row after row. An empty rollout becomes one row of
    one token that predicts nothing, so that a rank with fewer micro-batches still takes part.
    """
    if not rollout.prompts:
        nothing = rollout.tokens.new_zeros(1, 1)
        return nothing, nothing.bool()
    ids = []
    predicts = []
    answers = zip(rollout.prompts, rollout.tokens, rollout.lengths.tolist())
    for prompt, answer, length in answers:
        row = torch.cat([answer.new_tensor(prompt), answer[:length]])
        next_is_answer = torch.zeros_like(row).bool()
        next_is_answer[len(prompt) - 1:-1] = True
        ids.append(row)
        predicts.append(next_is_answer)
    return pad_sequence(ids, batch_first=True), pad_sequence(predicts, batch_first=True)
