"""The names that TRL, verl and prime-rl have for a setting: those that mean one field are taken for it, the others are told what to set.

A name is taken where it has the same meaning, the same unit and one place to go; everything else would be a guess.
"""

from __future__ import annotations

from typing import Any

OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "optimizer.lr": ("lr", "learning_rate"),
    "optimizer.weight_decay": ("weight_decay",),
    "optimizer.warmup": ("warmup_steps", "lr_warmup_steps", "num_warmup_steps"),
    "optimizer.decay": ("lr_scheduler_type",),
    "optimizer.clip": ("max_grad_norm", "grad_clip"),
    "optimizer.betas": ("adam_betas",),
    "optimizer.eps": ("adam_epsilon",),
    "branching.n|branching.width": ("num_generations", "group_size", "rollouts_per_example", "rollouts_per_prompt"),
    "schedule.prompts": ("prompts_per_step", "num_prompts"),
    "response_limit": ("max_completion_length", "max_response_length", "max_new_tokens", "max_tokens", "response_length"),
    "prompt_limit": ("max_prompt_length",),
    "mix.kl_coef": ("beta", "kl", "kl_coef", "kl_loss_coef", "kl_penalty_coef"),
    "steps": ("max_steps", "total_steps", "num_steps", "total_training_steps"),
    "save_every": ("save_steps", "save_freq", "save_interval"),
    "eval_every": ("eval_steps", "test_freq", "eval_interval"),
    "keep": ("save_total_limit",),
    "out": ("output_dir", "output", "out_dir"),
    "name": ("run_name", "experiment_name"),
    "model": ("model_name_or_path", "model_name", "model_path"),
    "model.dtype": ("dtype", "torch_dtype"),
    "tasks": ("dataset", "data", "dataset_name", "train_dataset", "train_data", "train_file", "train_files"),
    "evals": ("eval", "eval_dataset", "eval_data", "eval_file", "val_file", "val_files", "validation_file"),
    "rewards": ("reward", "reward_func", "reward_funcs", "reward_fn", "reward_function"),
    "system": ("system_prompt",),
    "lora.rank": ("lora_rank", "lora_r"),
    "lora.alpha": ("lora_alpha",),
    "lora.targets": ("lora_target_modules", "target_modules"),
    "autocast": ("bf16",),
    "activation_checkpointing": ("gradient_checkpointing",),
}
"""Field, or fields of which a recipe has one: the names that other trainers have for it."""

FIELDS = {name: tuple(paths.split("|")) for paths, names in OTHER_NAMES.items() for name in names}
"""The same by the name."""

_BATCH = (
    "schedule.prompts is the number of problems of a step, each with the paths of its tree (branching.n or branching.width), and "
    "tokens_per_batch what goes through the model at once"
)
_EPOCHS = "training is counted in steps: steps = epochs x problems / schedule.prompts"
_MINIBATCH = "minibatches is the number of optimizer steps that a step's trees are cut into"
_REUSE = "a step's trees are trained once, in minibatches=... optimizer steps"
_CLIP = "the clip is that of the mask: mix.terms.0.estimator.mask.low and .high"
_METHOD = "what a method is stands in its mix: copy a recipe, the table in docs/methods.md has a row for each method"
_ELSEWHERE = "what samples is engine=... of a recipe file: docs/remote.md"
_LENGTH = "prompt_limit and response_limit are two fields, in tokens"
_TRACKER = "trackers are tensorboard=true, wandb=true and trackio=true"

NOT_TAKEN = {
    **dict.fromkeys(("batch_size", "train_batch_size", "per_device_train_batch_size", "rollout_batch_size", "global_batch_size"), _BATCH),
    **dict.fromkeys(("epochs", "num_epochs", "num_train_epochs", "total_epochs", "n_epochs"), _EPOCHS),
    **dict.fromkeys(("ppo_mini_batch_size", "mini_batch_size", "minibatch_size", "num_mini_batches"), _MINIBATCH),
    **dict.fromkeys(("num_iterations", "ppo_epochs", "mu"), _REUSE),
    **dict.fromkeys(("epsilon", "epsilon_low", "epsilon_high", "cliprange", "clip_range", "clip_ratio"), _CLIP),
    **dict.fromkeys(("loss_type", "loss", "adv_estimator", "advantage", "scale_rewards", "algorithm"), _METHOD),
    **dict.fromkeys(("use_vllm", "vllm_mode", "tensor_parallel_size", "rollout_engine"), _ELSEWHERE),
    **dict.fromkeys(("max_length", "max_seq_length", "max_seq_len", "max_model_len", "seq_len"), _LENGTH),
    **dict.fromkeys(("report_to", "logger", "use_wandb"), _TRACKER),
    "gradient_accumulation_steps": f"nothing is set for it: {_BATCH}; a step adds up as many passes as it needs",
    "warmup_ratio": "optimizer.warmup is a number of steps",
    "fp16": "model.dtype is the type of the weights, and autocast=true makes products in bfloat16",
    "logging_steps": "every step is written to metrics.jsonl",
    "device_map": "device is cpu, cuda, cuda:1 or auto",
    "eval_batch_size": "engine.slots is what is decoded at once",
    "per_device_eval_batch_size": "engine.slots is what is decoded at once",
    "early_stopping_patience": "eval_every=... evaluates while it trains, and the best checkpoint is kept",
}  # fmt: skip
"""Names that mean something else here, or several things: what there is."""


def long_name(path: str, stage: Any) -> str:
    """The dotted path of an override with a short name in its place taken for the field; any other path as it is."""
    head, dot, rest = path.partition(".")
    if path == "engine.memory" and not _is_there(path, stage):
        return "engine.memory_mb"
    if head not in FIELDS or hasattr(stage, head):
        return path
    paths = FIELDS[head]
    return next((known for known in paths if _is_there(known, stage)), paths[0]) + dot + rest


def _is_there(path: str, stage: Any) -> bool:
    """Whether a stage has a field as it is now."""
    for name in path.split("."):
        if not hasattr(stage, name):
            return False
        stage = getattr(stage, name)
    return True
