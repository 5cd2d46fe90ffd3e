"""Models and tokenizers, all through transformers: the embedded one, a local folder or a hub id; and what memory a run needs."""
import contextlib
import math
import os
import pathlib
import sys

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

from common.distributed import shard, size
from common.errors import BadInput

logging.disable_progress_bar()  # loading and saving take moments; the bars would break up a run's own

TINY = pathlib.Path(__file__).parent / "tiny"
SHARE = 0.75  # of the free memory, for answers that are being sampled
LOGIT_BYTES = 20  # of a logit while sampling: log-softmax, probabilities and entropy in float32, the running sum in float64


def grouped_sdpa(module, query, key, value, attention_mask, **kwargs):
    """transformers' sdpa, but where one new token looks back through a mask, the heads of its query (B, H, 1, D) that share a
    head of keys are read as positions of one head, so that the cache (B, H_kv, S, D) is not copied for each of them.
    transformers does so by itself from 5.23 on.
    """
    B, H, T, D = query.shape
    if T > 1 or attention_mask is None:
        if query.dtype == torch.float32 and query.device.type != "cpu":  # with fewer heads of keys it would build all scores
            module, key, value = None, *(x.repeat_interleave(H // x.shape[1], 1) for x in (key, value))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("sliding_window"):  # the mask is the sampler's and knows of no window: the last so many that are visible
        attention_mask = attention_mask & (attention_mask.flip(-1).cumsum(-1).flip(-1) <= kwargs["sliding_window"])
    grouped = query.reshape(B, key.shape[1], -1, D)                                     # (B, H_kv, H / H_kv, D)
    out = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, attention_mask, scale=kwargs.get("scaling"))
    return out.reshape(B, 1, H, -1), None


AttentionInterface.register("grouped_sdpa", grouped_sdpa)
AttentionMaskInterface.register("grouped_sdpa", sdpa_mask)


def model_path(name: str) -> str:
    """`tiny`, a model's or a run's folder -> its path; other names are hub ids. BadInput for a path that is not there."""
    if name == "tiny":
        return str(TINY)
    for folder in (pathlib.Path(name), pathlib.Path(name) / "model"):
        if (folder / "config.json").is_file() and (folder / "tokenizer_config.json").is_file():
            return str(folder)
    if pathlib.Path(name).exists() or name.startswith((".", "/", "~", "runs/")) or name.count("/") > 1:
        raise BadInput(f"no model in {name!r}: a model folder holds config.json, tokenizer files and *.safetensors "
                       "(write tiny for the embedded model, or a hub id such as Qwen/Qwen3-4B)")
    return name


def _from_pretrained(loader, name: str, **kwargs):
    """loader.from_pretrained, with what can go wrong in one line. No code that comes with a model is ever run."""
    path = model_path(name)
    try:
        return loader.from_pretrained(path, trust_remote_code=False, **kwargs)
    except Exception as error:  # unreachable hub, unknown id, broken or foreign files: tokenizers and safetensors raise their own
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise BadInput(f"cannot load model {name!r}: {reason[:300]}") from error


def is_small(name: str) -> bool:
    """Whether a model is of the embedded one's kind, so that flags take their small defaults: hidden size at most 256."""
    return name == "tiny" or getattr(_from_pretrained(AutoConfig, name), "hidden_size", 1 << 20) <= 256


def pick_device(device: str) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps` -> a device that is there; a card becomes the current one."""
    if device == "auto":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.empty(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {device}: {str(error).splitlines()[0]}") from error
    if place.type == "cuda":
        torch.cuda.set_device(place)  # recordings and counters are the current one's
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every shape, and micro-batches differ
    return place


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has none (Apple's)."""
    try:
        return torch.empty(0, dtype=torch.float64, device=device).dtype
    except (TypeError, RuntimeError):
        return torch.float32


def pick_threads(small: bool) -> None:
    """One thread for a small model on the CPU, torch's own choice otherwise.

    Matrices of 128 x 96 are too small to split. Of two cores, two threads win 5 % while the machine is idle, and take 3.4 times
    as long as one when another program holds a core: every product then waits for a thread that is not scheduled
    (tests/benchmarks/threads.py).
    """
    if small:
        torch.set_num_threads(1)


def load_tokenizer(name: str):
    return _from_pretrained(AutoTokenizer, name)


def refuse_foreign(config) -> None:
    """BadInput for a model that would not be sampled as it is trained: layers without keys, capped scores, angles by length."""
    ropes = getattr(config, "rope_parameters", None) or {}
    found = [kind for kind in getattr(config, "layer_types", None) or () if kind not in ("full_attention", "sliding_attention")]
    found += ["attn_logit_softcapping"] if getattr(config, "attn_logit_softcapping", None) else []
    if config.model_type in ("qwen2_moe", "phimoe", "doge", "blt") and getattr(config, "sliding_window", None):
        found.append("sliding_window")  # which these do not tell their attention
    found += [rope["rope_type"] for rope in (ropes, *ropes.values()) if isinstance(rope, dict)
              and rope.get("rope_type") in ("longrope", "dynamic")]
    if found:
        raise BadInput(f"{config.model_type} is not supported: {found[0]} (Qwen2, Qwen3, Llama, Mistral and their kin are)")


def load_model(name: str, device: str = "auto", dtype: str = "auto", lora_rank: int = 0, adapter: str | None = None,
               split: bool = True, cuda_graphs: bool = False, frozen: bool = False):
    """-> model in eval mode, on its device.

    dtype `auto` is float32 on the CPU and bfloat16 elsewhere; the optimiser keeps float32 masters of bfloat16 weights.
    lora_rank > 0 wraps all linear maps of the blocks with peft and leaves only the adapters trainable; `adapter` is the folder
    of a saved one to go on from. On several ranks the weights are split over them, unless the caller does that. cuda_graphs:
    sample() replays recorded steps of it. frozen: no weight is trained. Raises BadInput for a model or a device that is not
    there, or for a model of another kind.
    """
    place = pick_device(device)
    if cuda_graphs and (place.type != "cuda" or size() > 1):  # FSDP's streams would be caught in a recording and never leave it
        raise BadInput(f"--cuda-graphs: the device is {place} and there are {size()} processes; it needs a CUDA device and one")
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(dtype) or (
        torch.float32 if place.type == "cpu" else torch.bfloat16)
    model = _from_pretrained(AutoModelForCausalLM, name, dtype=dtype, attn_implementation="grouped_sdpa", use_safetensors=True)
    refuse_foreign(model.config)
    model.requires_grad_(not frozen)
    if size() == 1:
        model.to(place)
    if lora_rank:  # adapters in the model's dtype, as they have float32 masters: peft would compute with them in float32
        from peft import LoraConfig, PeftModel, get_peft_model
        model = (PeftModel.from_pretrained(model, adapter, is_trainable=True, autocast_adapter_dtype=False) if adapter else
                 get_peft_model(model, LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear"),
                                autocast_adapter_dtype=False))
    pick_threads(place.type == "cpu" and model.config.hidden_size <= 256)
    causal_lm(model).cuda_graphs = cuda_graphs
    if model.config.hidden_size > 256:  # the name has changed in transformers 5.2x
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if size() > 1 and split:
        lm = causal_lm(model)
        shard(lm, lm.model.layers, place, dtype)
        with torch.no_grad():
            lm(input_ids=torch.zeros(1, 1, dtype=torch.long, device=place))
        lm.reshard()
    return model.eval()


def initial_model(cfg, model):
    """The model a run started from, frozen, as the reference of a KL -> a function that opens it: `with reference() as initial`.

    With adapters it is the model itself, adapters off, and costs nothing; otherwise --model is loaded a second time, so that a
    resumed run has the same reference.
    """
    if hasattr(model, "disable_adapter"):
        @contextlib.contextmanager
        def adapters_off():
            with model.disable_adapter():
                yield model
        return adapters_off
    frozen = load_model(cfg.model, cfg.device, cfg.dtype, frozen=True)
    return lambda: contextlib.nullcontext(frozen)


def causal_lm(model):
    """The transformers model itself, also when peft has wrapped it (adapters stay in place): has .model and .lm_head."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(model, "lm_head") or not hasattr(getattr(model, "model", None), "layers"):
        raise BadInput(f"{type(model).__name__} is not supported: need model.model.layers, model.model.norm and model.lm_head "
                       "(Qwen2, Qwen3, Llama, Mistral and their kin)")
    return model


def stop_ids(model, tokenizer) -> list[int]:
    """Token ids that end an answer: the tokenizer's end token and all that the model's generation config names."""
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return sorted({i for i in [tokenizer.eos_token_id, *named] if i is not None})


def memory_plan(model, rows: int, tokens: int, micro_batch_tokens: int, max_rows: int | None = None, frozen: int = 0,
                offload: bool = False, critic: bool = False) -> dict[str, float]:
    """GiB that a step will hold at its peak, by part. rows x tokens is a rollout, of which max_rows are decoded at once (default:
    as many as sample() will take once the moments and the other models are there).

    Weights, masters and moments stay, and so do `frozen` more models (a reference) and, with `critic`, a second trunk that is
    trained like the first; of the cache (sampling) and of gradients with activations (training) only the larger counts.
    On N ranks it is the plan of each: all in N parts, but for weights while they are gathered. offload: what the optimiser
    holds is on the CPU.
    """
    config, lm = model.config, causal_lm(model)
    numel = {p: p.numel() for p in lm.parameters()}
    trained = sum(n for p, n in numel.items() if p.requires_grad)
    item, N = (getattr(lm, "narrow", None) or next(lm.parameters()).dtype).itemsize, size()
    trunk = {p: numel[p] for p in lm.model.parameters()} if critic else {}
    learns = sum(n for p, n in trunk.items() if p.requires_grad)
    master = 4 if item < 4 or N > 1 or offload else 0
    # a checkpointed block keeps its input; one block at a time keeps everything: about 12 widths and 4 of the inner width
    block = (12 * config.hidden_size + 4 * config.intermediate_size) * item
    checkpointed = config.hidden_size > 256
    kept = config.num_hidden_layers * (config.hidden_size * item if checkpointed else block)
    activation_token = (1 + critic) * kept + checkpointed * block
    plan = {
        "weights": sum(numel.values()) * item,
        "reference": frozen * sum(numel.values()) * item / N,
        "frozen weights at rest": (sum(numel.values()) - trained) * item / N if N > 1 else 0,
        "critic": sum(n for p, n in trunk.items() if N == 1 or not p.requires_grad) * item / N,
        "float32 masters": master * (trained + learns) / N,
        "gradients": 4 * (trained + learns) / N,
        "Adam moments": 8 * (trained + learns) / N,
        "cache and logits while sampling": row_bytes(model, tokens),
        "activations": activation_token * min(micro_batch_tokens, rows * tokens),
        "logits chunk": 6 * 4 * min(1 << 26, config.vocab_size * micro_batch_tokens),  # softmax, and gradients of both uses of it
    }
    coming = plan["reference"] + plan["critic"] + (N > 1) * plan["weights"]
    if offload and next(lm.parameters()).device.type != "cpu":
        held = [plan.pop(name) for name in ("float32 masters", "gradients", "Adam moments")]
        print(f"in the CPU's memory, GiB: masters, gradients and moments {sum(held) / 2**30:.1f}")
    else:
        coming += plan["Adam moments"] + master * learns / N
    plan["cache and logits while sampling"] *= min(rows, max_rows or max_rows_for(model, tokens, coming))
    of_block = sum(numel[p] for p in lm.model.layers[0].parameters()) * item
    sampling = plan["cache and logits while sampling"]
    training = plan.get("gradients", 0) + plan["activations"] + plan["logits chunk"]
    if N > 1:  # while training, a block and the next are gathered
        training -= (config.num_hidden_layers - 2) * of_block
    stay = ("weights", "reference", "critic", "frozen weights at rest", "float32 masters", "Adam moments")
    plan["peak"] = sum(plan.get(name, 0) for name in stay) + max(sampling, training)
    return {name: value / 2**30 for name, value in plan.items()}


def row_bytes(model, tokens: int) -> int:
    """What an answer of `tokens` tokens, prompt included, takes while it is sampled: keys and values, and a token's logits."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    item = (getattr(causal_lm(model), "narrow", None) or next(model.parameters()).dtype).itemsize
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * tokens * item + LOGIT_BYTES * config.vocab_size


def max_rows_for(model, tokens: int, coming: float = 0.0) -> int:
    """How many answers of `tokens` tokens are decoded at once: cache and logits take at most a SHARE of what is free (8 GiB on a
    CPU) once what is `coming`, in bytes, is there. While the cache is moved, two of its layers come on top."""
    device = next(model.parameters()).device
    free, card = (8 << 30) / SHARE, torch.get_device_module(device)
    if hasattr(card, "mem_get_info"):  # what torch has reserved but not handed out is free as well
        free = card.mem_get_info(device)[0] + card.memory_reserved(device) - card.memory_allocated(device) - coming
    return max(1, min(512, math.floor(SHARE * free / row_bytes(model, tokens))))


def peak_bytes() -> float:
    """The most memory so far: of the GPU if there is one, else the resident set; NaN on Windows."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if os.name == "nt":
        return math.nan
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
