"""The sampler against model.generate, against softmax, and against the trainer's log-probs."""
import math

import pytest
import torch
from conftest import byte_level_tokenizer, random_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, Gemma3TextConfig, MistralConfig, Qwen2Config

import grpo
from common import sampling
from common.logprobs import largest_gap, response_logprobs
from common.models import rows_at_once, stop_ids
from common.sampling import Rollout, decode, join, pick, sample

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14]]  # the sampler pads them on the left
KINDS = pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer()


def model_with_stops(tokenizer, kind="qwen3", **options):
    """Several stop tokens, so that answers end at different times; logits of a size of about 5."""
    model = random_model(kind, len(tokenizer), **{"initializer_range": 0.2, **options})
    model.generation_config.eos_token_id = list(range(60, 70))
    return model


def by_forward(model, rollout, row, temperature=1.0):
    """Log-probs (k, V) of an answer's tokens from the model's own forward, without any padding."""
    k = int(rollout.lengths[row])
    ids = torch.tensor([rollout.prompts[row] + rollout.tokens[row, :k].tolist()])
    with torch.no_grad():
        return (model(ids).logits[0, -k - 1:-1].float() / temperature).log_softmax(-1)


def same_answers(one, two):
    assert one.prompts == two.prompts and one.texts == two.texts
    assert torch.equal(one.tokens, two.tokens) and torch.equal(one.lengths, two.lengths)
    assert torch.equal(one.finished, two.finished) and torch.equal(one.mask, two.mask)
    assert torch.allclose(one.logp, two.logp, atol=1e-5)
    assert torch.allclose(one.entropy, two.entropy, atol=1e-5)


@KINDS
def test_greedy_equals_generate(kind, tokenizer):
    model = random_model(kind, len(tokenizer))
    rollout = sample(model, tokenizer, PROMPTS, n=2, max_new_tokens=70, temperature=0)
    for row, prompt in enumerate(rollout.prompts):
        assert prompt == PROMPTS[row // 2]
        ids = torch.tensor([prompt])
        generated = model.generate(ids, max_new_tokens=70, do_sample=False)[0, len(prompt):]
        k = int(rollout.lengths[row])
        assert rollout.tokens[row, :k].tolist() == generated.tolist()


@KINDS
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_trainer_and_forward_agree(kind, temperature, tokenizer):
    """Log-probs of the same tokens from the cache, padded on the left and shrinking; from the
    trainer, padded on the right; from the model's own forward, alone. Entropies likewise."""
    model = model_with_stops(tokenizer, kind)
    rollout = sample(model, tokenizer, PROMPTS, 8, 40, temperature, seed=3)
    assert 0 < rollout.finished.float().mean() < 1  # both ends happen
    logp = response_logprobs(model, rollout, temperature)
    assert largest_gap(logp, rollout) < 1e-5
    for row, k in enumerate(rollout.lengths.tolist()):
        full = by_forward(model, rollout, row, temperature)
        own = full[torch.arange(k), rollout.tokens[row, :k]]
        entropy = -(full.exp() * full).sum(-1)
        assert torch.allclose(rollout.logp[row, :k], own, atol=1e-5)
        assert torch.allclose(rollout.entropy[row, :k], entropy, atol=1e-5)
        assert (rollout.logp[row, k:] == 0).all() and (rollout.entropy[row, k:] == 0).all()


@pytest.mark.parametrize("tie", [False, True])
def test_sampler_and_trainer_agree_in_bfloat16(tie, tokenizer):
    """Weights float32, products bfloat16: the largest gap stays near what rounding gives, and most
    of it is there by chance of kernels: the mean is small. float32 log-probs on both sides."""
    model = model_with_stops(tokenizer, tie=tie)
    model.compute_dtype = torch.bfloat16
    rollout = sample(model, tokenizer, PROMPTS, 8, 40, seed=3)
    logp = response_logprobs(model, rollout)
    assert rollout.logp.dtype == rollout.entropy.dtype == torch.float32
    inside = rollout.mask.bool()
    assert (rollout.logp.bfloat16().float() != rollout.logp)[inside].float().mean() > 0.9
    gaps = (logp - rollout.logp).abs()[inside]
    assert gaps.mean() < 0.05 and gaps.max() < 0.5
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_weights_are_cast_once_and_not_for_each_token(tokenizer):
    """Float32 weights, bfloat16 compute, 24 tokens: a cast of all 2-d weights of the blocks and the
    unembedding per sample(), 4 + 3 maps x blocks + 1, and not 24 times as many."""
    model = random_model(vocab_size=len(tokenizer))
    model.compute_dtype = torch.bfloat16
    casts = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter):
                casts.append(tuple(args[0].shape))
            return function(*args, **(kwargs or {}))

    with Count():
        sample(model, tokenizer, PROMPTS, 1, 24)
    maps = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(casts) == len(maps) == 7 * model.config.num_hidden_layers + 1
    assert all(weight.dtype == torch.float32 for weight in model.parameters())


def test_a_model_in_bfloat16_is_sampled_as_it_is(tokenizer):
    """One that load_model has not made: all weights bfloat16, no compute_dtype set."""
    model = model_with_stops(tokenizer).bfloat16()
    rollout = sample(model, tokenizer, PROMPTS, 4, 20, seed=1)
    gaps = (response_logprobs(model, rollout) - rollout.logp).abs()
    assert rollout.logp.dtype == torch.float32 and gaps.sum() / rollout.mask.sum() < 0.05
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("config", [MistralConfig, Qwen2Config, Gemma3TextConfig])
def test_a_sliding_window_slides_in_decoding_too(config, tokenizer):
    """Window 16, prompts of 1 to 21 tokens, answers of 40: sampler and trainer agree, and without
    the window they would not."""
    options = {"head_dim": 8, "sliding_window": 16, "initializer_range": 0.5}
    if config is Qwen2Config:
        options.update(use_sliding_window=True, max_window_layers=1)
    model = random_model(config, len(tokenizer), layers=3, **options)
    rollout = sample(model, tokenizer, [*PROMPTS, list(range(5, 26))], 4, 40, seed=2)
    assert rollout.lengths.max() > 20
    assert largest_gap(response_logprobs(model, rollout), rollout) < 1e-3
    for block in model.model.layers:
        block.self_attn.sliding_window = None
    model.config.sliding_window = 1000
    assert largest_gap(response_logprobs(model, rollout), rollout) > 0.01


@KINDS
def test_left_padding_changes_nothing(kind, tokenizer):
    """The answers to a prompt beside a far longer one, and alone: same tokens, same log-probs."""
    model = model_with_stops(tokenizer, kind)
    beside = sample(model, tokenizer, [[5, 6, 7], list(range(5, 55))], 6, 30, seed=5)
    alone = sample(model, tokenizer, [[5, 6, 7]], 6, 30, seed=5)
    T = alone.tokens.shape[1]
    assert torch.equal(beside.tokens[:6, :T], alone.tokens)
    assert beside.lengths[:6].tolist() == alone.lengths.tolist()
    assert torch.allclose(beside.logp[:6, :T], alone.logp, atol=1e-5)


def test_positions_count_the_tokens_of_a_row(tokenizer):
    """Prompts of 3, 6 and 1 tokens in six places: each begins at position 0, whatever stands to its
    left, and its answer goes on from its own length."""
    model, seen = random_model(vocab_size=len(tokenizer)), []
    model.generation_config.eos_token_id = None
    tokenizer = byte_level_tokenizer()
    tokenizer.eos_token = tokenizer.chat_template = None

    def note(module, args, kwargs):
        seen.append((kwargs["position_ids"], kwargs["attention_mask"]))

    model.model.register_forward_pre_hook(note, with_kwargs=True)
    sample(model, tokenizer, PROMPTS, 1, 3, seed=1)
    positions, visible = seen[0]
    assert visible.tolist() == [[0, 0, 0, 1, 1, 1], [1] * 6, [0] * 5 + [1]]
    for row, k in enumerate((3, 6, 1)):
        assert positions[row, -k:].tolist() == list(range(k))
    assert seen[1][0].tolist() == [[3], [6], [1]] and seen[2][0].tolist() == [[4], [7], [2]]
    assert seen[2][1].sum(1).tolist() == [5, 8, 3]


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"temperature": 0}])
def test_an_answer_depends_on_seed_and_row_alone(options, tokenizer, monkeypatch):
    """Whatever is decoded beside it: all 15 rows at once, groups of five cut into pieces of four,
    every row alone. Other seeds give other answers, rows of one group differ."""
    model = model_with_stops(tokenizer)
    first = sample(model, tokenizer, PROMPTS, 5, 20, seed=7, **options)
    with monkeypatch.context() as patch:
        for at_once in (15, 4, 1):
            patch.setattr(sampling, "rows_at_once", lambda *_, at_once=at_once: at_once)
            same_answers(first, sample(model, tokenizer, PROMPTS, 5, 20, seed=7, **options))
    other = sample(model, tokenizer, PROMPTS, 5, 20, seed=8, **options)
    if options.get("temperature") == 0:
        same_answers(first, other)
    else:
        assert not torch.equal(first.tokens[:, :3], other.tokens[:, :3])
        assert len({tuple(row) for row in first.tokens[:5].tolist()}) > 1


def test_more_prompts_leave_the_first_ones_as_they_are(tokenizer):
    model = model_with_stops(tokenizer)
    two = sample(model, tokenizer, PROMPTS[:2], 4, 20, seed=7)
    three = sample(model, tokenizer, PROMPTS, 4, 20, seed=7)
    assert two.texts == three.texts[:8]


def test_ranks_get_the_answers_of_one_process(tokenizer, monkeypatch):
    """Four prompts on two ranks: rank 0 has the first and third, rank 1 the others. With alone each
    rank draws all four, as one process would."""
    model, prompts = model_with_stops(tokenizer), [*PROMPTS, [20, 21]]
    whole = sample(model, tokenizer, prompts, 2, 12, seed=4)
    monkeypatch.setattr(sampling, "size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(sampling, "rank", lambda rank=rank: rank)
        mine = sample(model, tokenizer, prompts[rank::2], 2, 12, seed=4)
        first, second = 2 * rank, 4 + 2 * rank
        expected = whole.texts[first:first + 2] + whole.texts[second:second + 2]
        assert mine.texts == expected
        same_answers(whole, sample(model, tokenizer, prompts, 2, 12, seed=4, alone=True))


def test_masks_come_from_lengths(tokenizer):
    """The stop token is inside the mask, what follows is not; an answer that was cut off fills its
    row; the pad id inside an answer stays in."""
    model, stop = random_model(vocab_size=len(tokenizer)), tokenizer.eos_token_id
    rollout = sample(model, tokenizer, PROMPTS, n=32, max_new_tokens=60, seed=0)
    assert rollout.mask.sum(1).tolist() == rollout.lengths.tolist()
    for row, k in enumerate(rollout.lengths.tolist()):
        tokens = rollout.tokens[row].tolist()
        finished = rollout.finished[row].item()
        assert finished == (tokens[k - 1] == stop)
        assert stop not in tokens[:k - 1] and not any(tokens[k:])
        assert finished or k == 60
        assert rollout.mask[row].tolist() == [1.0] * k + [0.0] * (len(tokens) - k)
    assert rollout.finished.any() and not rollout.finished.all()
    assert not any("<|" in text for text in rollout.texts)  # no stop token in what is verified
    # a random model says the pad token too, so ids could not tell
    assert (rollout.tokens[rollout.mask > 0] == tokenizer.pad_token_id).any()


def test_texts_are_the_decoded_answers(tokenizer):
    rollout = sample(random_model(vocab_size=len(tokenizer)), tokenizer, PROMPTS, 4, 20, seed=0)
    for text, tokens, k in zip(rollout.texts, rollout.tokens, rollout.lengths, strict=True):
        assert text == tokenizer.decode(tokens[:k], skip_special_tokens=True)


def test_the_stop_token_is_trained(tokenizer):
    """In an update from what was sampled, the last token of each finished answer has the gradient
    -A / tokens on its log-prob, as its other tokens have."""
    model = model_with_stops(tokenizer)
    rollout = sample(model, tokenizer, PROMPTS, 8, 40, seed=3)
    logp = response_logprobs(model, rollout)
    logp.retain_grad()
    advantages = torch.arange(1.0, 25)
    loss, _ = grpo.grpo_loss(logp, logp.detach(), advantages, rollout.mask)
    loss.backward()
    last = logp.grad[torch.arange(24), rollout.lengths - 1]
    assert torch.allclose(last, -advantages / rollout.lengths.sum())
    ends = rollout.tokens[torch.arange(24), rollout.lengths - 1]
    stops = torch.tensor([tokenizer.eos_token_id, *range(60, 70)])
    assert torch.equal(torch.isin(ends, stops), rollout.finished) and rollout.finished.any()


def test_finished_rows_leave(tokenizer):
    """Each forward runs as many rows as answers go on, none of them after the last token, and
    prompts are read once each, not once per answer."""
    model, widths = model_with_stops(tokenizer), []
    model.register_forward_pre_hook(lambda module, args: widths.append(tuple(args[0].shape)))
    rollout = sample(model, tokenizer, PROMPTS, 8, 40, seed=3)
    longest = int(rollout.lengths.max())
    running = [int((rollout.lengths > t).sum()) for t in range(1, longest)]
    assert widths == [(3, 6)] + [(rows, 1) for rows in running]
    assert running[0] > running[-1]


def test_all_rows_may_end_early(tokenizer):
    """Every token but one is a stop token: answers of a token or a few, no forward after that."""
    model = random_model(vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = list(range(len(tokenizer)))
    rollout = sample(model, tokenizer, PROMPTS, 3, 40, seed=3)
    assert rollout.lengths.tolist() == [1] * 9 and rollout.finished.all()
    assert rollout.tokens.shape == rollout.mask.shape == (9, 1)


def test_samples_follow_softmax(tokenizer):
    """20,000 first tokens against softmax(logits / T): chi-squared over the tokens expected at
    least 20 times, within 5 sigma."""
    model, n = random_model("llama", len(tokenizer)), 20_000
    rollout = sample(model, tokenizer, [PROMPTS[0]], n, 1, 1.3, seed=1)
    logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1].double()
    expected = n * torch.softmax(logits / 1.3, -1)
    counts = torch.bincount(rollout.tokens[:, 0], minlength=len(expected)).double()
    often = expected >= 20
    squares = (counts - expected).square() / expected
    freedom = often.sum() - 1
    assert abs(squares[often].sum() - freedom) < 5 * (2 * freedom) ** 0.5


def test_pick():
    """Weights 0 1 0 2 1 run up to 0 1 1 3 4: below 1/4 it is token 1, below 3/4 token 3, else 4.
    Weight 0 is never picked, not even the last one by noise just below 1; NaN weights pick a token
    that exists (on a GPU any other ends the process)."""
    noise = torch.tensor([0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    weights = torch.tensor([[0.0, 1, 0, 2, 1]]).expand(6, 5)
    assert pick(weights, noise).tolist() == [1, 1, 3, 3, 4, 4]
    for dtype in (torch.float32, torch.float64):
        weights = torch.tensor([[3.0, 1, 0], [0.1, 0.7, 0]])
        below_one = torch.ones(2, dtype=dtype).nextafter(torch.zeros(2, dtype=dtype))
        assert pick(weights, below_one).tolist() == [1, 1]
        nan = torch.full((1, 3), torch.nan)
        assert pick(nan, torch.zeros(1, dtype=dtype)).tolist() == [2]


def test_pick_sums_in_the_dtype_of_the_noise():
    """Weights 1 and 2^-30: in float32 they sum to 1 and the second could never be drawn; in float64
    it is, by 1 - 2^-32."""
    noise = torch.tensor([1 - 2**-32], dtype=torch.float64)
    assert pick(torch.tensor([[1.0, 2**-30]]), noise).tolist() == [1]


class Fixed(torch.nn.Module):
    """Says the same logits (V,) at every place: a model whose distributions are known by hand."""

    def __init__(self, logits):
        super().__init__()
        self.lm = random_model(vocab_size=len(logits), layers=1)
        self.logits = torch.tensor(logits)
        self.config, self.device = self.lm.config, self.lm.device

    def forward(self, *args, **kwargs):
        output = self.lm(*args, **kwargs)
        output.logits = self.logits.expand_as(output.logits)
        return output


def drawn(logits, prompt, noise, temperature, top_p=1.0):
    """The tokens and log-probs that `decode` gives one answer, stop token 3."""
    zeros = torch.zeros(1, len(noise))
    rollout = Rollout([prompt], zeros.long(), zeros[:, 0].long(), zeros, zeros.clone(),
                      zeros[:, 0].bool(), [])
    decode(Fixed(logits), rollout, torch.tensor([0]), 1,
           torch.tensor([noise], dtype=torch.float64), torch.tensor([3]), temperature, top_p)
    k = int(rollout.lengths)
    return rollout.tokens[0, :k].tolist(), rollout.logp[0, :k].tolist()


def test_temperature_by_hand():
    """Probabilities 1/8, 2/8, 5/8, 0 (logit -99): at temperature 1/2 1, 4, 25 of 30; noise 0.02 and
    0.1 and 0.2 draw tokens 0, 1, 2. Greedy: token 2, at temperature 1."""
    logits = [math.log(1), math.log(2), math.log(5), -99.0]
    tokens, logp = drawn(logits, [0], [0.02, 0.1, 0.2], 0.5)
    assert tokens == [0, 1, 2]
    assert logp == pytest.approx([math.log(x / 30) for x in (1, 4, 25)], abs=1e-5)
    tokens, logp = drawn(logits, [0], [0.02, 0.1], 0.0)
    assert tokens == [2, 2] and logp == pytest.approx([math.log(5 / 8)] * 2, abs=1e-5)


def test_top_p_by_hand():
    """The same probabilities, top_p 0.8: 5/8 and 2/8 stay, renormalised to 5/7 and 2/7. Token 1
    takes noise below 2/7 = 0.2857, token 2 the rest; log-probs stay those of the full softmax.
    top_p 0.6 or next to nothing keep one token, 0.9 three."""
    logits = [math.log(1), math.log(2), math.log(5), -99.0]
    noise = [0.0, 0.28, 0.29, 0.99]
    tokens, logp = drawn(logits, [0], noise, 1.0, top_p=0.8)
    assert tokens == [1, 1, 2, 2]
    by_hand = [math.log(2 / 8)] * 2 + [math.log(5 / 8)] * 2
    assert logp == pytest.approx(by_hand, abs=1e-5)
    for top_p, expected in ((0.6, [2, 2, 2, 2]), (1e-9, [2, 2, 2, 2]), (0.9, [0, 1, 1, 2])):
        assert drawn(logits, [0], noise, 1.0, top_p)[0] == expected


def test_keys_are_kept_as_attention_reads_them(tokenizer, monkeypatch):
    """Float32 weights, bfloat16 products: rotated keys are float32, values bfloat16. With keys
    rounded once, as they enter the cache, or anew for every token, answers are the same bits."""
    model = random_model("llama", len(tokenizer))
    model.compute_dtype = torch.bfloat16
    kept = []

    class Seen(sampling.Cache):
        def update(self, key, value, *rest, **named):
            keys, values = super().update(key, value, *rest, **named)
            kept.append((key.dtype, keys.dtype, values.dtype))
            return keys, values

    monkeypatch.setattr(sampling, "Cache", Seen)
    ours = sample(model, tokenizer, PROMPTS, 2, 8, seed=3)
    assert set(kept) == {(torch.float32, torch.bfloat16, torch.bfloat16)}
    monkeypatch.setattr(sampling, "Cache", DynamicCache)
    theirs = sample(model, tokenizer, PROMPTS, 2, 8, seed=3)
    assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.logp, theirs.logp)


def test_a_training_model_is_sampled_as_it_is_evaluated(tokenizer):
    """No dropout, and no recomputing, which would switch the cache off; afterwards it is in
    training again."""
    model = random_model("llama", len(tokenizer)).train()
    modes = []
    model.model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    rollout = sample(model, tokenizer, PROMPTS[:1], 1, 1)
    assert rollout.tokens.shape == (1, 1)
    assert modes == [False] and model.training and model.model.training


def test_join():
    """Prompt 5 6, answer 7 8: ids 5 6 7 8; the states at 6 and 7 predict the answer's tokens. No
    row becomes one of a single token that predicts nothing."""
    tokens, lengths = torch.tensor([[7, 8], [4, 0]]), torch.tensor([2, 1])
    ids, predicts = join(Rollout([[5, 6], [9]], tokens, lengths, *[None] * 4))
    assert ids.tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    assert predicts.int().tolist() == [[0, 1, 1, 0], [1, 0, 0, 0]]
    nothing = torch.zeros(0, dtype=torch.long)
    ids, predicts = join(Rollout([], nothing.view(0, 7), nothing, *[None] * 4))
    assert ids.shape == predicts.shape == (1, 1) and not predicts.any()


def test_rows_of_a_rollout(tokenizer):
    """rollout[rows] has those rows of everything, in the order asked for; T stays."""
    rollout = sample(model_with_stops(tokenizer), tokenizer, PROMPTS, 2, 12, seed=4)
    part = rollout[torch.tensor([5, 0])]
    assert part.prompts == [PROMPTS[2], PROMPTS[0]]
    assert part.texts == [rollout.texts[5], rollout.texts[0]]
    for name in ("tokens", "lengths", "mask", "logp", "entropy", "finished"):
        assert torch.equal(getattr(part, name), getattr(rollout, name)[[5, 0]])


def test_rows_at_once():
    """Qwen3-like, 4 blocks x 2 key heads x 8, float32: 2 * 4 * 2 * 8 * 4 = 512 bytes per token and
    20 * 97 for logits. 60 % of 13 GiB is 8,375,186,227 bytes: for 10^6 tokens 16 rows fit, for 100
    tokens 512, the most; at least one always."""
    model = random_model()
    assert [rows_at_once(model, tokens) for tokens in (10**6, 100, 10**9)] == [16, 512, 1]


def test_stop_ids():
    """The tokenizer's end token (1), those of the generation config, and the one that ends a turn
    in the chat template, <|im_end|> (1), also where the tokenizer's is <|endoftext|> (0), as in
    base models. Without a template, or with one that ends no turn so: the others alone."""
    model, tokenizer = random_model(), byte_level_tokenizer()
    for named, eos, stops in ((None, "<|im_end|>", [1]), (7, "<|im_end|>", [1, 7]),
                              ([7, 9], "<|endoftext|>", [0, 1, 7, 9])):
        model.generation_config.eos_token_id = named
        tokenizer.eos_token = eos
        assert stop_ids(model, tokenizer) == stops
    for template in (None, "{{ messages[1]['content'] }}", "{{ messages[1]['content'] }} and more"):
        tokenizer.chat_template = template
        assert stop_ids(model, tokenizer) == [0, 7, 9]
