"""Log-probs of given answers under a model or one of its internal layer policies, and KLs, without a (B, T, V) tensor.

    logp, entropy = response_logprobs(model, rollout)             # (B, T) each, zero outside the answers

Rows are prompt + answer, padded on the right: a causal model never looks there, so no attention mask is needed and padding
changes nothing. Only the hidden states that predict answer tokens meet the vocabulary, a chunk at a time.
"""
import torch
from torch.utils.checkpoint import checkpoint

from common.distributed import everyone
from common.internal_policy import hidden_states
from common.models import causal_lm
from common.sampling import join


def _chunk_logprobs(hidden, weight, targets, temperature, entropy_grad):
    """(N, D), (V, D), (N,) -> logp (N,), entropy (N,). The logits exist in float32 only in here."""
    logits = (hidden @ weight.T).float() / temperature                        # (N, V)
    log_z = logits.logsumexp(-1)                                              # (N,)
    logp = logits[torch.arange(len(targets), device=logits.device), targets] - log_z  # gather's graph would hold the logits
    with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
        entropy = log_z - (torch.softmax(logits, -1) * logits).sum(-1)        # -sum p log p
    return logp, entropy


def token_logprobs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0,
                   chunk: int | None = None, entropy_grad: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(hidden @ weight.T / temperature) at the targets, and the entropy, both in nats and float32.

    hidden (..., D), weight (V, D), targets (...) -> logp (...), entropy (...). Done `chunk` tokens at a time (default: 2^26
    logits, a quarter of a GiB); the backward pass computes a chunk's logits again instead of keeping them. The entropy has a
    gradient only with entropy_grad: where the loss does not use it, backward would never come by to free its logits.
    """
    shape, V = targets.shape, weight.shape[0]
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    chunk = chunk or max(1, (1 << 26) // V)
    pieces = []
    for h, y in zip(hidden.split(chunk), targets.split(chunk)):
        several = torch.is_grad_enabled() and len(targets) > chunk  # a single chunk gains nothing from computing it twice
        pieces.append(checkpoint(_chunk_logprobs, h, weight, y, temperature, entropy_grad, use_reentrant=False) if several else
                      _chunk_logprobs(h, weight, y, temperature, entropy_grad))
    logp, entropy = (torch.cat(parts).view(shape) for parts in zip(*pieces))
    return logp, entropy


def response_logprobs(model, rollout, temperature: float = 1.0, layer: int | None = None,
                      final_norm: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies (B, T) of a rollout's answers, nats, under the model as it is now; 0 outside the answers. Only
    log-probs have a gradient.

    layer=None is the model's own policy; a 1-based layer is that block's internal policy, and then no block above it is run.
    temperature divides the logits, as in sampling. Uses rollout.prompts, .tokens, .lengths and .mask.
    """
    ids, predicts = join(rollout.prompts, rollout.tokens, rollout.lengths)               # (B, S) each
    hidden = hidden_states(model, ids, None, layer, final_norm)[predicts]                # (N, D)
    inside = rollout.mask.bool()                                                         # (B, T), N of them True
    weight = causal_lm(model).lm_head.weight                                             # (V, D)
    values = token_logprobs(hidden, weight, rollout.tokens[inside], temperature)         # (N,) each
    return tuple(torch.zeros_like(rollout.mask).masked_scatter(inside, value) for value in values)


def micro_batches(rows: torch.Tensor, rollout, budget: int, useful: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Splits row numbers (N,) of a rollout so that in each part rows x longest row <= budget tokens, prompt and answer.

    Sorted by length, so that a part has little padding. A row longer than the budget makes a part of its own. useful (B,), True
    or False: only those rows are taken. All ranks, each with N rows, get equally many parts, since they compute together:
    one that has fewer splits them, or adds rows that are not useful, whose loss must be 0.
    """
    sizes = {row: len(rollout.prompts[row]) + int(rollout.lengths[row]) for row in rows.tolist()}
    spare = [row for row in sizes if useful is not None and not useful[row]]
    parts = []
    for row in sorted(sizes.keys() - spare, key=lambda row: (-sizes[row], row)):
        if not parts or (len(parts[-1]) + 1) * sizes[parts[-1][0]] > budget:
            parts.append([])
        parts[-1].append(row)
    count = max(everyone(len(parts)))
    while len(parts) < count:
        most = max(parts, key=len, default=[])
        parts.append([most.pop()] if len(most) > 1 else [spare.pop()])
    return [torch.tensor(part, device=rows.device) for part in parts]


@torch.no_grad()
def score(model, rollout, useful: torch.Tensor | None, budget: int, temperature: float = 1.0, layer: int | None = None,
          final_norm: bool = False) -> torch.Tensor:
    """Log-probs (B, T) of a rollout's useful rows ((B,), True or False; None: all) under the model. No gradient."""
    logp = torch.zeros_like(rollout.logp)                                     # (B, T)
    for m in micro_batches(torch.arange(len(logp), device=logp.device), rollout, budget, useful):
        logp[m], _ = response_logprobs(model, rollout[m], temperature, layer, final_norm)
    return logp


@torch.no_grad()
def answer_states(model, rollout, useful=None, budget: int = 4096) -> tuple[torch.Tensor, torch.Tensor]:
    """What tells a policy's distributions later: the states before its answer tokens (B, T, D), a copy of the unembedding (V, D).

    0 in rows that are not useful ((B,), True or False; None: all are). About `budget` tokens at a time.
    """
    mask, states = rollout.mask.bool(), None                                            # (B, T)
    for m in micro_batches(torch.arange(len(mask), device=mask.device), rollout, budget, useful):  # (b,) row numbers
        part = rollout[m]
        ids, predicts = join(part.prompts, part.tokens, part.lengths)                   # (b, S) each
        hidden = hidden_states(model, ids)[predicts]                                    # (N, D)
        states = hidden.new_zeros(*mask.shape, hidden.shape[1]) if states is None else states  # (B, T, D)
        states[m] = states[m].masked_scatter(mask[m][..., None], hidden)
    return states, causal_lm(model).lm_head.weight.detach().clone()


@torch.no_grad()
def exact_kl(model, old_states, old_weight, rollout, temperature=1.0, chunk=None) -> torch.Tensor:
    """KL(old || new) over the whole vocabulary at every answer token of a rollout, nats, 0 outside -> (B, T).

    old_states (B, T, D), old_weight (V, D): from answer_states() of the old model. `chunk` tokens at a time, so that no (B, T, V)
    is built. The measure of Truly PPO (arXiv 1903.07940).
    """
    ids, predicts = join(rollout.prompts, rollout.tokens, rollout.lengths)              # (B, S) each
    new, inside = hidden_states(model, ids)[predicts], rollout.mask.bool()              # (N, D), (B, T)
    heads = causal_lm(model).lm_head.weight, old_weight                                 # (V, D) each
    chunk, pieces = chunk or max(1, (1 << 26) // len(old_weight)), []
    for states in zip(new.split(chunk), old_states[inside].split(chunk)):               # (n, D) each
        q, p = (((h @ head.T).float() / temperature).log_softmax(-1) for h, head in zip(states, heads))  # (n, V) each
        pieces.append((p.exp() * (p - q)).sum(-1))
    return torch.zeros_like(rollout.mask).masked_scatter(inside, torch.cat(pieces))
