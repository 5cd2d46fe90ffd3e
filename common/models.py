"""Models and tokenizers, all through transformers: the embedded one, a local folder, a hub id.

Weights that are trained are float32 and matrix products are bfloat16 on a GPU, by autocast, so
that torch's own AdamW will do: at lr 1e-6 only one bfloat16 weight in fifty would move at all.
"""
import contextlib
import os
import pathlib
import warnings

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from common.distributed import shard, size
from common.flags import BadInput

logging.disable_progress_bar()  # loading and saving take moments
warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # peft asks for it

TINY = pathlib.Path(__file__).parent / "tiny"
SMALL = 256  # hidden size up to which a model is of the embedded one's kind


def model_path(name):
    """`tiny`, a run's folder or a model's -> its path; owner/model is a hub id. BadInput for other
    names and for a folder of adapters."""
    folder = TINY if name == "tiny" else pathlib.Path(name)
    if (folder / "model").is_dir():
        folder = folder / "model"
    if not folder.exists() and name.count("/") != 1:
        raise BadInput(f"no model in {name!r}: give tiny, a folder, or a hub id: owner/model")
    if (folder / "adapter_config.json").is_file():
        raise BadInput(f"--model {name}: adapters alone; --merge writes a whole model, or give its "
                       "folder merged/")
    return folder.as_posix() if folder.exists() else name


def from_pretrained(loader, name, **kwargs):
    """loader.from_pretrained, errors in one line. Code that comes with a model is never run."""
    path = model_path(name)
    try:
        return loader.from_pretrained(path, trust_remote_code=False, **kwargs)
    except Exception as error:  # no network, unknown id, broken files: each library has its own
        hub = "" if pathlib.Path(path).exists() else " (no folder of this name, so a hub id)"
        raise BadInput(f"cannot load model {name!r}{hub}: {str(error).strip()}") from error


def load_config(name):
    """A model's configuration. BadInput if it does not say how many tokens the model takes."""
    config = from_pretrained(AutoConfig, name).get_text_config()
    if not hasattr(config, "max_position_embeddings"):
        raise BadInput(f"--model {name}: {config.model_type} is not supported: its config has no "
                       "max_position_embeddings")
    return config


def load_tokenizer(name):
    return from_pretrained(AutoTokenizer, name)


def pick_device(name):
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps` -> a device that is there. Raises BadInput."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"  # the one of this process
    try:
        device = torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {name}: {error}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # plans anew for each shape, and shapes differ
    return device


def load_model(args, trained=True, name=None, split=True):
    """args.model, or another name, as a transformers model on args.device, in eval mode.

    trained: weights in float32, or with args.lora_rank float32 adapters on a base in the compute
    dtype. Otherwise frozen, in the compute dtype. On several ranks the weights are split, unless
    split is False. Except on a CPU, the backward pass computes each block again, which takes
    1.2 times the time and a fraction of the memory. Raises BadInput.
    """
    name = name or args.model
    device = pick_device(args.device)
    by_device = "float32" if device.type == "cpu" else "bfloat16"
    compute = getattr(torch, by_device if args.dtype == "auto" else args.dtype)
    adapters = trained and args.lora_rank > 0
    stored = torch.float32 if trained and not adapters else compute
    model, report = from_pretrained(
        AutoModelForCausalLM, name,
        dtype=stored,
        use_safetensors=True,
        output_loading_info=True)
    missing = sorted(report["missing_keys"])
    if missing:
        raise BadInput(f"--model {name}: {len(missing)} weights are not in its files, {missing[0]} "
                       "for one")
    if not hasattr(model, "lm_head") or not hasattr(getattr(model, "model", None), "layers"):
        raise BadInput(f"{type(model).__name__} is not supported: it has no model.layers and "
                       "lm_head (Qwen2, Qwen3, Llama, Mistral and their kin have)")
    no_dropout(model)
    model.generation_config.do_sample = True  # without it transformers saves no temperature
    model.compute_dtype = compute
    model.adapters = []  # peft's wrapper, in a list so that it is no submodule
    model.requires_grad_(trained)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        spare = min(torch.get_num_threads(), max(1, os.cpu_count() - 1))
        small = model.config.hidden_size <= SMALL
        torch.set_num_threads(1 if small else spare)  # all wait for one whose core is taken
    if trained and device.type != "cpu":
        model.activation_checkpointing_enable({"use_reentrant": False})
    if size() == 1:
        model.to(device)
    if adapters:
        from peft import LoraConfig, get_peft_model  # slow to import
        rank = args.lora_rank
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        model.adapters.append(get_peft_model(model, config))  # changes the model in place
    if size() > 1 and split:
        shard(model, model.model.layers, device, compute)
        with torch.no_grad():  # the first forward tells FSDP which part is the root
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device))
        model.reshard()
    return model.eval()


def no_dropout(model):
    """Sampling has none, so training must not have it either, or the ratio is noise."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def compute_dtype(model):
    """Of matrix products: what load_model has set; of other models the weights' own."""
    return getattr(model, "compute_dtype", model.dtype)


def autocast(model):
    """`with autocast(model):` matrix products are in the compute dtype."""
    dtype = compute_dtype(model)
    return torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32)


def reference_model(args, model):
    """The model a run started from, for a KL, to be used inside `with adapters_off(reference):`.

    With adapters it is the model itself without them, and costs nothing.
    """
    return model if model.adapters else load_model(args, trained=False)


def adapters_off(model):
    """`with adapters_off(model):` it is its own base, if it has adapters."""
    if model.adapters:
        return model.adapters[0].disable_adapter()
    return contextlib.nullcontext()


def stop_ids(model, tokenizer):
    """Token ids that end an answer: the tokenizer's end token, the generation config's, and the one
    with which the chat template ends a turn."""
    named = model.generation_config.eos_token_id
    if not isinstance(named, list):
        named = [named]
    return sorted({tokenizer.eos_token_id, end_of_turn(tokenizer), *named} - {None})


def end_of_turn(tokenizer):
    """The special token that follows an assistant's turn in the chat template, if there is one."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    after = tokenizer(text.rpartition("ANSWER")[2], add_special_tokens=False)["input_ids"]
    if after and not tokenizer.decode(after[0], skip_special_tokens=True):
        return after[0]
    return None


def head_dim(config):
    """Width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def memory_estimate(model, batch):
    """One line: GiB that training takes with micro-batches of so many tokens, to within 15 %.

    Not counted: a second model (a reference, a critic), and sampling, which takes what is free, as
    rows_at_once says.
    """
    config = model.config
    item = compute_dtype(model).itemsize
    weights = model.get_memory_footprint() / size()
    trained = model.num_parameters(only_trainable=True) / size()
    adam = trained * (12 if item == 4 else 14)  # gradient, two moments, bfloat16 copy
    block = 9 * config.num_attention_heads * head_dim(config) + 4 * config.intermediate_size
    kept = config.num_hidden_layers * block  # numbers per token
    if model.is_activation_checkpointing:
        kept = config.num_hidden_layers * config.hidden_size + block
    activations = kept * item * batch
    activations += 20 * min(1 << 26, config.vocab_size * batch)  # a chunk of logits, five times
    return (f"memory, GiB: weights {weights / 2**30:.2f}, gradients and AdamW {adam / 2**30:.2f}, "
            f"activations {activations / 2**30:.2f}: about "
            f"{(weights + adam + activations) / 2**30:.2f}")


def rows_at_once(model, tokens):
    """How many answers of so many tokens are sampled at once: at most 512, and in 60 % of the
    memory that is free, on a CPU in 8 GiB."""
    config = model.config
    keys = config.num_hidden_layers * config.num_key_value_heads * head_dim(config) * tokens
    row = 2 * keys * compute_dtype(model).itemsize + 20 * config.vocab_size  # bytes
    room = 8 << 30
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
        room = 0.6 * torch.cuda.mem_get_info()[0]
    return max(1, min(512, int(room / row)))
