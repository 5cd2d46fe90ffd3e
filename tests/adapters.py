"""Other libraries' losses, and our own of another signature, as tests/conformance.py calls them.

    python tests/conformance.py adapters:trl_loss --advantages adapters:trl_advantages
    python tests/conformance.py adapters:verl_loss --advantages adapters:verl_advantages

TRL: pip install trl. verl: pip install verl, whose functions here need no GPU. What is called is
the library's own code, with a stand-in for TRL's trainer.
"""
import contextlib
import io
import os
import tempfile
from collections import defaultdict
from types import SimpleNamespace

import torch

import grpo
import kl3_grpo
import ppo
from common.logprobs import token_logprobs


def kl3_ratio_loss(logp, old_logp, advantages, mask, denominator=None):
    """kl3_grpo.py with its gate on the ratio; delta 0.02 is 1 +- 0.2."""
    return kl3_grpo.atr_grpo_loss(logp, old_logp, advantages, mask, 0.02, "ratio", denominator)


def ppo_loss(logp, old_logp, advantages, mask, clip_low=0.2, clip_high=0.2, denominator=None):
    """ppo.py has an advantage per token."""
    spread = advantages[:, None].expand_as(logp)                        # (B, T)
    return ppo.ppo_loss(logp, old_logp, spread, mask, clip_low, clip_high, denominator)


def kl_loss(logp, ref_logp):
    return grpo.kl_loss(logp, ref_logp, logp.detach(), torch.ones_like(logp), logp.numel())


def logprobs(logits, tokens, temperature):
    """The states are the logits, so the unembedding is the identity."""
    identity = torch.eye(logits.shape[-1])
    logp, _ = token_logprobs(logits.flatten(0, 1), identity, tokens.flatten(), temperature)
    return logp.view_as(tokens)


def trl_loss(logp, old_logp, advantages, mask, clip_low=0.2, clip_high=0.2, dual_clip=None,
             denominator=None, loss_type="dapo", ref_logp=None, unbiased_kl=True):
    """GRPOTrainer._compute_loss; loss_type "dapo" is its default."""
    from trl import GRPOTrainer
    accelerator = SimpleNamespace(
        num_processes=1,
        gather=lambda x: x,
        reduce=lambda x, reduction: x)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp), None),
        args=SimpleNamespace(
            delta=dual_clip, steps_per_generation=1, use_bias_correction_kl=unbiased_kl),
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        loss_type=loss_type,
        epsilon_low=clip_low,
        epsilon_high=clip_high,
        beta=0.0 if ref_logp is None else 1.0,
        max_completion_length=logp.shape[1],
        current_gradient_accumulation_steps=1,
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)})
    tokens = torch.zeros_like(logp, dtype=torch.long)
    count = mask.sum() if denominator is None else torch.tensor(float(denominator))
    return GRPOTrainer._compute_loss(trainer, None, {
        "prompt_ids": tokens,
        "prompt_mask": mask,
        "completion_ids": tokens,
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old_logp,
        "ref_per_token_logps": ref_logp,
        "num_items_in_batch": count})


def trl_loss_grpo(logp, old_logp, advantages, mask, clip_low=0.2, clip_high=0.2, dual_clip=None):
    """loss_type "grpo": per answer first. It has no denominator of the caller's."""
    return trl_loss(logp, old_logp, advantages, mask, clip_low, clip_high, dual_clip,
                    loss_type="grpo")


def trl_kl(logp, ref_logp, unbiased=True):
    """The KL term alone: beta 1 and no advantage. unbiased: use_bias_correction_kl, its default."""
    return trl_loss(logp, logp.detach(), torch.zeros(len(logp)), torch.ones_like(logp),
                    ref_logp=ref_logp, unbiased_kl=unbiased)


def trl_kl_uncorrected(logp, ref_logp):
    return trl_kl(logp, ref_logp, unbiased=False)


def trl_logprobs(logits, tokens, temperature):
    from trl.trainer.utils import selective_log_softmax
    return selective_log_softmax(logits, tokens, temperature)


def trl_advantages(rewards):
    """One step of a GRPOTrainer on the embedded model whose reward function gives `rewards`."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from common.models import load_model, load_tokenizer
    device = SimpleNamespace(model="tiny", device="cpu", dtype="float32", lora_rank=0)
    given = rewards.flatten().tolist()
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
        config = GRPOConfig(
            place, max_steps=1, per_device_train_batch_size=len(given),
            num_generations=rewards.shape[1], max_completion_length=2, use_cpu=True, bf16=False,
            gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True)
        trainer = GRPOTrainer(
            load_model(device), lambda completions, **_: given, config,
            train_dataset=Dataset.from_list([{"prompt": "1+1"}] * len(rewards)),
            processing_class=load_tokenizer("tiny"))
        trainer.train()
    return torch.tensor(list(trainer._logs["advantages"]))


def verl_loss(logp, old_logp, advantages, mask, clip_low=0.2, clip_high=0.2, dual_clip=None,
              denominator=None):
    """compute_policy_loss_vanilla with token-mean; its dual clip, always on, far away if None."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import ActorConfig
    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=clip_low,
        clip_ratio_high=clip_high, clip_ratio_c=dual_clip or 1e9,
        global_batch_info={"batch_num_tokens": denominator})
    spread = advantages[:, None].expand_as(logp)                        # (B, T)
    vanilla = get_policy_loss_fn("vanilla")
    return vanilla(old_logp, logp, spread, mask, "token-mean", config)


def verl_advantages(rewards):
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage
    P, G = rewards.shape
    scores = rewards.reshape(P * G, 1).clone()                          # one token per answer
    groups = torch.arange(P).repeat_interleave(G).numpy()
    return compute_grpo_outcome_advantage(scores, torch.ones(P * G, 1), groups)[0]


def verl_kl(logp, ref_logp):
    """kl_loss_type low_var_kl, the default: k3."""
    from verl.trainer.ppo.core_algos import kl_penalty
    return kl_penalty(logp, ref_logp, "low_var_kl")


def verl_kl_plus(logp, ref_logp):
    """kl_loss_type k3+: the value of k3, the gradient of k2."""
    from verl.trainer.ppo.core_algos import kl_penalty
    return kl_penalty(logp, ref_logp, "k3+")
