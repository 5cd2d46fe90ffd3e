"""Log-probs of given answers under a model as it is now, without ever building a (B, T, V) tensor.

    logp = response_logprobs(model, rollout)            # (B, T), nats, 0 outside the answers

Axes: B answers, T answer tokens, S prompt and answer tokens, N answer tokens in a row, D width,
V vocabulary. Rows are padded on the right, where a causal model never looks, so no attention mask
is needed. Only the states that predict answer tokens meet the vocabulary, a chunk at a time.
"""
import torch
from torch.utils.checkpoint import checkpoint

from common.distributed import everyone, gather_rest
from common.models import autocast, causal_lm
from common.sampling import join


def chunk_logprobs(hidden, weight, targets, temperature):
    """(n, D), (V, D), (n,) -> logp (n,), entropy (n,). Float32 logits exist only in here."""
    logits = (hidden @ weight.T).float() / temperature                          # (n, V)
    log_z = logits.logsumexp(-1)                                                # (n,)
    logp = logits[torch.arange(len(targets)), targets] - log_z                  # (n,)
    entropy = log_z - (torch.softmax(logits, -1) * logits).sum(-1)              # (n,) -sum p log p
    return logp, entropy


def token_logprobs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                   temperature: float = 1.0, chunk: int | None = None):
    """log softmax(hidden @ weight.T / temperature) at the targets, and the entropy; nats, float32.

    hidden (N, D), weight (V, D), targets (N,) -> logp (N,), entropy (N,). `chunk` tokens at a
    time, default 2^26 logits, a quarter of a GiB; the backward pass computes them again.
    """
    chunk = chunk or max(1, (1 << 26) // len(weight))
    pieces = []
    for h, y in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        if len(hidden) <= chunk:  # a single chunk gains nothing from being computed twice
            pieces.append(chunk_logprobs(h, weight, y, temperature))
        else:
            pieces.append(checkpoint(chunk_logprobs, h, weight, y, temperature,
                                     use_reentrant=False))
    logp, entropy = zip(*pieces, strict=True)
    return torch.cat(logp), torch.cat(entropy)


def states_before_answers(model, rollout, trunk=None) -> torch.Tensor:
    """The states (N, D) that predict a rollout's answer tokens, row after row.

    trunk: blocks to run instead of the model's own, such as its first few (BuPO).
    """
    lm = causal_lm(model)
    gather_rest(lm)
    ids, predicts = join(rollout.prompts, rollout.tokens, rollout.lengths)      # (B, S) each
    hidden = (trunk or lm.model)(input_ids=ids, use_cache=False).last_hidden_state
    return hidden[predicts]                                                     # (N, D)


def response_logprobs(model, rollout, temperature: float = 1.0, trunk=None) -> torch.Tensor:
    """Log-probs (B, T) of a rollout's answer tokens, nats, 0 outside the answers.

    temperature divides the logits, as it does in sampling.
    """
    inside = rollout.mask.bool()                                                # (B, T), N True
    with autocast(model):
        hidden = states_before_answers(model, rollout, trunk)                   # (N, D)
        weight = causal_lm(model).lm_head.weight                                # (V, D)
        logp, _ = token_logprobs(hidden, weight, rollout.tokens[inside], temperature)
    return torch.zeros_like(rollout.mask).masked_scatter(inside, logp)


@torch.no_grad()
def old_logprobs(model, rollout, rows, budget: int, temperature: float = 1.0, trunk=None):
    """response_logprobs without gradient, a micro-batch at a time -> (B, T), 0 but in `rows`."""
    logp = torch.zeros_like(rollout.mask)                                       # (B, T)
    for part in micro_batches(rollout, rows, budget):
        logp[part] = response_logprobs(model, rollout[part], temperature, trunk)
    return logp


def micro_batches(rollout, rows: torch.Tensor, budget: int) -> list[torch.Tensor]:
    """Row numbers (N,) in parts with rows x longest row <= budget tokens, prompt and answer.

    Sorted by length, so that a part has little padding; a longer row is a part of its own. Ranks
    compute together, so one that has fewer parts gets empty ones.
    """
    sizes = {}
    for row in rows.tolist():
        sizes[row] = len(rollout.prompts[row]) + int(rollout.lengths[row])
    parts = []
    for row in sorted(sizes, key=lambda row: (-sizes[row], row)):
        if not parts or (len(parts[-1]) + 1) * sizes[parts[-1][0]] > budget:
            parts.append([])
        parts[-1].append(row)
    most = max(everyone(len(parts)))
    parts += [[]] * (most - len(parts))
    return [torch.tensor(part, dtype=torch.long, device=rows.device) for part in parts]


def largest_gap(logp: torch.Tensor, rollout) -> float:
    """The largest difference of the trainer's log-probs (B, T) from the sampler's, nats."""
    gaps = (logp.detach() - rollout.logp).abs() * rollout.mask                  # (B, T)
    return gaps.max().item() if gaps.numel() else 0.0
