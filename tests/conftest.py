"""Small random models of three architectures, and a folder in the hub's format: model, byte-level tokenizer, chat template."""
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # figures and equalities here are the CPU's
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from common.sampling import Rollout

torch.set_num_threads(1)

# the shape of Qwen3's template: roles in marks, and without thinking an empty think block opens the answer
QWEN3_LIKE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}")


def random_model(kind: str, vocab_size: int = 97, layers: int = 4, tie: bool = False, seed: int = 0):
    torch.manual_seed(seed)
    config, model = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM),
                     "llama": (LlamaConfig, LlamaForCausalLM)}[kind]
    extra = {"attn_implementation": "grouped_sdpa", **({"head_dim": 8} if kind == "qwen3" else {})}
    built = model(config(vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=tie, eos_token_id=1, pad_token_id=0,
                         bos_token_id=None, initializer_range=0.3, **extra))
    return built.eval()


def rollout_of(prompts, lengths, T=6):
    """Random answers of the given lengths, as the sampler would hand them over."""
    tokens = torch.randint(2, 97, (len(prompts), T), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(T) < lengths[:, None]).float()
    return Rollout(prompts, tokens * mask.long(), lengths, mask, mask * 0, mask * 0, lengths > 0, [""] * len(prompts))


def byte_level_tokenizer():
    """Byte-level BPE, trained here on a few lines, with Qwen's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<think>", "</think>"]
    tokenizer.train_from_iterator(["What is the sum of 12 and 30?", "Please reason step by step, and put your final answer within"],
                                  trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False,
                                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   chat_template=QWEN3_LIKE, model_max_length=512)


@pytest.fixture(scope="session", params=["qwen3", "qwen2", "llama"])
def model_folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = byte_level_tokenizer()
    random_model(request.param, vocab_size=len(tokenizer), tie=request.param == "qwen2").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
