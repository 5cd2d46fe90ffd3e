"""What people import and copy: names, arguments in their order, defaults. A change here is a change
for them."""
import importlib
import inspect
from dataclasses import fields

import pytest

from common.sampling import Rollout

NAMES = {
    "grpo": [
        "group_advantages(rewards, eps=1e-06)", "rloo_advantages(rewards)",
        "minus_group_mean(rewards)", "reinforce_pp_advantages(rewards, lengths)",
        "grpo_loss(logp, old_logp, advantages, mask, clip_low=0.2, clip_high=0.2, dual_clip=None, "
        "denominator=None)",
        "kl_loss(logp, ref_logp, old_logp, mask, denominator)",
        "token_denominator(how, lengths, num_answers, num_tokens, max_new_tokens)"],
    "bupo": [
        "group_advantages(rewards, eps=1e-06)",
        "grpo_loss(logp, old_logp, advantages, mask, clip_low=0.2, clip_high=0.2, "
        "denominator=None)"],
    "kl3_grpo": [
        "group_advantages(rewards, eps=1e-06)", "kl3(log_ratio)",
        "clip_range(delta, measure='kl3')",
        "atr_grpo_loss(logp, old_logp, advantages, mask, delta=0.02, measure='kl3', "
        "denominator=None)"],
    "entropy_min": ["entropy_loss(logits, mask, temperature=0.5)", "accuracy_variance(correct)"],
    "long_cot_sft": ["sft_loss(logits, labels)", "reflection_rates(texts)"],
    "ppo": [
        "cosine_reward(correct, length, max_length, correct_range=(2.0, 1.0), "
        "wrong_range=(-10.0, 0.0), exceed=-10.0, margin=16)",
        "repetition_penalty(token_ids, ngram=40, penalty=-0.05)",
        "discounted_returns(rewards, gammas, mask)",
        "gae(rewards, values, mask, gamma=1.0, lam=1.0)",
        "ppo_loss(logp, old_logp, advantages, mask, clip_low=0.2, clip_high=0.2, "
        "denominator=None)",
        "value_loss(values, old_values, returns, mask, clip=0.2, denominator=None)"],
    "common.sampling": [
        "sample(model, tokenizer, prompts, n, max_new_tokens, temperature=1.0, top_p=1.0, "
        "seed=0, alone=False)"],
    "common.logprobs": [
        "token_logprobs(hidden, weight, targets, temperature=1.0, chunk=None)",
        "response_logprobs(model, rollout, temperature=1.0, trunk=None)",
        "old_logprobs(model, rollout, rows, budget, temperature=1.0, trunk=None)",
        "micro_batches(rollout, rows, budget)"],
    "common.internal_policy": [
        "layer_logits(model, input_ids, attention_mask=None, layer=None, final_norm=False)",
        "first_blocks(model, layer, final_norm=False)", "entropy(logits)",
        "internal_entropies(model, input_ids, attention_mask, mask)",
        "entropy_changes(entropies)", "boundary_layer(ffn_change, tolerance=0.05)"],
    "common.verify": [
        "extract_answer(text)", "equivalent(answer, gold)", "verify(text, gold)",
        "reward(text, gold)", "parses(gold)"],
    "common.data": [
        "load_problems(name, split='train', seed=0, count=None)",
        "encode_prompt(tokenizer, problem, system='')"],
    "common.evaluate": [
        "pass_at_k(n, c, k)",
        "evaluate(model, tokenizer, rows, reward, k, max_new_tokens, temperature=1.0, top_p=1.0, "
        "seed=0, system='')"],
}
SCRIPTS = ("grpo", "bupo", "kl3_grpo", "entropy_min", "long_cot_sft", "ppo")


@pytest.mark.parametrize("module, call", [
    (module, call) for module, calls in NAMES.items() for call in calls])
def test_names_people_import(module, call):
    name = call.partition("(")[0]
    function = getattr(importlib.import_module(module), name)
    shown = []
    for parameter in inspect.signature(function).parameters.values():
        has_none = parameter.default is parameter.empty
        shown.append(parameter.name if has_none else f"{parameter.name}={parameter.default!r}")
    assert f"{name}({', '.join(shown)})" == call


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_a_reward_of_text_and_row(script):
    """The one place to put one's own; it stands before all other functions of the file."""
    module = importlib.import_module(script)
    parameters = inspect.signature(module.reward).parameters.values()
    assert [parameter.name for parameter in parameters] == ["text", "row"]
    for answer, value in (("4.0", 1.0), ("5", 0.0)):
        assert module.reward(f"so \\boxed{{{answer}}}", {"answer": "4"}) == value
    own = [f for _, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == script]
    first = min(own, key=lambda function: inspect.getsourcelines(function)[1])
    assert first is module.reward


def test_a_rollout():
    names = [field.name for field in fields(Rollout)]
    assert names == ["prompts", "tokens", "lengths", "logp", "entropy", "finished", "texts"]
