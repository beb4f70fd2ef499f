"""Other names for recipe keys: those that are accepted, and those whose place is told."""

from __future__ import annotations

ALIASES: dict[str, str] = {
    "base_model": "model.name_or_path",
    "model.base_model": "model.name_or_path",
    "model.model_name_or_path": "model.name_or_path",
    "model.name": "model.name_or_path",
    "model.torch_dtype": "model.dtype",
    "lora.lora_alpha": "lora.alpha",
    "lora.lora_dropout": "lora.dropout",
    "training.total_steps": "training.max_steps",
    "training.batch_size": "training.per_device_train_batch_size",
    "data.max_seq_length": "data.max_length",
    "methods.schema_bank.topk": "methods.schema_bank.top_k",
    "methods.backward_gate.target_novelty": "methods.backward_gate.target_acceptance",
    "methods.backward_gate.target_novelty_scaler": "methods.backward_gate.beta",
    "methods.backward_gate.novelty_scaler": "methods.backward_gate.beta",
    "methods.backward_gate.novelty_ema_rate": "methods.backward_gate.ema_rate",
    "methods.backward_gate.k_topk": "methods.backward_gate.error_top_k",
    "methods.backward_gate.reorth_every": "methods.backward_gate.reorthonormalize_every",
}
"""Names of the seed projects and of PEFT, accepted and named in the plan."""

REMOVED: dict[str, str] = {
    "training.warmup_ratio": "training.warmup (a share of the stage's steps)",
    "training.warmup_steps": "training.warmup (a share of the stage's steps)",
    "training.evaluation_strategy": "training.eval_every",
    "training.eval_strategy": "training.eval_every",
    "training.eval_steps": "training.eval_every",
    "training.save_steps": "training.save_every",
    "training.save_strategy": "training.save_every",
    "training.logging_steps": "logging_every",
    "training.num_train_epochs": "training.epochs",
    "training.lr_scheduler_type": "training.lr_scheduler",
    "training.label_smoothing_factor": "training.label_smoothing",
    "training.group_by_length": "data.group_by_length",
    "training.overwrite_output_dir": "--fresh on the command line",
    "training.gradient_checkpointing": "model.activation_checkpointing",
    "model.gradient_checkpointing": "model.activation_checkpointing",
    "training.output_dir": "output_dir",
    "training.seed": "seed",
    "training.report_to": "report_to",
    "training.bf16": "training.precision: bf16 (autocast), or model.dtype: bfloat16",
    "training.fp16": "training.precision: fp16",
    "training.optim": "training.optimizer",
    "training.adam_beta1": "training.betas",
    "training.adam_beta2": "training.betas",
    "training.adam_epsilon": "training.epsilon",
    "training.lr_scheduler_kwargs": "training.lr_scheduler_args",
    "training.dataloader_num_workers": "training.dataloader_workers",
    "model.use_flash_attention_2": "model.attn_implementation: flash_attention_2",
}
"""Old transformers.Trainer names, and what to write instead."""
