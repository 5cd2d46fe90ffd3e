"""Looking inside a model: numbers against direct computation, a toy by hand, sampling from a layer, the command, refusals."""
import json
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import byte_level_tokenizer, random_model, rollout_of
from torch import nn

from common import internal_policy as ip
from common.errors import BadInput
from common.sampling import sample

IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14]]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer()


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
def test_every_quantity_against_direct_computation(kind):
    """The blocks' modules called one by one, as the paper's section 2 writes them; then softmax, norm, cosine of each stream."""
    model, mask = random_model(kind), MASK.bool()
    for name, p in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(p, 1, 0.3)  # gains of 1 would hide which norm was applied
    got = ip.internal_view(model, IDS, None, MASK, chunk=2)
    streams, cosines = {name: [] for name in got["entropy"]}, {"attn": [], "ffn": []}
    h = model.model.embed_tokens(IDS)
    rotary, causal = model.model.rotary_emb(h, torch.arange(5)[None]), torch.full((5, 5), -torch.inf).triu(1)[None, None]
    for block in model.model.layers:
        read = block.input_layernorm(h)
        a = block.self_attn(read, position_embeddings=rotary, attention_mask=causal)[0]
        middle = h + a
        f = block.mlp(block.post_attention_layernorm(middle))
        for name, x in zip(streams, (h, read, a, block.post_attention_layernorm(middle), f, middle + f)):
            streams[name].append(x[mask])
        cosines["attn"].append(((a * h).sum(-1) / a.norm(dim=-1) / h.norm(dim=-1))[mask].mean().item())
        cosines["ffn"].append(((f * middle).sum(-1) / f.norm(dim=-1) / middle.norm(dim=-1))[mask].mean().item())
        h = middle + f
    E = model.lm_head.weight.T
    direct = {"entropy": lambda x: ip.entropy(x @ E), "final_norm": lambda x: ip.entropy(model.model.norm(x) @ E),
              "l2_norm": lambda x: x.norm(dim=-1)}
    for quantity, of in direct.items():
        for name, xs in streams.items():
            expected = [of(x).mean().item() for x in xs]
            assert got[quantity][name].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4), (quantity, name)
    for name, values in cosines.items():
        assert got["cosine"][name].tolist() == pytest.approx(values, abs=1e-5), name
    assert not any(m._forward_hooks for m in model.modules())


class Times(nn.Module):
    """x -> x M, for the toys."""
    def __init__(self, *rows):
        super().__init__()
        self.M = torch.tensor(rows, dtype=torch.float)

    def forward(self, x, **_):
        return x @ self.M


class ToyBlock(nn.Module):
    def __init__(self, attn, mlp):
        super().__init__()
        self.self_attn, self.mlp, self.input_layernorm, self.post_attention_layernorm = attn, mlp, nn.Identity(), nn.Identity()

    def forward(self, h):
        h = h + self.self_attn(h)
        return h + self.mlp(h)


class ToyTrunk(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.layers, self.norm = nn.ModuleList(blocks), Times([0, 0], [0, 0])
        self.embed_tokens = nn.Embedding.from_pretrained(torch.eye(2))

    def forward(self, input_ids, **_):
        h = self.embed_tokens(input_ids)
        for block in self.layers:
            h = block(h)
        return h


class Toy(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.model, self.lm_head, self.config = ToyTrunk(*blocks), nn.Identity(), SimpleNamespace(vocab_size=2)


def test_toy_by_hand():
    """Two dimensions, V = 2, E = 1, a "final norm" that answers 0, token 0 = (1, 0).

    Block 1: A = 2 H = (2, 0), cosine 1; F = -H/3 of (3, 0) = (-1, 0), cosine -1; out (2, 0).
    Block 2: A = a quarter turn of (2, 0) = (0, 2), cosine 0; F = the same of (2, 2) = (-2, 2), cosine 0; out (0, 4).
    """
    turn = [0, 1], [-1, 0]
    toy = Toy(ToyBlock(Times([2, 0], [0, 2]), Times([-1 / 3, 0], [0, -1 / 3])), ToyBlock(Times(*turn), Times(*turn)))
    got = ip.internal_view(toy, torch.tensor([[0]]), None, torch.tensor([[1]]))
    assert got["cosine"]["attn"].tolist() == pytest.approx([1, 0], abs=1e-6)
    assert got["cosine"]["ffn"].tolist() == pytest.approx([-1, 0], abs=1e-6)
    assert got["l2_norm"]["layer_out"].tolist() == pytest.approx([2, 4])
    assert got["l2_norm"]["ffn_in"].tolist() == pytest.approx([3, 8 ** 0.5])
    coin = lambda z: math.log(1 + math.exp(-z)) + z / (1 + math.exp(z))  # entropy of softmax((z, 0))
    assert got["entropy"]["layer_out"].tolist() == pytest.approx([coin(2), coin(4)], abs=1e-6)
    assert got["entropy"]["ffn_in"].tolist() == pytest.approx([coin(3), math.log(2)], abs=1e-6)
    assert all(values.tolist() == pytest.approx([math.log(2)] * 2) for values in got["final_norm"].values())


@pytest.mark.parametrize("controls, reads", [(True, 10 * 4 + 2), (False, 5 * 4 + 1)])
def test_price_and_memory(controls, reads):
    """Five tokens are unembedded 10 L + 2 times (5 L + 1 without controls), never more than a chunk of two at once."""
    model, rows, runs = random_model("qwen3"), [], []
    model.lm_head.register_forward_hook(lambda _m, args, _o: rows.append(args[0].numel() // 32))
    model.model.layers[0].register_forward_hook(lambda *_: runs.append(1))
    ip.internal_view(model, IDS, None, MASK, chunk=2, controls=controls)
    assert sum(rows) == 5 * reads and max(rows) == 2 and len(runs) == 1


SMALL = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=1, initializer_range=0.3)
GPT2 = dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4)


@pytest.mark.parametrize("kind, extra, taken", [
    ("Mistral", {}, True), ("Phi3", {}, True), ("Gemma", {"head_dim": 8}, True), ("Mixtral", {}, True),
    ("Gemma2", {"head_dim": 8}, False),                # norms what modules put out: there post_attention_layernorm is that norm
    ("Glm4", {"head_dim": 8}, False),                  # the same, under other names
    ("Olmo2", {}, False),                              # no norm before the modules
    ("Granite", {"residual_multiplier": 0.5}, False),  # scales what is added
    ("Phi", {}, False), ("Cohere", {}, False),         # both modules side by side
    ("StableLm", {"use_parallel_residual": True}, False),
    ("GPT2", {}, False),
])
def test_other_architectures_work_or_are_refused(kind, extra, taken):
    """By what the tensors do, not by name. In none of the refused are A^l and the FFN's input what the definitions say."""
    torch.manual_seed(0)
    head, shape = ("LMHeadModel", GPT2) if kind == "GPT2" else ("ForCausalLM", {**SMALL, **extra})
    model = getattr(transformers, kind + head)(getattr(transformers, f"{kind}Config")(**shape)).eval()
    if taken:
        for p in model.parameters():
            nn.init.normal_(p, 0, 0.3)
        got = ip.internal_view(model, IDS, None, MASK)
        assert got["entropy"]["layer_out"][0] == got["entropy"]["layer_in"][1]
        assert all(values.isfinite().all() for streams in got.values() for values in streams.values())
        return
    with pytest.raises(BadInput, match=f"{type(model).__name__} is not supported"):
        ip.internal_view(model, IDS, None, MASK)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("reads, scale, taken", [("middle", 1.0, True), ("start", 1.0, False), ("middle", 0.5, False)])
def test_one_difference_is_enough_to_be_refused(reads, scale, taken):
    """A block whose FFN reads what attention read, beside it, adds up all the same; one that adds half of it reads what it should."""
    model = random_model("llama", layers=1)
    block = model.model.layers[0]

    def forward(h, **kwargs):
        middle = h + block.self_attn(block.input_layernorm(h), **kwargs)[0]
        return middle + scale * block.mlp(block.post_attention_layernorm(h if reads == "start" else middle))
    block.forward = forward
    if taken:
        assert ip.internal_view(model, IDS, None, MASK)["entropy"]["layer_out"].isfinite().all()
    else:
        with pytest.raises(BadInput, match="do not just add"):
            ip.internal_view(model, IDS, None, MASK)


def test_padding_on_the_left_changes_nothing():
    """Positions are relative (RoPE), so two hidden tokens before every row leave all it holds as it was."""
    model, two = random_model("qwen3"), IDS[:, :2]
    plain = ip.internal_view(model, IDS, None, MASK)
    attention = torch.cat([two * 0, IDS * 0 + 1], 1)
    padded = ip.internal_view(model, torch.cat([two, IDS], 1), attention, torch.cat([two * 0, MASK], 1))
    for quantity, streams in plain.items():
        for name, values in streams.items():
            assert padded[quantity][name].tolist() == pytest.approx(values.tolist(), rel=1e-3, abs=1e-4), (quantity, name)


def test_size_of_a_chunk():
    """At most 2^24 logits at once: were V 2^23, the five tokens would be read two at a time."""
    model, rows = random_model("qwen3"), []
    model.lm_head.register_forward_hook(lambda _m, args, _o: rows.append(args[0].numel() // 32))
    model.config.vocab_size = 1 << 23
    ip.internal_entropies(model, IDS, None, MASK)
    assert max(rows) == 2 and sum(rows) == 5 * (5 * 4 + 1)


def test_bfloat16_blocks_are_not_refused():
    ip.internal_view(random_model("qwen3").bfloat16(), IDS, None, MASK)


def test_samples_follow_softmax_of_the_layer(tokenizer):
    """20,000 first tokens of block 2 against softmax of layer_logits: chi-squared over those due 20 times, within 5 sigma."""
    model, n = random_model("llama", vocab_size=len(tokenizer)), 20_000
    model.lm_head.weight.data *= 0.1  # flat enough for many tokens to be expected
    rollout = sample(ip.layer_policy(model, 2), tokenizer, [PROMPTS[0]], n=n, max_new_tokens=1, seed=1, max_rows=n)
    expected = n * torch.softmax(ip.layer_logits(model, torch.tensor([PROMPTS[0]]), layer=2)[0, -1].double(), -1)  # (V,)
    counts = torch.bincount(rollout.tokens[:, 0], minlength=len(expected)).double()                                # (V,)
    often = expected >= 20
    chi2, freedom = ((counts - expected)[often] ** 2 / expected[often]).sum(), often.sum() - 1
    assert freedom > 20 and abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5


def test_rollouts_are_read_within_the_budget():
    """Answers of 6, 3, 2 and 1 tokens to prompts of 2: at most 8 tokens a row, so with a budget of 17 two rows a forward pass."""
    model, shapes = random_model("qwen3"), []
    rollout = rollout_of([[5, 6]] * 4, torch.tensor([6, 3, 2, 1]))
    model.model.register_forward_pre_hook(lambda _m, _a, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    ip.rollout_entropies(model, rollout, 17)
    ip.rollout_entropies(model, rollout, 1)
    assert shapes == [(2, 8), (2, 4), (1, 8), (1, 5), (1, 4), (1, 3)]


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
def test_layer_policy_with_its_cache(kind, tokenizer):
    """Forty tokens sampled from block 2 through the cache, padded and shrinking, have the log-probs of a plain forward; blocks
    above do not run, and the model is afterwards what it was."""
    model, ran = random_model(kind, vocab_size=len(tokenizer)), set()
    model.generation_config.eos_token_id = list(range(60, 90))
    for number, block in enumerate(model.model.layers, 1):
        block.register_forward_hook(lambda _m, _a, _o, number=number: ran.add(number))
    rollout = sample(ip.layer_policy(model, 2), tokenizer, PROMPTS, n=8, max_new_tokens=40, seed=3)
    assert ran == {1, 2} and 0 < rollout.finished.float().mean() < 1
    for p, tokens, k, logp in zip(rollout.prompts, rollout.tokens, rollout.lengths.tolist(), rollout.logp):
        logits = ip.layer_logits(model, torch.tensor([p + tokens[:k].tolist()]), layer=2)[0, len(p) - 1:-1]        # (k, V)
        plain = torch.log_softmax(logits, -1)                                                                      # (k, V)
        assert (plain.gather(-1, tokens[:k, None])[:, 0] - logp[:k]).abs().max() < 1e-4
    assert len(model.model.layers) == 4 and type(model.model.norm) is not nn.Identity and not model.training
    assert ip.layer_policy(model, 4) is model
    for layer in (0, 5):
        with pytest.raises(ValueError, match="1..4"):
            ip.layer_policy(model, layer)


def test_rollout_view_pools_tokens(tokenizer):
    """All tokens: the same however they are split. Some: the mean over those the seed draws, answers without one skipped."""
    model = random_model("qwen3", vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = list(range(60, 90))
    rollout = sample(model, tokenizer, PROMPTS, n=3, max_new_tokens=12, seed=0)
    total = int(rollout.lengths.sum())
    assert len(set(rollout.lengths.tolist())) > 1
    whole, pieces = ip.rollout_view(model, rollout, 10_000), ip.rollout_view(model, rollout, 20, tokens=total + 5)
    answers = zip(rollout.prompts, rollout.tokens.tolist(), rollout.lengths.tolist())
    per_token = torch.cat([ip.entropy(ip.layer_logits(model, torch.tensor([p + row[:k]]), layer=2))[0, len(p) - 1:-1]
                           for p, row, k in answers])                                                # (N,)
    assert whole["entropy"]["layer_out"][1].item() == pytest.approx(per_token.mean().item(), abs=1e-4)
    for quantity, streams in whole.items():
        for name, values in streams.items():
            assert pieces[quantity][name].tolist() == pytest.approx(values.tolist(), rel=1e-3, abs=1e-4), (quantity, name)
    assert torch.allclose(ip.rollout_entropies(model, rollout, 30)["ffn_out"], whole["entropy"]["ffn_out"], atol=1e-4)
    ran = []
    handle = model.model.layers[0].register_forward_hook(lambda _m, args, _o: ran.append(len(args[0])))
    some = ip.rollout_view(model, rollout, 30, tokens=4, seed=5)
    handle.remove()
    drawn = torch.randperm(total, generator=torch.Generator().manual_seed(5)) < 4                    # (N,)
    assert some["entropy"]["layer_out"][1].item() == pytest.approx(per_token[drawn].mean().item(), abs=1e-4)
    assert sum(ran) <= 4 < len(rollout.prompts)


def test_boundaries_move_with_the_tolerance():
    """FFN changes 1, 0.15, 0.03, -1: the run ends at 3 while 0.03 counts, at 2 while 0.15 does, then at 1; no rise: None."""
    zero = torch.zeros(4)
    entropies = {f"{name}_{side}": zero for name in ("attn", "ffn", "layer") for side in ("in", "out")}
    found = ip.boundaries(entropies | {"ffn_out": torch.tensor([1, 0.15, 0.03, -1])})
    assert found == {0.01: 3, 0.02: 3, 0.05: 2, 0.1: 2, 0.2: 1}
    assert set(ip.boundaries(entropies).values()) == {None}
    fall = ip.boundaries(entropies | {"ffn_out": torch.tensor([0.3, -4, 0, 0])})  # a fall counts for the largest change too
    assert fall == {0.01: 1, 0.02: 1, 0.05: 1, 0.1: None, 0.2: None}


@pytest.mark.parametrize("changes, marked, last", [((1, 0.5, -1), 2, False), ((1, 0.5, 1), 3, True)])
def test_the_table_marks_the_boundary(changes, marked, last, capsys):
    """Entropies leave the blocks at 3, 4, 5 nats, the FFNs change them by these; with the final norm nothing rises."""
    zero = torch.zeros(3)
    streams = {f"{name}_{side}": zero for name in ("attn", "ffn", "layer") for side in ("in", "out")}
    ip.print_view({"entropy": streams | {"layer_out": torch.tensor([3., 4, 5]), "ffn_out": torch.tensor(changes)},
                   "final_norm": streams, "l2_norm": streams})
    title, head, *rows, explained, tolerances, paper, control = capsys.readouterr().out.splitlines()
    assert [row.split()[:3] for row in rows] == [[str(l), f"{l + 2:.3f}", f"{x:+.3f}"] for l, x in enumerate(changes, 1)]
    assert [l for l, row in enumerate(rows, 1) if "<- boundary" in row] == [marked] and ("whole model" in rows[marked - 1]) == last
    assert explained.startswith("boundary: ") and paper.split()[-5:] == [str(marked)] * 5 and control.split()[-5:] == ["none"] * 5


def run(*argv):
    ip.main([*map(str, argv), "--device", "cpu"])


def test_the_command(tmp_path, capsys, tokenizer):
    """Two models of different depth into one set of figures; table, boundary, a layer's samples; the numbers in the JSON."""
    for layers in (2, 3):
        random_model("llama", vocab_size=len(tokenizer), layers=layers).save_pretrained(tmp_path / f"m{layers}")
        tokenizer.save_pretrained(tmp_path / f"m{layers}")
    names = [str(tmp_path / "m2"), str(tmp_path / "m3")]
    small = "--samples 3 --max-new-tokens 12 --tokens 9 --sample-layer 2".split()
    run("--model", *names, *small, "--output", tmp_path / "out")
    said = capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["changes.png", "cosines.png", "entropies.json", "flow.png"]
    assert all((tmp_path / "out" / f"{name}.png").read_bytes()[:4] == b"\x89PNG" for name in ("flow", "changes", "cosines"))
    saved = json.loads((tmp_path / "out" / "entropies.json").read_text())
    assert list(saved["models"]) == names and saved["flags"]["samples"] == 3
    for L, view in zip((2, 3), saved["models"].values()):
        assert view["answers"] == 3 and view["tokens"] == 9 and view["vocabulary"] == len(tokenizer)
        assert {len(values) for q in ("entropy", "final_norm", "l2_norm", "cosine") for values in view[q].values()} == {L}
        assert f"{view['entropy']['layer_out'][L - 1]:.3f}" in said
    assert said.count("block 2 says") == 2 and said.count("with the final norm") == 4 and "9 of their" in said
    with pytest.raises(SystemExit) as stop:  # the same folder again
        run("--model", names[0], "--output", tmp_path / "out")
    assert stop.value.code == 2 and "holds something already" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "entropies.json").read_text()) == saved


@pytest.mark.parametrize("flags, says", [
    ("--samples 0", "at least 1"), ("--tokens -1", "at least 0"),
    ("--sample-layer 0", "at least 1"), ("--sample-layer 99", "has blocks 1"),
    ("--model nowhere/at/all", "no model in"), ("--model tiny nowhere/at/all", "no model in"), ("--model", "expected at least"),
    ("--data nothing.jsonl", "no such file"),
    ("--max-new-tokens 512", "lower it by 1"), ("--sample 3", "unrecognized"),
    ("--output {file}", "holds something already"), ("--output {file}/sub", "cannot write there"),
    ("--model {gpt2}", "GPT2LMHeadModel is not supported"), ("--model {granite}", "GraniteForCausalLM is not supported"),
])
def test_bad_input_is_one_line_and_leaves_nothing(flags, says, tmp_path, capsys, tokenizer):
    where = {name: tmp_path / name for name in ("file", "gpt2", "granite")}
    where["file"].write_text("kept")
    if "{g" in flags:
        model = (transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)) if "gpt2" in flags else
                 transformers.GraniteForCausalLM(transformers.GraniteConfig(**SMALL, residual_multiplier=0.5)))
        for saved in (model, tokenizer):
            saved.save_pretrained(where[flags[9:-1]])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run("--output", tmp_path / "out", "--max-new-tokens", 8, *flags.format(**where).split())  # the later flag wins
    err = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and err[-1].startswith("error: ") and says in err[-1], err
    assert sorted(tmp_path.rglob("*")) == before and where["file"].read_text() == "kept"
