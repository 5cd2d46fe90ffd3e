"""What people import and copy: names, arguments in their order, defaults. A change here is a change for them."""
import importlib
import inspect

import pytest

NAMES = {
    "grpo": ["group_advantages(rewards, eps=1e-06)", "rloo_advantages(rewards)",
             "grpo_loss(logp, old_logp, advantages, mask, clip_low=0.2, clip_high=0.2, dual_clip=None, denominator=None)"],
    "kl3_grpo": ["kl3(log_ratio)", "clip_range(delta, measure='kl3')",
                 "atr_grpo_loss(logp, old_logp, advantages, mask, delta=0.02, measure='kl3', denominator=None, window=None, divergence=None)"],
    "entropy_min": ["entropy_loss(logits, mask, temperature=0.5)", "accuracy_variance(correct)",
                    "answer_entropies(model, rollout, temperature, offset=0)",
                    "logit_statistics(model, rollout, budget, temperature=0.6, top_k=50)"],
    "long_cot_sft": ["sft_loss(logits, labels)", "reflection_rates(texts)"],
    "ppo": ["cosine_reward(correct, length, max_length, correct_range=(2.0, 1.0), wrong_range=(-10.0, 0.0), exceed=-10.0, margin=16)",
            "classic_reward(correct, length, max_length, exceed=None, margin=16)", "too_long(length, max_length, margin=16)",
            "repetition_penalty(token_ids, ngram=40, penalty=-0.05)", "discounted_returns(rewards, gammas, mask)",
            "gae(rewards, values, mask, gamma=1.0, lam=1.0)",
            "ppo_loss(logp, old_logp, advantages, mask, clip_low=0.2, clip_high=0.2, dual_clip=None, denominator=None)",
            "value_loss(values, old_values, returns, mask, clip=0.2, denominator=None)"],
    "common.sampling": ["sample(model, tokenizer, prompts, n, max_new_tokens, temperature=1.0, top_p=1.0, seed=0, max_rows=None, "
                        "repetition_penalty=1.0, alone=False, graphs=None)"],
    "common.logprobs": ["token_logprobs(hidden, weight, targets, temperature=1.0, chunk=None, entropy_grad=False)",
                        "response_logprobs(model, rollout, temperature=1.0, layer=None, final_norm=False)",
                        "exact_kl(model, old_states, old_weight, rollout, temperature=1.0, chunk=None)"],
    "common.internal_policy": ["layer_logits(model, input_ids, attention_mask=None, layer=None, final_norm=False)", "entropy(logits)",
                               "internal_entropies(model, input_ids, attention_mask, mask, chunk=None)",
                               "entropy_changes(entropies)", "boundary_layer(ffn_change, tolerance=0.05)"],
    "common.verify": ["extract_answer(text)", "equivalent(answer, gold)", "reward(text, gold)"],
    "common.evaluate": ["pass_at_k(n, c, k)"],
}


@pytest.mark.parametrize("module, call", [(module, call) for module, calls in NAMES.items() for call in calls])
def test_names_people_import(module, call):
    name = call.partition("(")[0]
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters.values()
    shown = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
    assert f"{name}({', '.join(shown)})" == call
