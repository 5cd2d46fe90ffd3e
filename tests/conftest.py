"""Small random models of three architectures, and a folder in the hub's format."""
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # figures and equalities here are the CPU's
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers import Qwen2Config as Qwen2
from transformers import Qwen3Config as Qwen3

from common.sampling import Rollout

torch.set_num_threads(1)

# The shape of Qwen3's template: roles in marks; an empty think block opens an answer that is not
# to think.
QWEN3_LIKE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}")
SMALL = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=512, eos_token_id=1, pad_token_id=0, bos_token_id=None,
             initializer_range=0.3)


def random_model(kind="qwen3", vocab_size=97, layers=4, tie=False, seed=0, **options):
    """A transformers model in eval mode. kind: qwen3, qwen2, llama, or a class of configs."""
    if kind == "qwen3":
        options["head_dim"] = 8
    config = {"qwen3": Qwen3, "qwen2": Qwen2, "llama": LlamaConfig}.get(kind, kind)
    torch.manual_seed(seed)
    settings = config(**{**SMALL, "vocab_size": vocab_size, "num_hidden_layers": layers,
                         "tie_word_embeddings": tie, **options})
    return AutoModelForCausalLM.from_config(settings).eval()


def rollout_of(prompts, lengths, T=6):
    """Random answers of the given lengths, as the sampler would hand them over."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 97, (len(prompts), T), generator=generator)
    mask = (torch.arange(T) < lengths[:, None]).float()
    texts = [""] * len(prompts)
    nothing = torch.zeros_like(mask)
    return Rollout(prompts, tokens * mask.long(), lengths, nothing, nothing, lengths > 0,
                   texts)


def byte_level_tokenizer():
    """Byte-level BPE, trained here on a few lines, with Qwen's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<think>", "</think>"]
    lines = ["What is the sum of 12 and 30?",
             "Please reason step by step, and put your final answer within"]
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        chat_template=QWEN3_LIKE, model_max_length=512)


@pytest.fixture(scope="session", params=["qwen3", "qwen2", "llama"])
def model_folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = byte_level_tokenizer()
    model = random_model(request.param, len(tokenizer), tie=request.param == "qwen2")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
