"""Log-probs of given answers under a model as it is now, without ever building a (B, T, V) tensor.

    logp = response_logprobs(model, rollout)            # (B, T), nats, 0 outside the answers

Axes: B answers, T answer tokens, N of all rows, S prompt and answer tokens, D width, V vocabulary.
Rows are padded on the right, where a causal model never looks, so no attention mask
is needed. Only the states that predict answer tokens meet the vocabulary, a chunk at a time.
"""
import torch
from torch.utils.checkpoint import checkpoint

from common.distributed import everyone, gather_rest, gathered
from common.flags import BadInput
from common.models import autocast, compute_dtype
from common.sampling import join, sample


def chunk_logprobs(hidden, weight, targets, temperature):
    """(n, D), (V, D), (n,) -> logp (n,), entropy (n,). Float32 logits exist only in here."""
    logits = hidden @ weight.T                                                  # (n, V)
    logits = logits.float() / temperature
    log_z = logits.logsumexp(-1)                                                # (n,)
    chosen = logits.gather(1, targets[:, None])[:, 0]                           # (n,)
    weighted = logits.softmax(-1) * logits                                      # (n, V)
    entropy = log_z - weighted.sum(-1)                                          # (n,), -sum p log p
    return chosen - log_z, entropy


def token_logprobs(hidden, weight, targets, temperature=1.0, chunk=None):
    """log softmax(hidden @ weight.T / temperature) at the targets, and the entropy; nats, float32.

    hidden (N, D), weight (V, D), targets (N,) -> logp (N,), entropy (N,). `chunk` tokens at a
    time, default 2^26 logits, a quarter of a GiB; the backward pass computes them again.
    """
    chunk = chunk or max(1, 2**26 // len(weight))
    if len(hidden) <= chunk:  # a single chunk gains nothing from being computed twice
        return chunk_logprobs(hidden, weight, targets, temperature)
    parts = [checkpoint(chunk_logprobs, states, weight, tokens, temperature, use_reentrant=False)
             for states, tokens in zip(hidden.split(chunk), targets.split(chunk))]
    logps, entropies = zip(*parts)                                              # (n,) each
    return torch.cat(logps), torch.cat(entropies)


def states_before_answers(model, rollout, trunk=None):
    """The states (N, D) that predict a rollout's answer tokens, row after row.

    trunk: blocks to run instead of the model's own, such as its first few (BuPO).
    """
    gather_rest(model)
    trunk = trunk or model.model
    ids, predicts = join(rollout)                                               # (B, S) each
    hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state            # (B, S, D)
    return hidden[predicts]                                                     # (N, D)


def response_logprobs(model, rollout, temperature=1.0, trunk=None):
    """Log-probs (B, T) of a rollout's answer tokens, nats, 0 outside the answers.

    temperature divides the logits, as it does in sampling.
    """
    inside = rollout.mask.bool()                                                # (B, T), N True
    with autocast(model):
        hidden = states_before_answers(model, rollout, trunk)                   # (N, D)
        weight = model.lm_head.weight                                           # (V, D)
        targets = rollout.tokens[inside]                                        # (N,)
        logp, _ = token_logprobs(hidden, weight, targets, temperature)          # (N,)
    zeros = torch.zeros_like(rollout.mask)                                      # (B, T)
    return zeros.masked_scatter(inside, logp)


@torch.no_grad()
def old_logprobs(model, rollout, rows, budget, temperature=1.0, trunk=None):
    """response_logprobs without gradient, a micro-batch at a time -> (B, T), 0 but in `rows`."""
    logp = torch.zeros_like(rollout.mask)                                       # (B, T)
    with gathered(model):  # without a backward pass FSDP would leave the weights gathered
        for part in micro_batches(rollout, rows, budget):
            batch = rollout[part]                                               # b answers
            logp[part] = response_logprobs(model, batch, temperature, trunk)    # (b, T)
    return logp


def micro_batches(rollout, rows, budget):
    """Row numbers (N,) in parts with rows x longest row <= budget tokens, prompt and answer.

    Sorted by length, so that a part has little padding; a longer row is a part of its own. Ranks
    compute together, so one that has fewer parts gets empty ones.
    """
    lengths = rollout.lengths.tolist()
    sizes = {row: len(rollout.prompts[row]) + lengths[row] for row in rows.tolist()}
    parts = []
    for row in sorted(sizes, key=sizes.get, reverse=True):
        if not parts or (len(parts[-1]) + 1) * sizes[parts[-1][0]] > budget:
            parts.append([])
        parts[-1].append(row)
    most = max(everyone(len(parts)))
    parts += [[]] * (most - len(parts))
    return [rows.new_tensor(part) for part in parts]


def largest_gap(logp, rollout):
    """The largest difference of the trainer's log-probs (B, T) from the sampler's, nats."""
    gaps = (logp - rollout.logp).abs() * rollout.mask                           # (B, T)
    return gaps.max().item() if gaps.numel() else 0.0


@torch.no_grad()
def check_model(model, tokenizer, prompt, trained=True):
    """BadInput if the model cannot be sampled, or would be trained as another function.

    Samples a few tokens after the prompt (token ids) and after its last two, with the model's own
    forward; the trainer's log-probs of them must agree. They do not if the output is scaled, capped
    or biased.
    """
    name = type(model).__name__
    if max(prompt) >= model.config.vocab_size:
        raise BadInput(f"the tokenizer is another model's: the prompt has the token {max(prompt)}")
    try:
        rollout = sample(model, tokenizer, [prompt, prompt[-2:]], 1, 4, alone=True)
        with gathered(model):  # split again at its end, as an optimiser wants it
            logp = response_logprobs(model, rollout)                            # (2, T)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each architecture fails in its own way
        raise BadInput(f"{name} is not supported: {error}") from error
    gap = largest_gap(logp, rollout)
    allowed = 1e-3 if compute_dtype(model) == torch.float32 else 1.0
    if trained and not gap < allowed:  # NaN is refused, too
        raise BadInput(f"{name} is not supported: its own forward differs by {gap:.2g} nats (a "
                       "scale, a cap or a bias at its output?)")
