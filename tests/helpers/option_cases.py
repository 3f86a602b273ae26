"""The options, models, adapters and subclasses whose scores are compared with autograd; see options.py."""

from __future__ import annotations

import importlib.util
import random
from typing import Any

import torch
from datasets import Dataset
from peft import (
    BOFTConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
)
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from helpers import own_trainers as own
from helpers import vision
from helpers.options import Case
from helpers.worlds import made, make_config, make_tokenizer, pairs, words

DPO_LOSSES = ("hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
              "apo_down", "discopop", "sft", "sigmoid_norm")  # fmt: skip
GRPO_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


def completions(n: int) -> Dataset:
    rng = random.Random(0)
    return Dataset.from_list(
        [{"prompt": words(rng, 2, 6) + " ", "completion": words(rng, 2, 6)} for _ in range(n)]
    )


def chats(n: int) -> Dataset:
    rng = random.Random(0)
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": role, "content": words(rng, 2, 4)}
                    for role in ("user", "assistant", "user", "assistant")
                ]
            }
            for _ in range(n)
        ]
    )


def margins(n: int) -> Dataset:
    return pairs(n).add_column("margin", [i / n for i in range(n)])


def conversation_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }} {% endgeneration %}"
        "{% else %}{{ message.content }} {% endif %}{% endfor %}"
    )
    return tokenizer


def _sized(config: type, model: type, **more: Any) -> Any:
    def make(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> nn.Module:
        return made(model, make_config(tokenizer, config, intermediate_size=48, head_dim=8, **more), seed)

    return make


mixtral = _sized(MixtralConfig, MixtralForCausalLM, num_local_experts=4, num_experts_per_tok=2)
qwen_moe = _sized(
    Qwen3MoeConfig, Qwen3MoeForCausalLM, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
    decoder_sparse_step=1,
)  # fmt: skip
gpt_oss = _sized(
    GptOssConfig, GptOssForCausalLM, num_local_experts=4, num_experts_per_tok=2, sliding_window=4
)
sliding = _sized(
    Gemma3TextConfig, Gemma3ForCausalLM, sliding_window=4,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"], query_pre_attn_scalar=8,
)  # fmt: skip


def tied(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = make_config(tokenizer)
    config.tie_word_embeddings = True
    return LlamaForCausalLM(config)


def dropping(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = make_config(tokenizer)
    config.attention_dropout = 0.3
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config)


def resized(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> nn.Module:
    model = tied(tokenizer, seed)
    model.resize_token_embeddings(len(tokenizer) + 9, mean_resizing=False)
    return model


def double_loss_of_a_part(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """A user's compute_loss_func: cross entropy of every second token, twice."""
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    losses = nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    return 2 * losses[::2].sum() / num_items_in_batch


DPO = [
    Case("defaults", "DPO"),
    *(Case(f"loss_type={name}", "DPO", {"loss_type": [name], "label_smoothing": 0.1 if name in ("robust", "exo_pair") else 0.0})
      for name in DPO_LOSSES),
    Case("several losses combined", "DPO", {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}),
    Case("ld_alpha", "DPO", {"ld_alpha": 0.5}),
    Case("use_weighting", "DPO", {"use_weighting": True}),
    *(Case(f"f_divergence_type={name}", "DPO", {"f_divergence_type": name, "beta": 0.01})
      for name in ("forward_kl", "js_divergence", "alpha_divergence")),
    Case("label_smoothing", "DPO", {"label_smoothing": 0.2}),
    Case("precompute_ref_log_probs", "DPO", {"precompute_ref_log_probs": True}),
    Case("sync_ref_model", "DPO", {"sync_ref_model": True, "ref_model_sync_steps": 1}),
    Case("max_length", "DPO", {"max_length": 7}),
    Case("pad_to_multiple_of", "DPO", {"pad_to_multiple_of": 8}),
    Case("padding_free (switched off by TRL)", "DPO", {"padding_free": True}),
]  # fmt: skip

KTO = [
    Case("defaults", "KTO"),
    Case("loss_type=apo_zero_unpaired", "KTO", {"loss_type": "apo_zero_unpaired"}),
    Case("desirable_weight, undesirable_weight", "KTO", {"desirable_weight": 1.5, "undesirable_weight": 0.5}),
    Case("precompute_ref_log_probs", "KTO", {"precompute_ref_log_probs": True}),
    Case("sync_ref_model", "KTO", {"sync_ref_model": True, "ref_model_sync_steps": 1}),
    Case("max_length", "KTO", {"max_length": 7}),
]

REWARD = [
    Case("defaults", "Reward"),
    Case("center_rewards_coefficient", "Reward", {"center_rewards_coefficient": 0.1}),
    Case("margins in the data", "Reward", data=margins),
    Case("max_length", "Reward", {"max_length": 7}),
]

SFT = [
    Case("defaults", "SFT"),
    Case("loss_type=dft", "SFT", {"loss_type": "dft"}),
    Case("completion_only_loss", "SFT", {"completion_only_loss": True}, data=completions),
    Case("completion_only_loss=False", "SFT", {"completion_only_loss": False}, data=completions),
    Case("assistant_only_loss", "SFT", {"assistant_only_loss": True}, data=chats,
         trainer={"processing_class": conversation_tokenizer()}),
    Case("label_smoothing_factor", "SFT", {"label_smoothing_factor": 0.1}),
    Case("padding_free", "SFT", {"padding_free": True, "max_length": None}),
    Case("packing, bfd", "SFT", {"packing": True, "max_length": 20, "per_device_train_batch_size": 2}),
    Case("packing, bfd_split", "SFT",
         {"packing": True, "packing_strategy": "bfd_split", "max_length": 8, "per_device_train_batch_size": 2}),
    Case("packing, wrapped", "SFT",
         {"packing": True, "packing_strategy": "wrapped", "max_length": 12, "per_device_train_batch_size": 2}),
    Case("pad_to_multiple_of", "SFT", {"pad_to_multiple_of": 8}),
    Case("average_tokens_across_devices=False", "SFT", {"average_tokens_across_devices": False}),
    Case("compute_loss_func", "SFT", trainer={"compute_loss_func": double_loss_of_a_part}),
    Case("max_length", "SFT", {"max_length": 6}),
]  # fmt: skip

GRPO = [
    Case("defaults", "GRPO"),
    *(Case(f"loss_type={name}", "GRPO", {"loss_type": name}) for name in GRPO_LOSSES),
    Case("num_iterations=2", "GRPO", {"num_iterations": 2}),
    Case("num_iterations=2, importance_sampling_level=sequence", "GRPO",
         {"num_iterations": 2, "importance_sampling_level": "sequence"}),
    Case("num_iterations=3, loss_type=cispo", "GRPO", {"num_iterations": 3, "loss_type": "cispo"}),
    Case("beta > 0", "GRPO", {"beta": 0.1}),
    Case("beta > 0, num_iterations=2, use_bias_correction_kl", "GRPO",
         {"beta": 0.1, "num_iterations": 2, "use_bias_correction_kl": True}),
    Case("beta > 0, sync_ref_model", "GRPO", {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1}),
    *(Case(f"scale_rewards={name}", "GRPO", {"scale_rewards": name}) for name in ("batch", "none")),
    Case("mask_truncated_completions", "GRPO", {"mask_truncated_completions": True, "max_completion_length": 24}),
    Case("top_entropy_quantile", "GRPO", {"top_entropy_quantile": 0.4}),
    Case("steps_per_generation=4", "GRPO", {"steps_per_generation": 4}),
    Case("entropy_coef", "GRPO", {"entropy_coef": 0.1}),
    Case("delta, epsilon_high", "GRPO", {"delta": 1.5, "epsilon_high": 0.3, "num_iterations": 2}),
    Case("off_policy_mask_threshold", "GRPO", {"off_policy_mask_threshold": 0.01, "num_iterations": 2}),
    Case("multi_objective_aggregation=normalize_then_sum", "GRPO",
         {"multi_objective_aggregation": "normalize_then_sum"}),
    Case("cast_lm_head_to_fp32", "GRPO", {"cast_lm_head_to_fp32": True}),
]  # fmt: skip

RLOO = [
    Case("defaults", "RLOO"),
    Case("num_iterations=2", "RLOO", {"num_iterations": 2}),
    Case("beta > 0", "RLOO", {"beta": 0.1}),
    Case("normalize_advantages, reward_clip_range", "RLOO",
         {"normalize_advantages": True, "reward_clip_range": (0.5, 1.5)}),
    Case("mask_truncated_completions", "RLOO", {"mask_truncated_completions": True, "max_completion_length": 24}),
    Case("steps_per_generation=4", "RLOO", {"steps_per_generation": 4}),
]  # fmt: skip

ANY = [
    Case("dropout", "DPO", {"disable_dropout": False}, model=dropping, randomness=True, rounding=1e-4),
    Case("neftune_noise_alpha", "SFT", {"neftune_noise_alpha": 5.0}, randomness=True, rounding=1e-4),
    Case("neftune_noise_alpha", "DPO", {"neftune_noise_alpha": 5.0}, randomness=True, rounding=1e-4),
    Case("torch_compile", "SFT", {"torch_compile": True, "torch_compile_backend": "aot_eager"}),
    *(Case("gradient_checkpointing, use_reentrant", kind, {"gradient_checkpointing_kwargs": {"use_reentrant": True}})
      for kind in ("SFT", "KTO", "GRPO", "Reward")),
    Case("max_grad_norm", "DPO", {"max_grad_norm": 0.01}),
    *(Case(f"optim={name}", "DPO", {"optim": name}) for name in ("adafactor", "sgd", "adamw_torch_fused", "rmsprop")),
    Case("torch_empty_cache_steps, include_num_input_tokens_seen", "DPO",
         {"torch_empty_cache_steps": 1, "include_num_input_tokens_seen": "all"}),
    Case("bf16 (autocast)", "DPO", {"bf16": True}, rounding=0.06),
    Case("bf16 (autocast)", "SFT", {"bf16": True}, rounding=0.06),
    Case("use_cache", "SFT", {"use_cache": True}),
    Case("group_by_length", "SFT", {"train_sampling_strategy": "group_by_length"}),
    Case("dataloader_drop_last, short last batch", "DPO", {"per_device_train_batch_size": 5, "num_train_epochs": 2}),
]  # fmt: skip

MODELS = [
    *(Case(f"{name}, router_aux_loss_coef", kind, {"router_aux_loss_coef": 0.5}, model=make, experts=True, rounding=1e-4)
      for kind in ("DPO", "SFT", "GRPO") for name, make in (("Mixtral", mixtral), ("Qwen3-MoE", qwen_moe))),
    Case("gpt-oss (sinks, sliding window, experts)", "DPO", model=gpt_oss, experts=True, rounding=1e-4),
    Case("gpt-oss (sinks, sliding window, experts)", "SFT", model=gpt_oss, experts=True, rounding=1e-4),
    Case("sliding-window layers (Gemma 3)", "DPO", model=sliding, rounding=1e-4),
    Case("sliding-window layers (Gemma 3), packing", "SFT", {"packing": True, "max_length": 20}, model=sliding, rounding=1e-4),
    Case("vision–language model (LLaVA), pictures", "DPO", model=vision.make_llava, data=vision.picture_pairs,
         hook_point=vision.VISION_HOOK_POINT, trainer={"processing_class": vision.make_processor()}, rounding=1e-4),
    *(Case("vision–language model (LLaVA), text only", kind, model=vision.make_llava, hook_point=vision.VISION_HOOK_POINT,
           rounding=1e-4) for kind in ("DPO", "SFT", "GRPO")),
    Case("tied embeddings", "DPO", model=tied),
    Case("resized embeddings", "SFT", model=resized),
]  # fmt: skip

TARGETS = ["q_proj", "down_proj"]
ADAPTERS = {
    "LoRA": lambda: LoraConfig(r=4, target_modules=TARGETS),
    "LoRA with modules_to_save": lambda: LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["lm_head", "embed_tokens"]),
    "LoRA on the embedding too": lambda: LoraConfig(r=4, target_modules=[*TARGETS, "embed_tokens"]),
    "DoRA": lambda: LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "rsLoRA": lambda: LoraConfig(r=4, target_modules=TARGETS, use_rslora=True),
    "trainable_token_indices": lambda: LoraConfig(r=4, target_modules=TARGETS, trainable_token_indices=[5, 6]),
    "IA3": lambda: IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "LoHa": lambda: LoHaConfig(r=4, target_modules=TARGETS),
    "LoKr": lambda: LoKrConfig(r=4, target_modules=TARGETS),
    "VeRA": lambda: VeraConfig(r=4, target_modules=["q_proj"]),
    "BOFT": lambda: BOFTConfig(boft_block_size=4, target_modules=["q_proj"]),
    "trainable tokens": lambda: TrainableTokensConfig(token_indices=[5, 6], target_modules=["embed_tokens"]),
    "prompt tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "P-tuning": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16),
    "prefix tuning": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}  # fmt: skip
PEFT = [
    *(Case(name, "DPO", {"gradient_checkpointing": name != "prefix tuning"}, peft=make, rounding=1e-4) for name, make in ADAPTERS.items()),
    *(Case(name, "SFT", {"gradient_checkpointing": name != "prefix tuning"}, peft=ADAPTERS[name], rounding=1e-4)
      for name in ("LoRA", "prompt tuning", "prefix tuning")),
    Case("prompt tuning, packing", "SFT", {"packing": True, "max_length": 20}, peft=ADAPTERS["prompt tuning"],
         refused="adds virtual tokens"),
    Case("LoRA", "GRPO", {"beta": 0.1}, peft=ADAPTERS["LoRA"], rounding=1e-4),
]  # fmt: skip

NO_KERNELS = dict.fromkeys(
    ("rms_norm", "rope", "swiglu", "cross_entropy", "fused_linear_cross_entropy"), False
)
LIGER = [
    *(Case("use_liger_kernel, the fused loss", kind, {"use_liger_kernel": True, "liger_kernel_config": NO_KERNELS, **more},
           twin={"use_liger_kernel": False}, rounding=1e-4)
      for kind, more in (("DPO", {}), ("KTO", {}), ("GRPO", {"beta": 0.1, "num_iterations": 2}))),
    Case("use_liger_kernel, fused_linear_cross_entropy", "SFT",
         {"use_liger_kernel": True, "liger_kernel_config": NO_KERNELS | {"fused_linear_cross_entropy": True}},
         twin={"use_liger_kernel": False}, rounding=1e-4),
]  # fmt: skip
"""Where liger-kernel is installed, and the trainer has a loss of its own for it (TRL 1.12). Without a GPU its kernels run in
Triton's interpreter: TRITON_INTERPRET=1 TORCHDYNAMO_DISABLE=1."""
if importlib.util.find_spec("liger_kernel") is None:
    LIGER = []

NO_CACHE = {"gradient_checkpointing": False}
REENTRANT = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
ALL = ("DPO", "KTO", "Reward", "SFT", "GRPO", "RLOO")
OWN = [
    *(Case("compute_loss scaled", kind, subclass=own.scaled_loss) for kind in ALL),
    *(Case("a second forward of the batch in the loss", kind, subclass=own.second_forward)
      for kind in ("DPO", "KTO", "SFT", "GRPO", "RLOO")),
    *(Case("a second forward of the batch in the loss, use_reentrant", kind, REENTRANT, subclass=own.second_forward)
      for kind in ("DPO", "SFT")),
    *(Case("forwards beside the loss", kind, subclass=own.detached_forward) for kind in ("DPO", "KTO", "SFT", "GRPO")),
    *(Case("other texts beside the batch", kind, subclass=own.replay, errors=False) for kind in ("DPO", "KTO", "GRPO")),
    Case("a forward for the chosen, one for the rejected", "DPO", subclass=own.chosen_then_rejected, twin_subclass=own.trl_own),
    Case("a forward for the chosen, one for the rejected, use_reentrant", "DPO", REENTRANT,
         subclass=own.chosen_then_rejected, twin_subclass=own.trl_own),
    Case("preferences turned round", "DPO", subclass=own.swapped),
    Case("a second backward in training_step", "DPO", subclass=own.own_backward, twin_subclass=own.own_backward_in_one_loss),
    Case("_prepare_inputs leaves rows out", "DPO", subclass=own.fewer_rows, twin_subclass=own.trl_own),
    Case("create_optimizer", "DPO", subclass=own.own_optimizer),
    Case("advantages for every token", "GRPO", subclass=own.token_advantages),
    Case("a layer that returns a tuple", "DPO", NO_CACHE, model=own.tuples),
    *(Case("a TRL class derived from one that is known", kind) for kind in ("GMPO", "DPO of BEMA", "GKD")),
    *(Case("both answers in one batch", kind) for kind in ("ORPO", "CPO")),
    Case("transformers' training loop, no sides", "Trainer"),
    Case("a batch chosen, rejected, chosen …", "DPO", subclass=own.interleaved, refused="does not answer the prompts"),
    *(Case("other rows than the batch's", kind, subclass=own.other_rows, refused="they are not the")
      for kind in ("DPO", "KTO", "GRPO")),
    Case("no compute_loss", "DPO", subclass=own.no_loss, refused="without the trainer's compute_loss"),
    Case("backward a micro-batch late", "SFT", subclass=own.late_backward, refused="after the training step"),
    Case("a layer that runs twice", "DPO", NO_CACHE, model=own.looped, refused="runs 2 times"),
    Case("several GPUs in one process (DataParallel)", "DPO", before=own.two_gpus, refused="DataParallel"),
    Case("encoder and decoder", "Trainer", model=own.encoder_decoder, refused="an encoder and a decoder"),
]  # fmt: skip

CASES = [*DPO, *KTO, *REWARD, *SFT, *GRPO, *RLOO, *ANY, *MODELS, *PEFT, *LIGER, *OWN]
