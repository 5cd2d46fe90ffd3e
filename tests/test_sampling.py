"""The sampler against model.generate, against softmax, and against the trainer's log-probs."""
import math
import types

import pytest
import torch
from conftest import byte_level_tokenizer, random_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3NextConfig,
)

from common import sampling
from common.errors import BadInput
from common.logprobs import response_logprobs
from common.models import grouped_sdpa, refuse_foreign
from common.sampling import distributions, join, keep_top_p, pick, sample, sample_texts

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14]]  # of different lengths: the sampler pads them on the right


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer()


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
def test_greedy_equals_generate(kind, tokenizer):
    model = random_model(kind, vocab_size=len(tokenizer))
    rollout = sample(model, tokenizer, PROMPTS, n=2, max_new_tokens=70, temperature=0)
    for row, prompt in enumerate(p for p in PROMPTS for _ in range(2)):
        generated = model.generate(torch.tensor([prompt]), max_new_tokens=70, do_sample=False)[0, len(prompt):]
        k = int(rollout.lengths[row])
        assert rollout.tokens[row, :k].tolist() == generated.tolist()


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_agree(kind, temperature, tokenizer):
    """Log-probs and entropies of the same tokens, once from the cache, padded and shrinking, once from a plain forward."""
    model = random_model(kind, vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = list(range(60, 70))  # several stop tokens, so that answers end at different times
    rollout = sample(model, tokenizer, PROMPTS, n=8, max_new_tokens=40, temperature=temperature, seed=3)
    logp, entropy = response_logprobs(model, rollout, temperature)
    assert 0 < rollout.finished.float().mean() < 1  # both ends happen
    assert (logp - rollout.logp).abs().max() < 1e-4 and (entropy - rollout.entropy).abs().max() < 1e-4


@pytest.mark.parametrize("config", [MistralConfig, Qwen2Config, Gemma3TextConfig])
def test_a_sliding_window_slides_in_decoding_too(config, tokenizer):
    """Window 16, prompts of 1 to 21 tokens, answers of 40: sampler and trainer agree, and without the window they would not."""
    torch.manual_seed(0)
    extra = {"use_sliding_window": True, "max_window_layers": 1} if config is Qwen2Config else {}
    settings = config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                      num_key_value_heads=2, head_dim=8, sliding_window=16, initializer_range=0.5, eos_token_id=1, pad_token_id=0,
                      bos_token_id=None, attn_implementation="grouped_sdpa", **extra)
    model = AutoModelForCausalLM.from_config(settings).eval()
    rollout = sample(model, tokenizer, [*PROMPTS, list(range(5, 26))], n=4, max_new_tokens=40, seed=2)
    gap = lambda: (response_logprobs(model, rollout)[0] - rollout.logp).abs().max()
    assert rollout.lengths.max() > 20 and gap() < 1e-3
    for block in model.model.layers:
        block.self_attn.sliding_window = None
    model.config.sliding_window = 1000
    assert gap() > 0.01


@pytest.mark.parametrize("config, kind", [
    (Qwen3NextConfig(), "linear_attention"), (Gemma2Config(), "attn_logit_softcapping"),
    (Qwen2MoeConfig(use_sliding_window=True, sliding_window=16), "sliding_window"),
    (LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "dynamic")])
def test_models_of_another_kind_are_refused(config, kind):
    with pytest.raises(BadInput, match=f"{config.model_type} is not supported: {kind}"):
        refuse_foreign(config)
    for known in (MistralConfig(), Gemma3TextConfig(), Qwen2Config(), Qwen3Config(), LlamaConfig()):
        refuse_foreign(known)


def test_no_query_sees_nothing(tokenizer, monkeypatch):
    """Where a mask lets a query see no key, a kernel may answer NaN, and NaN spreads through the cache: no such row, in no call."""
    attention, masks = torch.nn.functional.scaled_dot_product_attention, []

    def careful(query, key, value, attn_mask=None, **kwargs):
        masks.append(attn_mask)
        return attention(query, key, value, attn_mask=attn_mask, **kwargs)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", careful)
    sample(random_model("qwen3", vocab_size=len(tokenizer)), tokenizer, PROMPTS, n=2, max_new_tokens=20, seed=1)
    assert masks[0] is None and masks[-1] is not None and all(mask.any(-1).all() for mask in masks if mask is not None)


def test_grouped_attention():
    """Four heads, two of keys, D = 1, three slots of which the last is hidden. Scores q k: head 0 (q 0) 0, 0; head 1 (q 1) 0, ln 3; head 2
    (q 0) 0, 0; head 3 (q 1) ln 2, 0. Values 1, 5 and 2, 8: (1 + 5) / 2, (1 + 3 * 5) / 4, (2 + 8) / 2, (2 * 2 + 8) / 3. And nothing as
    large as the keys copied for every head is made."""
    module = types.SimpleNamespace(num_key_value_groups=2, is_causal=True)
    query = torch.tensor([0.0, 1, 0, 1]).view(1, 4, 1, 1)
    key = torch.tensor([[0, math.log(3), 9], [math.log(2), 0, 9]]).view(1, 2, 3, 1)
    value, mask = torch.tensor([[1.0, 5, 100], [2, 8, 100]]).view(1, 2, 3, 1), torch.tensor([True, True, False]).view(1, 1, 1, 3)
    out, _ = grouped_sdpa(module, query, key, value, mask, scaling=1.0)
    assert out.shape == (1, 1, 4, 1) and torch.allclose(out.flatten(), torch.tensor([3, 4, 5, 4.0]))
    whole, _ = grouped_sdpa(module, query.expand(1, 4, 3, 1), key, value, None, scaling=1.0)  # three tokens: transformers' own, causal
    assert torch.allclose(whole[0, 1], torch.tensor([3, 4, 5, 4.0])[:, None])
    with Recorder() as made:
        grouped_sdpa(module, torch.zeros(2, 4, 1, 16), torch.zeros(2, 2, 999, 16), torch.zeros(2, 2, 999, 16), torch.ones(2, 1, 1, 999).bool())
    assert max(x.numel() for *_, out in made.done for x in (out if isinstance(out, tuple) else [out])) < 2 * 4 * 999 * 16


class Recorder(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: operations with the very tensors they were called on. Replayed, they run again on those and
    into those, without Python; what a recording wrote is taken back, as nothing runs while a graph is recorded. What would wait
    for a device or read the CPU's memory fails, as it does there."""
    WAIT = {"item", "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2", "unique_dim"}

    def __init__(self):
        super().__init__()
        self.done, self.before = [], {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in self.WAIT, f"{function} waits for the device"
        if name in ("index", "index_put_", "_index_put_impl_"):
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), "a mask as an index waits for the device"
            assert name == "index" or args[2].dim() > 0, "a number is copied from the CPU"
        for argument, value in zip(function._schema.arguments, args):
            if argument.is_write:
                storage = value.untyped_storage()
                self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        out = function(*args, **(kwargs or {}))
        self.done.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        for function, args, kwargs, out in self.done:
            again = function(*args, **kwargs)
            for old, new in zip(*([x] if torch.is_tensor(x) else x for x in (out, again))):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.mark.parametrize("kind, options", [("qwen3", {}), ("qwen2", dict(top_p=0.9)), ("llama", dict(repetition_penalty=1.3)),
                                           ("qwen3", dict(temperature=0))])
def test_a_recorded_step_is_the_step(kind, options, tokenizer, monkeypatch):
    """70 tokens, with rows that end all the time: steps recorded once and replayed, looked after every 16, against the plain loop."""
    counts = {"recorded": 0, "replayed": 0}

    def refuse(*args, **kwargs):
        raise AssertionError("reads or makes a tensor on the CPU")

    def record(step):
        recorder = Recorder()
        with recorder, monkeypatch.context() as inside:
            for name in ("tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
                inside.setattr(torch.Tensor, name, refuse)
            inside.setattr(torch, "tensor", refuse)
            step()
        for storage, was in recorder.before.values():
            storage.copy_(was)
        counts["recorded"] += 1

        def replay():
            counts["replayed"] += 1
            recorder.replay()
        return replay

    monkeypatch.setattr("common.sampling.record", record)
    model = random_model(kind, vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = list(range(60, 66))
    plain, replayed = (sample(model, tokenizer, PROMPTS, 8, 70, seed=3, graphs=graphs, **options) for graphs in (False, True))
    assert counts["recorded"] >= 3 and counts["replayed"] > 40 and 0 < plain.finished.float().mean() < 1
    assert torch.equal(plain.tokens, replayed.tokens) and torch.equal(plain.lengths, replayed.lengths)
    assert torch.equal(plain.finished, replayed.finished) and plain.texts == replayed.texts
    assert (plain.logp - replayed.logp).abs().max() < 1e-4 and (plain.entropy - replayed.entropy).abs().max() < 1e-4


def test_masks_come_from_lengths(tokenizer):
    """The stop token is inside the mask, what follows is not; a cut answer fills its row; the pad id inside an answer stays in."""
    model = random_model("qwen3", vocab_size=len(tokenizer))
    rollout = sample(model, tokenizer, PROMPTS, n=32, max_new_tokens=60, seed=0)
    assert rollout.mask.sum(1).tolist() == rollout.lengths.tolist()
    for tokens, length, finished in zip(rollout.tokens.tolist(), rollout.lengths.tolist(), rollout.finished.tolist()):
        assert finished == (tokens[length - 1] == tokenizer.eos_token_id)
        assert tokenizer.eos_token_id not in tokens[:length - 1] and not any(tokens[length:])
        assert finished or length == 60
    assert any(rollout.finished) and not any("<|" in text for text in rollout.texts)  # a stop token is no part of what is verified
    inside = rollout.tokens[rollout.mask > 0]
    assert (inside == tokenizer.pad_token_id).any()  # an untrained model says the pad token too: ids could not tell


def test_samples_follow_softmax(tokenizer):
    """20,000 first tokens against softmax(logits / T): chi-squared over the tokens expected at least 20 times, within 5 sigma."""
    model, n = random_model("llama", vocab_size=len(tokenizer)), 20_000
    rollout = sample(model, tokenizer, [PROMPTS[0]], n=n, max_new_tokens=1, temperature=1.3, seed=1, max_rows=n)
    expected = n * torch.softmax(model(torch.tensor([PROMPTS[0]])).logits[0, -1].double() / 1.3, -1)
    counts = torch.bincount(rollout.tokens[:, 0], minlength=len(expected)).double()
    often = expected >= 20
    chi2, freedom = ((counts - expected)[often] ** 2 / expected[often]).sum(), often.sum() - 1
    assert abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5


def test_same_seed_same_answers_and_bounded_rows(tokenizer):
    model = random_model("qwen3", vocab_size=len(tokenizer))
    first, second, other = (sample(model, tokenizer, PROMPTS, 5, 20, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(first.tokens, second.tokens) and first.texts == second.texts
    assert not torch.equal(first.tokens[:, :5], other.tokens[:, :5])
    for max_rows in (4, 1):  # groups of five cut into pieces of four rows, and every row alone
        pieces = sample(model, tokenizer, PROMPTS, 5, 20, seed=7, max_rows=max_rows)
        assert torch.equal(pieces.tokens, first.tokens) and pieces.prompts == first.prompts


def test_prompts_split_over_ranks_get_the_answers_of_one_process(tokenizer, monkeypatch):
    """Three prompts, two ranks: rank 0 has the first and third, rank 1 the second and, to make two, the third again, left out in the end."""
    model, said = random_model("qwen3", vocab_size=len(tokenizer)), {}
    whole = sample_texts(model, tokenizer, PROMPTS, 2, 12, seed=4)
    plain = sample(model, tokenizer, PROMPTS, 2, 12, seed=4)
    assert whole == list(zip(plain.texts, plain.lengths.tolist(), plain.finished.tolist()))
    for r in (0, 1, 0):  # the first rank once more, when both have spoken
        for name, stand_in in dict(size=lambda: 2, rank=lambda r=r: r, share=lambda rows, r=r: rows[r::2],
                                   everyone=lambda mine, r=r: said.update({r: mine}) or [said[0], said.get(1, mine)]).items():
            monkeypatch.setattr(f"common.sampling.{name}", stand_in)
        together = sample_texts(model, tokenizer, PROMPTS, 2, 12, seed=4)
    assert [len(said[r]) for r in (0, 1)] == [4, 4] and together == whole


def test_memory_that_runs_out_halves_the_rows(tokenizer, monkeypatch, capsys):
    """Room for three rows: 15 at once fail, 7 fail, 3 do. The answers are the same, the next call begins with 3; no room for one raises."""
    model, tried, room = random_model("qwen3", vocab_size=len(tokenizer)), [], 3
    plain, decode = sample(model, tokenizer, PROMPTS, 5, 12, seed=6), sampling.decode

    def small(model, prompts, rows, *args):
        tried.append(len(rows))
        if len(rows) > room:
            raise torch.OutOfMemoryError("no room")
        return decode(model, prompts, rows, *args)
    monkeypatch.setattr(sampling, "decode", small)
    again = sample(model, tokenizer, PROMPTS, 5, 12, seed=6)
    assert tried == [15, 7] + [3] * 5 and torch.equal(again.tokens, plain.tokens) and again.texts == plain.texts
    assert capsys.readouterr().out.count("out of memory while sampling") == 2
    sample(model, tokenizer, PROMPTS, 5, 12, seed=6)
    assert tried[7:] == [3] * 5
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        sample(model, tokenizer, PROMPTS, 5, 12, seed=6)
    assert tried[12:] == [3, 1]


def test_pick():
    """Weights 0 1 0 2 1 run up to 0 1 1 3 4: u below 1/4 gives token 1, below 3/4 token 3, else 4; weight 0 is never picked, not even
    the last one by a u that was rounded to 1; NaN weights pick a token that exists (on a GPU any other ends the process)."""
    u = torch.tensor([0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert pick(torch.tensor([[0.0, 1, 0, 2, 1]]).expand(6, 5), u).tolist() == [1, 1, 3, 3, 4, 4]
    for dtype in (torch.float32, torch.float64):
        assert pick(torch.tensor([[3.0, 1, 0], [0.1, 0.7, 0]]), torch.ones(2, dtype=dtype)).tolist() == [1, 1]
        assert pick(torch.full((1, 3), torch.nan), torch.zeros(1, dtype=dtype)).tolist() == [2]


def test_pick_sums_in_the_dtype_of_u():
    """Weights 1 and 2^-30: in float32 they sum to 1 and the second could never be drawn; in float64 it is, by u = 1 - 2^-32."""
    assert pick(torch.tensor([[1.0, 2**-30]]), torch.tensor([1 - 2**-32], dtype=torch.float64)).tolist() == [1]


def test_repetition_penalty_in_the_loop(tokenizer):
    """A huge penalty forbids every token of the prompt and every repeat; a penalty of 1 changes nothing; logp stays the model's own."""
    model = random_model("llama", vocab_size=len(tokenizer))
    free, once, bound = (sample(model, tokenizer, PROMPTS, 4, 30, 0.2, repetition_penalty=x) for x in (1.0, 1 + 1e-12, 1e6))
    twice = lambda r: [len(p) + k - len({*p, *row[:k]}) for p, row, k in zip(r.prompts, r.tokens.tolist(), r.lengths.tolist())]
    assert max(twice(free)) > 0 == max(twice(bound)) and torch.equal(free.tokens, once.tokens)
    assert (response_logprobs(model, bound, 0.2)[0] - bound.logp).abs().max() < 1e-3


def test_float32_from_a_bfloat16_model(tokenizer):
    """Log-probs and entropies have digits that bfloat16 has not, and are the trainer's but for what rounding in the blocks makes."""
    model = random_model("qwen3", vocab_size=len(tokenizer)).bfloat16()
    rollout = sample(model, tokenizer, PROMPTS, 4, 20, seed=1)
    logp, entropy = response_logprobs(model, rollout)
    for ours, theirs in ((rollout.logp, logp), (rollout.entropy, entropy)):
        assert ours.dtype == torch.float32 and (ours.bfloat16().float() != ours)[rollout.mask > 0].float().mean() > 0.9
        assert (ours - theirs).abs().mean() < 0.05


def test_a_training_model_is_sampled_as_it_is_evaluated(tokenizer):
    """No dropout, and no checkpointing, which would switch the cache off; afterwards it is in training again."""
    model, modes = random_model("llama", vocab_size=len(tokenizer)).train(), []
    model.model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    rollout = sample(model, tokenizer, PROMPTS[:1], 1, 1)
    assert rollout.tokens.shape == (1, 1) and modes == [False] and model.training and model.model.training


def test_top_p():
    """Probabilities .5 .3 .15 .05: top_p .6 keeps .5 and .3 (the one that crosses .6); top_p .4 keeps the first alone; 1 keeps all."""
    logp = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    for top_p, kept in ((0.6, [False, True, False, True]), (0.4, [False, True, False, False]), (0.99, [True] * 4)):
        assert keep_top_p(logp, top_p).isfinite()[0].tolist() == kept
    assert keep_top_p(torch.tensor([[0.25, 0.5, 0.25]]).log(), 0.5).isfinite()[0].tolist() == [False, True, False]  # one half is reached


def test_distributions_by_hand():
    """Logits 2, 1/2, -1, 0, temperature 1/2, penalty 2 on the first three: 1, 1/4, -2, 0 before the division. The log-probs that are
    kept stay the model's: softmax of 4, 1, -2, 0; those that are drawn from are softmax of 2, 1/2, -4, 0. Temperature 0 divides by 1."""
    scores, said = torch.tensor([[2, 0.5, -1, 0]]), torch.tensor([[True, True, True, False]])
    normed = lambda *x: [v - math.log(sum(map(math.exp, x))) for v in x]
    full, drawn = distributions(scores, 0.5, 1.0, 2.0, said)
    assert full[0].tolist() == pytest.approx(normed(4, 1, -2, 0)) and drawn[0].tolist() == pytest.approx(normed(2, 0.5, -4, 0))
    full, drawn = distributions(scores, 0.0, 0.5, 1.0, said)
    assert full[0].tolist() == pytest.approx(normed(2, 0.5, -1, 0)) and drawn[0].isfinite().tolist() == [True, False, False, False]


def test_join():
    """Prompt 5 6, answer 7 8: ids 5 6 7 8; the states at 6 and 7 predict the answer's tokens."""
    ids, predicts = join([[5, 6], [9]], torch.tensor([[7, 8], [4, 0]]), torch.tensor([2, 1]))
    assert ids.tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    assert predicts.int().tolist() == [[0, 1, 1, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize("bad", [dict(prompts=[]), dict(prompts=[[5], []]), dict(n=0), dict(max_new_tokens=0), dict(temperature=-1),
                                 dict(top_p=0), dict(top_p=1.1), dict(repetition_penalty=0)])
def test_bad_arguments(bad, tokenizer):
    arguments = dict(prompts=PROMPTS, n=1, max_new_tokens=1) | bad
    with pytest.raises(ValueError):
        sample(random_model("qwen3", vocab_size=len(tokenizer)), tokenizer, **arguments)
