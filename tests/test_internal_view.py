"""Looking inside a model: numbers against direct computation, a toy by hand, sampling from a block,
the command, bad input."""
import json
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import byte_level_tokenizer, random_model, rollout_of
from torch import nn

from analysis import internal
from common.internal_policy import entropy, layer_logits
from common.sampling import sample

IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14]]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer()


def blocks_by_hand(model):
    """The blocks' modules called one by one, as the paper's section 2 writes them.

    -> {stream: [(N, D) per block]}, {module: [mean cosine per block]}.
    """
    inside = MASK.bool()
    streams = {name: [] for name in ("layer_in", "attn_in", "attn_out", "ffn_in", "ffn_out",
                                     "layer_out")}
    cosines = {"attn": [], "ffn": []}
    h = model.model.embed_tokens(IDS)
    rotary = model.model.rotary_emb(h, torch.arange(5)[None])
    causal = torch.full((5, 5), -torch.inf).triu(1)[None, None]
    for block in model.model.layers:
        read = block.input_layernorm(h)
        a = block.self_attn(read, position_embeddings=rotary, attention_mask=causal)[0]
        middle = h + a
        fed = block.post_attention_layernorm(middle)
        f = block.mlp(fed)
        for name, x in zip(streams, (h, read, a, fed, f, middle + f), strict=True):
            streams[name].append(x[inside])
        for module, x, y in (("attn", a, h), ("ffn", f, middle)):
            cosine = (x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)
            cosines[module].append(cosine[inside].mean().item())
        h = middle + f
    return streams, cosines


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
@torch.no_grad()
def test_every_quantity_against_direct_computation(kind):
    """Softmax, norm and cosine of each stream of the blocks by hand, read in chunks of two."""
    model = random_model(kind)
    for name, weight in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(weight, 1, 0.3)  # gains of 1 would hide which norm was applied
    view = internal.internal_view(model, IDS, None, MASK, chunk=2)
    streams, cosines = blocks_by_hand(model)
    E = model.lm_head.weight.T
    for name, xs in streams.items():
        expected = {
            "entropy": [entropy(x @ E).mean().item() for x in xs],
            "final_norm": [entropy(model.model.norm(x) @ E).mean().item() for x in xs],
            "l2_norm": [x.norm(dim=-1).mean().item() for x in xs],
        }
        for quantity, values in expected.items():
            found = view[quantity][name].tolist()
            assert found == pytest.approx(values, rel=1e-4, abs=1e-4), (quantity, name)
    for module, values in cosines.items():
        assert view["cosine"][module].tolist() == pytest.approx(values, abs=1e-5), module
    assert not any(module._forward_hooks for module in model.modules())


class Times(nn.Module):
    """x -> x M, for the toy."""

    def __init__(self, *rows):
        super().__init__()
        self.M = torch.tensor(rows, dtype=torch.float)

    def forward(self, x):
        return x @ self.M


class ToyBlock(nn.Module):
    def __init__(self, attn, mlp):
        super().__init__()
        self.self_attn = attn
        self.mlp = mlp

    def forward(self, h):
        h = h + self.self_attn(h)
        return h + self.mlp(h)


class ToyTrunk(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.layers = nn.ModuleList(blocks)
        self.norm = Times([0, 0], [0, 0])
        self.embed_tokens = nn.Embedding.from_pretrained(torch.eye(2))

    def forward(self, input_ids, **_):
        h = self.embed_tokens(input_ids)
        for block in self.layers:
            h = block(h)
        return h


class Toy(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.model = ToyTrunk(*blocks)
        self.lm_head = nn.Linear(2, 2, bias=False)
        self.lm_head.weight.data = torch.eye(2)
        self.config = SimpleNamespace(num_hidden_layers=len(blocks))
        self.device = torch.device("cpu")
        self.dtype = torch.float32


def coin(z):
    """Entropy of softmax((z, 0)): with p = 1 / (1 + e^-z) it is log(1 + e^-z) + z (1 - p)."""
    return math.log(1 + math.exp(-z)) + z / (1 + math.exp(z))


def test_toy_by_hand():
    """Two dimensions, V = 2, E = 1, a "final norm" that answers 0, token 0 = (1, 0).

    Block 1: A = 2 H = (2, 0), cosine 1; F = -H/3 of (3, 0) = (-1, 0), cosine -1; out (2, 0).
    Block 2: A = a quarter turn of (2, 0) = (0, 2), cosine 0; F = the same of (2, 2) = (-2, 2),
    cosine 0; out (0, 4).
    """
    turn = Times([0, 1], [-1, 0])
    first = ToyBlock(Times([2, 0], [0, 2]), Times([-1 / 3, 0], [0, -1 / 3]))
    toy = Toy(first, ToyBlock(turn, Times([0, 1], [-1, 0])))
    view = internal.internal_view(toy, torch.tensor([[0]]), None, torch.tensor([[1]]))
    assert view["cosine"]["attn"].tolist() == pytest.approx([1, 0], abs=1e-6)
    assert view["cosine"]["ffn"].tolist() == pytest.approx([-1, 0], abs=1e-6)
    assert view["l2_norm"]["layer_out"].tolist() == pytest.approx([2, 4])
    assert view["l2_norm"]["ffn_in"].tolist() == pytest.approx([3, 8 ** 0.5])
    found = view["entropy"]
    assert found["layer_out"].tolist() == pytest.approx([coin(2), coin(4)], abs=1e-6)
    assert found["ffn_in"].tolist() == pytest.approx([coin(3), math.log(2)], abs=1e-6)
    for values in view["final_norm"].values():
        assert values.tolist() == pytest.approx([math.log(2)] * 2)


def test_price_and_memory():
    """Five tokens meet the vocabulary 12 L = 48 times, never more than a chunk of two at once, in
    one forward pass."""
    model = random_model()
    rows = []
    passes = []
    model.lm_head.register_forward_hook(lambda _m, args, _o: rows.append(len(args[0])))
    model.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    internal.internal_view(model, IDS, None, MASK, chunk=2)
    assert sum(rows) == 5 * 48
    assert max(rows) == 2
    assert len(passes) == 1


def test_padding_on_the_left_changes_nothing():
    """Positions are relative (RoPE), so two hidden tokens before every row change nothing."""
    model = random_model()
    two = IDS[:, :2]
    nothing = torch.zeros_like(two)
    plain = internal.internal_view(model, IDS, None, MASK)
    attention = torch.cat([nothing, torch.ones_like(IDS)], 1)
    padded = internal.internal_view(model, torch.cat([two, IDS], 1), attention,
                                    torch.cat([nothing, MASK], 1))
    for quantity, streams in plain.items():
        for name, values in streams.items():
            found = padded[quantity][name].tolist()
            assert found == pytest.approx(values.tolist(), rel=1e-3, abs=1e-4), (quantity, name)


def test_samples_follow_softmax_of_the_layer(tokenizer):
    """20,000 first tokens of block 2 against softmax of layer_logits: chi-squared over the tokens
    that are due 20 times or more, within 5 sigma."""
    n = 20_000
    model = random_model("llama", vocab_size=len(tokenizer))
    model.lm_head.weight.data *= 0.1  # flat enough for many tokens to be expected
    part = internal.layer_policy(model, 2)
    rollout = sample(part, tokenizer, [PROMPTS[0]], n, 1, seed=1)
    logits = layer_logits(model, torch.tensor([PROMPTS[0]]), layer=2)[0, -1]        # (V,)
    expected = n * logits.double().softmax(-1)                                      # (V,)
    counts = torch.bincount(rollout.tokens[:, 0], minlength=len(expected)).double()  # (V,)
    often = expected >= 20
    chi2 = ((counts - expected)[often] ** 2 / expected[often]).sum()
    freedom = often.sum() - 1
    assert freedom > 20
    assert abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
def test_layer_policy_with_its_cache(kind, tokenizer):
    """Forty tokens sampled from block 2 through the cache, padded and shrinking, have the log-probs
    of a plain forward; blocks above do not run, and the model is afterwards what it was."""
    model = random_model(kind, vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = list(range(60, 90))
    ran = set()
    for number, block in enumerate(model.model.layers, 1):
        block.register_forward_hook(lambda _m, _a, _o, number=number: ran.add(number))
    part = internal.layer_policy(model, 2)
    rollout = sample(part, tokenizer, PROMPTS, n=8, max_new_tokens=40, seed=3)
    assert ran == {1, 2}
    assert 0 < rollout.finished.float().mean() < 1
    lengths = rollout.lengths.tolist()
    rows = zip(rollout.prompts, rollout.tokens, lengths, rollout.logp, strict=True)
    for prompt, tokens, k, logp in rows:
        ids = torch.tensor([prompt + tokens[:k].tolist()])
        logits = layer_logits(model, ids, layer=2)[0, len(prompt) - 1:-1]           # (k, V)
        plain = logits.log_softmax(-1).gather(-1, tokens[:k, None])[:, 0]           # (k,)
        assert (plain - logp[:k]).abs().max() < 1e-4
    assert len(model.model.layers) == 4
    assert type(model.model.norm) is not nn.Identity


def test_layer_policy_of_the_last_block_is_the_model(tokenizer):
    model = random_model(vocab_size=len(tokenizer))
    one = sample(model, tokenizer, PROMPTS, 2, 8, seed=0)
    two = sample(internal.layer_policy(model, 4), tokenizer, PROMPTS, 2, 8, seed=0)
    assert one.tokens.tolist() == two.tokens.tolist()
    for layer in (0, 5):
        with pytest.raises(ValueError, match="1..4"):
            internal.layer_policy(model, layer)


def test_rollouts_are_read_within_the_budget():
    """Answers of 6, 3, 2 and 1 tokens to prompts of 2: at most 8 tokens per row, so a budget of 17
    takes two rows in a forward pass and a budget of 1 one."""
    model = random_model()
    shapes = []
    rollout = rollout_of([[5, 6]] * 4, torch.tensor([6, 3, 2, 1]))
    model.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    internal.rollout_view(model, rollout, 17)
    internal.rollout_view(model, rollout, 1)
    assert shapes == [(2, 8), (2, 4), (1, 8), (1, 5), (1, 4), (1, 3)]


def test_rollout_view_pools_tokens(tokenizer):
    """All tokens: the same however they are split. Some: the mean over those that the seed draws,
    answers without one not run."""
    model = random_model(vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = list(range(60, 90))
    rollout = sample(model, tokenizer, PROMPTS, n=3, max_new_tokens=12, seed=0)
    lengths = rollout.lengths.tolist()
    assert len(set(lengths)) > 1
    per_token = []
    for prompt, tokens, k in zip(rollout.prompts, rollout.tokens.tolist(), lengths, strict=True):
        logits = layer_logits(model, torch.tensor([prompt + tokens[:k]]), layer=2)
        per_token.append(entropy(logits)[0, len(prompt) - 1:-1])
    per_token = torch.cat(per_token)                                                # (N,)

    whole = internal.rollout_view(model, rollout, 10_000)
    pieces = internal.rollout_view(model, rollout, 20, tokens=sum(lengths) + 5)
    found = whole["entropy"]["layer_out"][1].item()
    assert found == pytest.approx(per_token.mean().item(), abs=1e-4)
    for quantity, streams in whole.items():
        for name, values in streams.items():
            split = pieces[quantity][name].tolist()
            assert split == pytest.approx(values.tolist(), rel=1e-3, abs=1e-4), (quantity, name)

    ran = []
    model.model.layers[0].register_forward_hook(lambda _m, args, _o: ran.append(len(args[0])))
    some = internal.rollout_view(model, rollout, 30, tokens=4, seed=5)
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randperm(sum(lengths), generator=generator) < 4                   # (N,)
    found = some["entropy"]["layer_out"][1].item()
    assert found == pytest.approx(per_token[drawn].mean().item(), abs=1e-4)
    assert sum(ran) <= 4 < len(lengths)


def zero_entropies(L):
    names = [f"{name}_{side}" for name in ("attn", "ffn", "layer") for side in ("in", "out")]
    return {name: torch.zeros(L) for name in names}


def test_boundaries_move_with_the_tolerance():
    """FFN changes 1, 0.15, 0.03, -1: the run ends at 3 while 0.03 counts, at 2 while 0.15 does,
    then at 1. A fall counts for the largest change too: 0.3 is above 0.05 x 4, not 0.1 x 4."""
    rises = {**zero_entropies(4), "ffn_out": torch.tensor([1, 0.15, 0.03, -1])}
    assert internal.boundaries(rises) == {0.01: 3, 0.02: 3, 0.05: 2, 0.1: 2, 0.2: 1}
    falls = {**zero_entropies(4), "ffn_out": torch.tensor([0.3, -4, 0, 0])}
    assert internal.boundaries(falls) == {0.01: 1, 0.02: 1, 0.05: 1, 0.1: None, 0.2: None}
    assert set(internal.boundaries(zero_entropies(4)).values()) == {None}


@pytest.mark.parametrize("changes, marked, last", [((1, 0.5, -1), 2, False),
                                                   ((1, 0.5, 1), 3, True)])
def test_the_table_marks_the_boundary(changes, marked, last, capsys):
    """Entropies leave the blocks at 3, 4, 5 nats, the FFNs change them by these; with the final
    norm nothing rises."""
    streams = zero_entropies(3)
    read = {**streams, "layer_out": torch.tensor([3., 4, 5]), "ffn_out": torch.tensor(changes)}
    internal.print_view({"entropy": read, "final_norm": streams, "l2_norm": streams})
    lines = capsys.readouterr().out.splitlines()
    rows = lines[2:5]
    for number, (row, change) in enumerate(zip(rows, changes, strict=True), 1):
        assert row.split()[:4] == [str(number), "0", f"{number + 2:.3f}", f"{change:+.3f}"]
    assert [n for n, row in enumerate(rows, 1) if "<- boundary" in row] == [marked]
    assert ("whole model" in rows[marked - 1]) == last
    assert lines[-2].split()[-5:] == [str(marked)] * 5
    assert lines[-1].split()[-5:] == ["none"] * 5


def run(*argv):
    internal.main([*map(str, argv), "--device", "cpu"])


def test_the_command(tmp_path, capsys, tokenizer):
    """Two models of different depth into one set of figures: the table, a block's samples, and the
    numbers in the JSON. The same folder a second time is refused."""
    names = []
    for layers in (2, 3):
        folder = tmp_path / f"m{layers}"
        random_model("llama", vocab_size=len(tokenizer), layers=layers).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        names.append(str(folder))
    out = tmp_path / "out"
    small = "--samples 3 --max-new-tokens 12 --tokens 9 --sample-layer 2".split()
    run("--model", *names, *small, "--output", out)
    said = capsys.readouterr().out
    files = sorted(path.name for path in out.iterdir())
    assert files == ["changes.png", "cosines.png", "entropies.json", "flow.png"]
    for name in ("flow", "changes", "cosines"):
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    saved = json.loads((out / "entropies.json").read_text())
    assert list(saved["models"]) == names
    for L, view in zip((2, 3), saved["models"].values(), strict=True):
        assert (view["answers"], view["tokens"], view["vocabulary"]) == (3, 9, len(tokenizer))
        for quantity in ("entropy", "final_norm", "l2_norm", "cosine"):
            assert {len(values) for values in view[quantity].values()} == {L}
        assert f"{view['entropy']['layer_out'][L - 1]:.3f}" in said
    assert said.count("block 2 says") == 2
    assert "9 of their" in said
    with pytest.raises(SystemExit) as stop:
        run("--model", names[0], "--output", out)
    assert stop.value.code == 2
    assert "holds something already" in capsys.readouterr().err
    assert json.loads((out / "entropies.json").read_text()) == saved


@pytest.mark.parametrize("flags, says", [
    ("--samples 0", "at least 1"),
    ("--tokens -1", "at least 0"),
    ("--sample-layer 0", "at least 1"),
    ("--sample-layer 99", "has blocks 1"),
    ("--model nowhere/at/all", "no model in 'nowhere/at/all'"),
    ("--model tiny nowhere/at/all", "no model in 'nowhere/at/all'"),
    ("--model", "expected at least"),
    ("--data nothing.jsonl", "No such file"),
    ("--max-new-tokens 512", "--max-new-tokens leaves"),
    ("--sample 3", "unrecognized"),
    ("--output {file}", "holds something already"),
    ("--output {file}/sub", "file"),
    ("--model {gpt2}", "GPT2LMHeadModel is not supported"),
])
def test_bad_input_is_one_line_and_leaves_nothing(flags, says, tmp_path, capsys, tokenizer):
    file, gpt2 = tmp_path / "file", tmp_path / "gpt2"
    file.write_text("kept")
    if "{gpt2}" in flags:
        config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4)
        transformers.GPT2LMHeadModel(config).save_pretrained(gpt2)
        tokenizer.save_pretrained(gpt2)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:  # the later flag wins
        run("--output", tmp_path / "out", "--max-new-tokens", 8,
            *flags.format(file=file, gpt2=gpt2).split())
    errors = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert "error: " in errors[-1]
    assert says in errors[-1], errors
    assert sorted(tmp_path.rglob("*")) == before
    assert file.read_text() == "kept"
