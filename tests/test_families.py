"""Families of models: tiny random ones are sampled and trained as their own forward, or refused.

The sampler's log-probs, the trainer's and the model's own forward are three ways to one number.
"""
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import byte_level_tokenizer
from transformers import AutoModelForCausalLM

from common.flags import BadInput
from common.logprobs import check_model, response_logprobs
from common.models import load_model
from common.sampling import sample

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320,
         "max_position_embeddings": 128, "eos_token_id": 1, "pad_token_id": 0,
         "bos_token_id": None, "initializer_range": 0.3}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
       "decoder_sparse_step": 1}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
       "v_head_dim": 8, "num_key_value_heads": 4, "moe_intermediate_size": 16,
       "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
          "linear_value_head_dim": 8}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 320,
             "global_head_dim": 16, "num_kv_shared_layers": 0}
TOWERS = {"text_config": {**SHAPE, "head_dim": 8}, "mm_tokens_per_image": 4,
          "vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
                            "num_attention_heads": 4, "image_size": 28, "patch_size": 14}}
FAMILIES = {
    "Llama": {}, "Mistral": {}, "Qwen2": {}, "Qwen3": {"head_dim": 8},
    "Qwen3Moe": {"head_dim": 8, **MOE}, "SmolLM3": {}, "Phi3": {}, "Olmo2": {},
    "Glm4": {"head_dim": 8}, "Gemma3Text": {"head_dim": 8, "sliding_window": 16},
    "Mixtral": {}, "GptOss": {"head_dim": 8, "num_local_experts": 4}, "Olmo3": {}, "SeedOss": {},
    "Ernie4_5": {}, "HunYuanDenseV1": {"head_dim": 8}, "Starcoder2": {}, "StableLm": {},
    "DeepseekV3": MLA,
}
SCALE = "its own forward differs by"
REFUSED = {
    "Granite": ({"logits_scaling": 8.0}, SCALE),
    "Cohere": ({"logit_scale": 0.0625}, SCALE),
    "Cohere2": ({"logit_scale": 0.0625}, SCALE),
    "NanoChat": ({}, SCALE),  # a cap
    "Gemma2": ({"head_dim": 8, "final_logit_softcapping": 5.0}, SCALE),
    "Gemma3Text": ({"head_dim": 8, "final_logit_softcapping": 5.0}, SCALE),
    "MiniCPM3": (MLA, SCALE),
    "Phi": ({}, SCALE),  # a bias
    "Qwen3_5Text": ({"head_dim": 8, **LINEAR}, "LinearAttention"),
    "Gemma4Text": ({"head_dim": 8, **PER_LAYER}, "per-layer attribute"),
    "Gemma3": (TOWERS, "Gemma3ForConditionalGeneration is not supported"),
}


def build(family: str, options: dict):
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **options})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if getattr(getattr(model, "lm_head", None), "bias", None) is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    model.generation_config.eos_token_id = 1
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_one_function_three_ways(family):
    """Prompts of 9 and 3 tokens, so the sampler pads; 1e-4 nats in float32. `pytest -s` prints the
    largest difference."""
    model = build(family, FAMILIES[family])
    prompts = [list(range(20, 29)), [40, 41, 42]]
    check_model(model, byte_level_tokenizer(), prompts[0])
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
def test_what_would_be_another_function_is_refused(family):
    """A scaled, capped or biased output, a cache without keys and values, several towers."""
    options, line = REFUSED[family]
    with pytest.raises(BadInput, match=line):
        check_model(build(family, options), byte_level_tokenizer(), [20, 21, 22])
    if line == SCALE:  # its forward is what is sampled, so it can be evaluated
        check_model(build(family, options), byte_level_tokenizer(), [20, 21, 22], trained=False)


def test_several_towers_are_refused_at_load(tmp_path):
    """Gemma 3's shape with its sizes in text_config alone, as on the hub."""
    config = transformers.Gemma3Config(**TOWERS)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    args = SimpleNamespace(model=str(tmp_path), device="cpu", dtype="auto", lora_rank=0)
    with pytest.raises(BadInput, match="no model.layers and lm_head"):
        load_model(args)


def test_a_tokenizer_of_another_model_is_refused():
    """Token 320 of a vocabulary of 0 to 319."""
    with pytest.raises(BadInput, match="another model's: the prompt has the token 320"):
        check_model(build("Llama", {}), byte_level_tokenizer(), [20, 320])


def test_the_same_function_in_another_parametrisation_is_refused():
    """Llama as Granite: its unembedding times 8, its logits divided by 8 are the same function,
    which would be trained as one of logits 8 times as large. In bfloat16, too."""
    for dtype in (torch.float32, torch.bfloat16):
        model = build("Granite", {"logits_scaling": 8.0, "tie_word_embeddings": False}).to(dtype)
        with torch.no_grad():
            model.lm_head.weight *= 8
        with pytest.raises(BadInput, match=SCALE):
            check_model(model, byte_level_tokenizer(), [20, 21, 22])
