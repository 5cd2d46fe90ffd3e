"""Log-probs of given answers under a model as it is now, without ever building a (B, T, V) tensor.

    logp = response_logprobs(model, rollout)            # (B, T), nats, 0 outside the answers

Axes: B answers, T answer tokens, S prompt and answer tokens, N answer tokens in a row, D width,
V vocabulary. Rows are padded on the right, where a causal model never looks, so no attention mask
is needed. Only the states that predict answer tokens meet the vocabulary, a chunk at a time.
"""
import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from common.distributed import everyone, gather_rest, gathered, rank
from common.flags import BadInput
from common.models import autocast, causal_lm, compute_dtype
from common.sampling import join, sample


def chunk_logprobs(hidden, weight, targets, temperature):
    """(n, D), (V, D), (n,) -> logp (n,), entropy (n,). Float32 logits exist only in here."""
    logits = hidden @ weight.T                                                  # (n, V)
    logits = logits.float() / temperature
    log_z = logits.logsumexp(-1)                                                # (n,)
    rows = torch.arange(len(targets), device=targets.device)                    # (n,)
    logp = logits[rows, targets] - log_z                                        # (n,)
    probs = logits.softmax(-1)                                                  # (n, V)
    weighted = probs * logits                                                   # (n, V)
    mean = weighted.sum(-1)                                                     # (n,)
    entropy = log_z - mean                                                      # (n,), -sum p log p
    return logp, entropy


def token_logprobs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                   temperature: float = 1.0, chunk: int | None = None):
    """log softmax(hidden @ weight.T / temperature) at the targets, and the entropy; nats, float32.

    hidden (N, D), weight (V, D), targets (N,) -> logp (N,), entropy (N,). `chunk` tokens at a
    time, default 2^26 logits, a quarter of a GiB; the backward pass computes them again.
    """
    chunk = chunk or max(1, 2**26 // len(weight))
    if len(hidden) <= chunk:  # a single chunk gains nothing from being computed twice
        return chunk_logprobs(hidden, weight, targets, temperature)
    logps = []
    entropies = []
    pairs = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    for h, y in pairs:
        logp, entropy = checkpoint(
            chunk_logprobs, h, weight, y, temperature, use_reentrant=False)     # (n,) each
        logps.append(logp)
        entropies.append(entropy)
    return torch.cat(logps), torch.cat(entropies)


def states_before_answers(model, rollout, trunk=None) -> torch.Tensor:
    """The states (N, D) that predict a rollout's answer tokens, row after row.

    trunk: blocks to run instead of the model's own, such as its first few (BuPO).
    """
    lm = causal_lm(model)
    gather_rest(lm)
    trunk = trunk or lm.model
    ids, predicts = join(rollout.prompts, rollout.tokens, rollout.lengths)      # (B, S) each
    output = trunk(input_ids=ids, use_cache=False)
    hidden = output.last_hidden_state                                           # (B, S, D)
    return hidden[predicts]                                                     # (N, D)


def response_logprobs(model, rollout, temperature: float = 1.0, trunk=None) -> torch.Tensor:
    """Log-probs (B, T) of a rollout's answer tokens, nats, 0 outside the answers.

    temperature divides the logits, as it does in sampling.
    """
    inside = rollout.mask.bool()                                                # (B, T), N True
    with autocast(model):
        hidden = states_before_answers(model, rollout, trunk)                   # (N, D)
        weight = causal_lm(model).lm_head.weight                                # (V, D)
        targets = rollout.tokens[inside]                                        # (N,)
        logp, _ = token_logprobs(hidden, weight, targets, temperature)          # (N,)
    zeros = torch.zeros_like(rollout.mask)                                      # (B, T)
    return zeros.masked_scatter(inside, logp)


@torch.no_grad()
def old_logprobs(model, rollout, rows, budget: int, temperature: float = 1.0, trunk=None):
    """response_logprobs without gradient, a micro-batch at a time -> (B, T), 0 but in `rows`."""
    logp = torch.zeros_like(rollout.mask)                                       # (B, T)
    with gathered(causal_lm(model)):  # no backward pass follows that would split it again
        for part in micro_batches(rollout, rows, budget):
            batch = rollout[part]                                               # b answers
            logp[part] = response_logprobs(model, batch, temperature, trunk)    # (b, T)
    return logp


def micro_batches(rollout, rows: torch.Tensor, budget: int):
    """Row numbers (N,) in parts with rows x longest row <= budget tokens, prompt and answer; a
    long pass over them shows a bar.

    Sorted by length, so that a part has little padding; a longer row is a part of its own. Ranks
    compute together, so one that has fewer parts gets empty ones.
    """
    lengths = rollout.lengths.tolist()
    sizes = {}
    for row in rows.tolist():
        sizes[row] = len(rollout.prompts[row]) + lengths[row]
    parts = []
    width = 0
    for row in sorted(sizes, key=sizes.get, reverse=True):
        if not parts or (len(parts[-1]) + 1) * width > budget:
            parts.append([])
            width = sizes[row]
        parts[-1].append(row)
    most = max(everyone(len(parts)))
    while len(parts) < most:
        parts.append([])
    batches = []
    for part in parts:
        batches.append(rows.new_tensor(part))
    return tqdm(batches, "micro-batches", delay=5, leave=False, disable=rank() > 0)


def largest_gap(logp: torch.Tensor, rollout) -> float:
    """The largest difference of the trainer's log-probs (B, T) from the sampler's, nats."""
    gaps = (logp.detach() - rollout.logp).abs()                                 # (B, T)
    gaps = gaps * rollout.mask
    return gaps.max().item() if gaps.numel() else 0.0


@torch.no_grad()
def check_model(model, tokenizer, prompt: list[int], trained: bool = True) -> None:
    """BadInput if the model is sampled, or trained, as another function than its own forward.

    A few tokens three ways: the output may be scaled, capped or biased, the cache be of another
    kind, or the tokenizer that of another model.
    """
    lm = causal_lm(model)
    name = type(lm).__name__
    known = len(lm.get_input_embeddings().weight)
    if max(prompt) >= known:
        raise BadInput(f"the prompt has the token {max(prompt)} and the model {known} of them: the "
                       "tokenizer is another model's")
    try:
        rollout = sample(model, tokenizer, [prompt[-9:], prompt[-2:]], 1, 4, alone=True)
        ids, predicts = join(rollout.prompts, rollout.tokens, rollout.lengths)  # (2, S) each
        with gathered(lm), autocast(model):  # split again at its end, as an optimiser wants it
            own = lm(input_ids=ids, use_cache=False).logits[predicts]           # (N, V)
            hidden = states_before_answers(model, rollout)                      # (N, D)
            plain = hidden @ lm.lm_head.weight.T                                # (N, V)
    except (BadInput, torch.OutOfMemoryError):
        raise
    except Exception as error:  # each architecture fails in its own way
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise BadInput(f"{name} is not supported: {reason}") from error
    inside = rollout.mask.bool()                                                # (2, T), N True
    own = own.float().log_softmax(-1)
    sampled = own.gather(1, rollout.tokens[inside][:, None])[:, 0]              # (N,)
    gap = (sampled - rollout.logp[inside]).abs().max().item()
    if trained:
        plain = plain.float().log_softmax(-1)
        gap = max(gap, (own - plain).abs().max().item())
    if not gap < (1e-3 if compute_dtype(model) == torch.float32 else 1.0):
        raise BadInput(f"{name} is not supported: its own forward differs by {gap:.2g} nats (a "
                       "scale, a cap or a bias at its output?)")
