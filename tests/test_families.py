"""Families of models: tiny random ones are sampled and trained as their own forward, or refused.

The sampler's log-probs, the trainer's and the model's own forward are three ways to one number.
"""
import pytest
import torch
import transformers
from conftest import byte_level_tokenizer
from transformers import AutoModelForCausalLM

from common.flags import BadInput
from common.logprobs import response_logprobs
from common.models import check_head
from common.sampling import sample

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320,
         "max_position_embeddings": 128, "eos_token_id": 1, "pad_token_id": 0,
         "bos_token_id": None, "initializer_range": 0.3}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
       "decoder_sparse_step": 1}
FAMILIES = {
    "Llama": {}, "Mistral": {}, "Qwen2": {}, "Qwen3": {"head_dim": 8},
    "Qwen3Moe": {"head_dim": 8, **MOE}, "SmolLM3": {}, "Phi3": {}, "Olmo2": {},
    "Glm4": {"head_dim": 8}, "Gemma3Text": {"head_dim": 8, "sliding_window": 16},
}
REFUSED = {
    "Granite": {"logits_scaling": 8.0},
    "Cohere": {"logit_scale": 0.0625},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 5.0},
    "Phi": {},  # a bias in the output head
}


def build(family: str, options: dict):
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **options})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if getattr(model.lm_head, "bias", None) is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    model.generation_config.eos_token_id = 1
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_one_function_three_ways(family):
    """Prompts of 9 and 3 tokens, so the sampler pads; 1e-4 nats in float32."""
    model = build(family, FAMILIES[family])
    check_head(model)
    prompts = [list(range(20, 29)), [40, 41, 42]]
    rollout = sample(model, byte_level_tokenizer(), prompts, 2, 24, seed=3)
    trained = response_logprobs(model, rollout)                                 # (B, T)
    largest = (rollout.logp - trained).abs().max().item()
    for row, prompt in enumerate(rollout.prompts):
        length = int(rollout.lengths[row])
        ids = torch.tensor([prompt + rollout.tokens[row, :length].tolist()])    # (1, S)
        own = model(input_ids=ids).logits[0].log_softmax(-1)                    # (S, V)
        predicting = own[len(prompt) - 1:-1]                                    # (length, V)
        own = predicting.gather(1, ids[0, len(prompt):, None])[:, 0]            # (length,)
        largest = max(largest, (own - trained[row, :length]).abs().max().item())
    print(f"| {family} | {largest:.1g} |")
    assert largest < 1e-4


@pytest.mark.parametrize("family", REFUSED)
def test_a_head_that_does_more_is_refused(family):
    with pytest.raises(BadInput, match="is not supported"):
        check_head(build(family, REFUSED[family]))
