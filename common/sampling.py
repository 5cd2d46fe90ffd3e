"""Sampling answers from a model: each prompt is read once, its cache copied to the group, and finished answers leave the batch.

    rollout = sample(model, tokenizer, prompts, n=16, max_new_tokens=80)        # prompts: lists of token ids
    rollout.tokens, rollout.mask, rollout.logp, rollout.texts, rollout.finished  # row p * n + g is answer g to prompt p

The log-probs are those of the full softmax at the sampling temperature: the distribution that training computes again
(common/logprobs.py), so the two can be compared at every step. With top_p < 1 tokens come from a smaller set while logp keeps
the full softmax: fine for evaluation, biased for a policy gradient.
"""
from dataclasses import dataclass, fields

import torch
from transformers.cache_utils import Cache, DynamicLayer

from common.distributed import everyone, gathered, rank, share, size
from common.models import causal_lm, max_rows_for, stop_ids, widest


@dataclass
class Rollout:
    """B = P * n answers, right-padded to the longest, T tokens."""
    prompts: list[list[int]]   # one per row
    tokens: torch.Tensor       # (B, T) response ids, the stop token included
    lengths: torch.Tensor      # (B,) response lengths in tokens
    mask: torch.Tensor         # (B, T) 1.0 inside the response; made from lengths, never from token ids
    logp: torch.Tensor         # (B, T) log-probs of the tokens when they were drawn, nats
    entropy: torch.Tensor      # (B, T) entropy of the distribution each token was drawn from, nats
    finished: torch.Tensor     # (B,) whether the answer ended with a stop token
    texts: list[str]           # decoded, special tokens left out

    def __getitem__(self, rows: torch.Tensor) -> "Rollout":
        """The rows with these numbers (b,). T stays what it was, so that they line up with other tensors of the rollout."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Rollout(**{k: v[rows] if torch.is_tensor(v) else [v[i] for i in rows.tolist()] for k, v in values.items()})


def join(prompts: list[list[int]], tokens: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts (B lists) and answers (B, T), (B,) -> ids (B, S), padded on the right, and a mask (B, S): True where the *next*
    token belongs to the answer, so that hidden[mask] are the states that predict it, row after row."""
    S = max(len(p) + k for p, k in zip(prompts, lengths.tolist()))
    ids = torch.tensor([p + row[:k] + [0] * (S - len(p) - k) for p, row, k in zip(prompts, tokens.tolist(), lengths.tolist())],
                       device=tokens.device)
    start = torch.tensor([[len(p) - 1] for p in prompts], device=tokens.device)                             # (B, 1)
    position = torch.arange(S, device=tokens.device)                                                        # (S,)
    return ids, (position >= start) & (position < start + lengths[:, None])


class SlotLayer(DynamicLayer):
    """Keys and values in buffers with room to spare: once `slot` (1,) is set, a new token's are written there and nothing is
    copied. It is a tensor, so that a recorded step finds another place every time it is replayed."""
    slot = None

    def update(self, keys, values, *args, **kwargs):
        if self.slot is None:  # the prompts
            return super().update(keys, values, *args, **kwargs)
        self.keys.index_copy_(2, self.slot, keys)
        self.values.index_copy_(2, self.slot, values)
        return self.keys, self.values

    def resize(self, rows: torch.Tensor, room: int) -> None:
        """Keeps these rows, each as often as it is named, with room for so many positions."""
        old, filled = (self.keys, self.values), self.keys.shape[2]
        self.keys, self.values = (x.new_zeros(len(rows), x.shape[1], room, x.shape[3]) for x in old)
        for new, x in zip((self.keys, self.values), old):
            new[:, :, :filled] = x[rows]


def keep_top_p(logp: torch.Tensor, top_p: float) -> torch.Tensor:
    """Log-probs (R, V) -> the same with -inf outside the smallest set of tokens whose probabilities reach top_p."""
    ordered, order = logp.sort(dim=-1, descending=True)
    outside = ordered.exp().cumsum(-1) - ordered.exp() >= top_p  # the token that crosses the line stays in
    return logp.masked_fill(outside.scatter(-1, order, outside), -torch.inf)


def distributions(scores: torch.Tensor, temperature: float, top_p: float, penalty: float,
                  said: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (A, V) -> log-probs of the model, and those that are drawn from, tokens in said (A, V) made weaker. (A, V) each."""
    full = drawn = (scores / (temperature or 1.0)).log_softmax(-1)                                          # (A, V)
    if penalty != 1:
        weaker = torch.where(scores > 0, scores / penalty, scores * penalty)                                # (A, V)
        drawn = (torch.where(said, weaker, scores) / (temperature or 1.0)).log_softmax(-1)
    return full, drawn if top_p >= 1 else keep_top_p(drawn, top_p)


def pick(probs: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The first token at which the running sum of probs (R, V), not necessarily normalised, exceeds u (R,) in [0, 1). -> (R,)
    Summed in u's dtype. A row with a NaN in it gives the last token, which at least exists."""
    upto = probs.cumsum(-1, dtype=u.dtype)                                                                  # (R, V)
    below = u[:, None].clamp(max=1 - torch.finfo(u.dtype).eps) * upto[:, -1:]  # also if u was rounded to 1   # (R, 1)
    return torch.searchsorted(upto, below, right=True)[:, 0].clamp(max=probs.shape[-1] - 1)  # NaN is past the end  # (R,)


def record(step):
    """step's kernels as a CUDA graph, none of them run -> a function that runs them all, without Python between them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def prefill(lm, prompts: list[list[int]], device) -> tuple[Cache, torch.Tensor, torch.Tensor]:
    """Reads the prompts, padded on the right -> their cache, the states that predict what follows (P, D), their lengths (P,)."""
    length, width = torch.tensor([len(p) for p in prompts], device=device), max(map(len, prompts))          # (P,)
    ids = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=device)                        # (P, S)
    cache = Cache(layer_class_to_replicate=SlotLayer)
    states = lm.model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state               # (P, S, D)
    return cache, states[torch.arange(len(prompts), device=device), length - 1], length


@torch.inference_mode()
def decode(model, prompts: list[list[int]], rows: torch.Tensor, max_new_tokens: int, temperature: float, top_p: float,
           stop: torch.Tensor, noise: torch.Tensor, repetition_penalty: float = 1.0,
           graphs: bool = False) -> tuple[torch.Tensor, ...]:
    """Answers for prompts[rows[r]], r = 0..R-1 -> tokens, logp, entropy (R, T) and lengths, finished (R,).

    noise (R, T) in [0, 1): row r's token t is a function of noise[r, t] and of what came before it in that row, nothing else.
    graphs: a step is recorded as a CUDA graph whenever its shapes have changed, and replayed while they stay.
    """
    lm, device, R, width = causal_lm(model), rows.device, len(rows), max(map(len, prompts))
    look, grain = (16, 256) if graphs else (1, 16)  # steps between two looks at who has ended; the cache grows by so many slots
    cache, hidden, length = prefill(lm, prompts, device)                                                    # (P, D), (P,)
    slot, place = rows.new_full((1,), width), rows[:0]                                                      # of the latest token
    tokens = rows.new_zeros(R, max_new_tokens)                                                              # (R, T)
    logp, entropy = hidden.new_zeros(2, R, max_new_tokens, dtype=torch.float32)                             # (R, T) each
    alive, token = torch.arange(R, device=device), torch.zeros_like(rows)                                   # (A,) rows left
    length, ended = length[rows], torch.zeros_like(rows).bool()                                             # (A,) of the prompt
    said = rows.new_zeros(R, lm.config.vocab_size if repetition_penalty != 1 else 0).bool()                 # (R, V) tokens seen
    for row, prompt in enumerate(rows.tolist() if repetition_penalty != 1 else ()):
        said[row, prompts[prompt]] = True

    def draw(hidden):  # (A, D)
        t = slot - width                                                                                    # (1,)
        full, drawn = distributions(lm.lm_head(hidden).float(), temperature, top_p, repetition_penalty, said[alive])  # (A, V)
        token.copy_(drawn.argmax(-1) if temperature == 0 else pick(drawn.exp(), noise.index_select(1, t)[:, 0]))
        tokens[alive, t] = token
        if repetition_penalty != 1:
            said[alive, token] = torch.ones_like(ended)  # a plain True would be copied from the CPU
        logp[alive, t] = full.gather(-1, token[:, None])[:, 0]
        entropy[alive, t] = -(full.exp() * full.clamp(min=-1e4)).sum(-1)
        ended.logical_or_((token[:, None] == stop).any(1))

    def step():  # reads the tokens drawn last and draws the next, all in place: what has no new shape can be replayed
        visible = filled & (place <= slot)                                                                  # (A, S+T)
        states = lm.model(input_ids=token[:, None], attention_mask=visible[:, None, None],
                          position_ids=(slot - width + length)[:, None], past_key_values=cache, use_cache=True).last_hidden_state
        slot.add_(1)
        draw(states[:, -1])

    draw(hidden[rows])
    for t in range(1, max_new_tokens):
        if (t - 1) % look == 0:
            left = (~ended).nonzero()[:, 0]
            if len(left) == 0:
                break
            need = width + min(t + look, max_new_tokens)
            if len(left) <= 0.9 * len(alive) or need > len(place):  # the cache is copied: let a tenth of the rows gather
                room = min(need * 9 // 8, width + max_new_tokens) // grain * grain + grain
                place = torch.arange(room, device=device)                                                   # (S+T,)
                for layer in cache.layers:                                                                  # P caches -> A rows
                    layer.resize(rows[left] if layer.slot is None else left, room)
                    layer.slot = slot
                alive, token, length, ended, noise = (x[left] for x in (alive, token, length, ended, noise))
                filled = (place < length[:, None]) | (place >= width)  # no prompt's padding                 # (A, S+T)
                advance = step
        advance()
        if graphs and advance is step:
            advance = record(step)  # the graph before is gone by now: it would hold memory of a pool of its own
    stops = torch.isin(tokens, stop)                                                                        # (R, T)
    finished = stops.any(1)                                                                                 # (R,)
    return tokens, logp, entropy, torch.where(finished, stops.int().argmax(1) + 1, max_new_tokens), finished


def sample(model, tokenizer, prompts: list[list[int]], n: int, max_new_tokens: int, temperature: float = 1.0,
           top_p: float = 1.0, seed: int = 0, max_rows: int | None = None, repetition_penalty: float = 1.0,
           alone: bool = False, graphs: bool | None = None) -> Rollout:
    """n answers to each prompt (a list of token ids), at most max_new_tokens tokens each, as one Rollout of P * n rows.

    temperature 0 is greedy. The same seed draws the same answers: every token of every row has a random number of its own, so
    neither max_rows, which bounds how many are decoded at once (default: what the memory holds), nor what other rows say
    matters, but for the last bits of a matrix product, which depend on its size. On several ranks the prompts are taken for this
    rank's share of a rollout (common/distributed.py), and get the answers they would get in one process; alone: for all of it.
    repetition_penalty > 1 divides positive and multiplies negative logits of tokens that the prompt or the answer holds already
    (CTRL, arXiv 1909.05858); like top_p it leaves logp and entropy those of the model.
    graphs: record the steps as CUDA graphs; default: what --cuda-graphs said when the model was loaded.
    Raises ValueError for no prompt, an empty one, n or max_new_tokens < 1, temperature < 0, top_p outside (0, 1] or
    repetition_penalty <= 0.
    """
    if not prompts or not all(prompts):
        raise ValueError("sample needs at least one prompt and no empty one")
    if n < 1 or max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1 or repetition_penalty <= 0:
        raise ValueError(f"sample: {n=}, {max_new_tokens=}, {temperature=}, {top_p=}, {repetition_penalty=} out of range")
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    stop = torch.tensor(stop_ids(causal_lm(model), tokenizer), device=device)
    owner = [p for p in range(len(prompts)) for _ in range(n)]                                              # row -> prompt
    place = [p if alone else p * size() + rank() for p in range(len(prompts))]                              # in the whole
    noise = torch.rand(place[-1] + 1, n, max_new_tokens, dtype=torch.float64, generator=generator)[place].flatten(0, 1)  # (B, T)
    graphs = getattr(causal_lm(model), "cuda_graphs", False) if graphs is None else graphs
    pieces, start = [], 0
    with gathered(causal_lm(model)):
        fitting = max_rows_for(causal_lm(model), max(map(len, prompts)) + max_new_tokens)
        max_rows = max_rows or min(fitting, getattr(causal_lm(model), "most_rows", fitting))
        while start < len(owner):
            here = owner[start:start + max_rows]
            rows = torch.tensor([p - here[0] for p in here], device=device)
            try:
                pieces.append(decode(model, prompts[here[0]:here[-1] + 1], rows, max_new_tokens, temperature, top_p, stop,
                                     noise[start:start + max_rows].to(device, widest(device)), repetition_penalty, graphs))
                start += len(here)
            except torch.OutOfMemoryError:  # fewer at once give the same answers
                if len(here) == 1:
                    raise
                max_rows = causal_lm(model).most_rows = len(here) // 2
                print(f"note: out of memory while sampling {len(here)} answers at once: {max_rows} from now on", flush=True)
    tokens, logp, entropy, lengths, finished = (torch.cat(parts) for parts in zip(*pieces))
    model.train(was_training)
    T = int(lengths.max())
    mask = (torch.arange(T, device=device) < lengths[:, None]).float()                                      # (B, T)
    texts = tokenizer.batch_decode([row[:k] for row, k in zip(tokens.tolist(), lengths.tolist())], skip_special_tokens=True)
    zero = ~mask.bool()
    return Rollout([prompts[p] for p in owner], tokens[:, :T].masked_fill(zero, 0), lengths, mask,
                   logp[:, :T].masked_fill(zero, 0), entropy[:, :T].masked_fill(zero, 0), finished, texts)


def sample_texts(model, tokenizer, prompts: list[list[int]], n: int, *args, **kwargs) -> list[tuple[str, int, bool]]:
    """sample() with the prompts split over the ranks -> (text, tokens, finished) of all P * n answers, on every rank."""
    padded = prompts + prompts[-1:] * (-len(prompts) % size())
    mine = sample(model, tokenizer, share(padded), n, *args, **kwargs)
    found = everyone(list(zip(mine.texts, mine.lengths.tolist(), mine.finished.tolist())))
    return [answer for p in range(len(prompts)) for answer in found[p % size()][p // size() * n:(p // size() + 1) * n]]
