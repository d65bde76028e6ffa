"""What other trainers call our settings: nanoGPT, transformers' Trainer and run_clm, litgpt."""

# our setting, or "our setting value": their names. Spelled with underscores, without dashes.
THEIR_NAMES = {
    "n_layers": "n_layer num_layers num_hidden_layers layers depth",
    "n_heads": "n_head num_heads num_attention_heads heads",
    "n_embd": "hidden_size d_model embed_dim n_embed embedding_size dim width",
    "n_positions": "max_position_embeddings n_ctx",
    "dropout": "resid_pdrop embd_pdrop attn_pdrop hidden_dropout",
    "init_from": "model_name_or_path model_name pretrained checkpoint_dir",
    "model": "model_name_or_path model_name pretrained checkpoint_dir out_dir",
    "dataset": "dataset_name",
    "dataset_config": "dataset_config_name",
    "text_column": "text_key text_field text_column_name",
    "train_file": "train_data data data_dir data_path input_file train_files text_file",
    "validation_file": "val_file eval_file valid_file validation_data val_data",
    "validation_share": "validation_split_percentage val_split validation_split val_fraction",
    "tokenizer": "tokenizer_name tokenizer_path tokenizer_name_or_path encoding",
    "block_size": "max_seq_length max_seq_len seq_len seq_length sequence_length context_length",
    "tokenize_processes": "preprocessing_num_workers num_proc num_workers dataloader_num_workers",
    "cache_dir": "hf_cache_dir",
    "epochs": "num_train_epochs num_epochs n_epochs epoch",
    "max_steps": "max_iters num_steps train_steps total_steps steps num_training_steps n_steps",
    "batch_size": "per_device_train_batch_size train_batch_size micro_batch_size device_batch_size"
    " per_device_eval_batch_size per_device_batch_size bs",
    "grad_accum": "gradient_accumulation_steps accumulation_steps accumulate_grad_batches",
    "optimizer": "optim",
    "learning_rate": "lr max_lr peak_lr",
    "min_learning_rate": "min_lr learning_rate_min end_lr",
    "lr_schedule": "lr_scheduler_type lr_scheduler scheduler decay_lr schedule",
    "warmup_steps": "warmup_iters num_warmup_steps warmup warmup_ratio lr_warmup_steps",
    "decay_steps": "lr_decay_iters num_decay_steps decay_iters",
    "weight_decay": "wd",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "adam_epsilon": "adam_eps epsilon eps",
    "grad_clip": "max_grad_norm clip_grad gradient_clip_val clip_norm gradient_clipping",
    "dtype bfloat16": "bf16 fp16 mixed_precision amp precision",
    "dtype": "torch_dtype",
    "remat": "gradient_checkpointing activation_checkpointing use_remat checkpointing",
    "attention": "flash_attention attn_implementation attn use_flash_attn",
    "parallel": "distributed strategy backend",
    "parallel fsdp": "fsdp zero deepspeed",
    "num_processes": "nnodes num_nodes world_size",
    "process_id": "node_rank rank",
    "coordinator_address": "master_addr coordinator main_process_ip",
    "output_dir": "out_dir save_dir out run_dir logging_dir log_dir output outdir",
    "output": "out_dir out output_dir",
    "resume": "resume_from_checkpoint resume_from auto_resume",
    "resume never": "overwrite_output_dir overwrite",
    "log_every": "logging_steps log_interval log_steps",
    "eval_every": "eval_steps eval_interval eval_strategy evaluation_strategy val_interval"
    " val_check_interval validate_every",
    "eval_rows": "eval_iters eval_batches max_eval_samples",
    "save_every": "save_steps save_interval save_strategy checkpoint_every checkpoint_interval",
    "keep": "save_total_limit max_to_keep keep_checkpoints",
    "report_to wandb": "wandb_log wandb use_wandb wandb_project",
    "report_to tensorboard": "tensorboard use_tensorboard",
    "prompt": "start text input",
    "max_new_tokens": "max_length length n_tokens num_tokens",
    "top_k": "topk",
    "top_p": "topp nucleus",
    "file": "train_file text data validation_file input",
    "limit": "num_examples max_eval_samples max_samples",
    "json": "output_path output out_file",
    "debug": "verbose",
}
# Names that need no setting here, and why.
NOT_NEEDED = {
    "compile torch_compile jit use_jit": "the step is always compiled: leave it out",
    "do_train do_eval train eval": "leave it out: this command does one thing",
    "device devices gpus n_gpu num_gpus accelerator gpu cuda no_cuda use_cpu cpu": "JAX uses all"
    " devices that it finds; JAX_PLATFORMS=cpu or CUDA_VISIBLE_DEVICES=0 before the command"
    " chooses",
    "push_to_hub hub_model_id": "the finished run is a model's directory:"
    " FlaxGPT2LMHeadModel.from_pretrained(RUN).push_to_hub(ID)",
}


def look_up(name: str, known) -> str | None:
    """What to write in the place of another trainer's name: one of `known`, with its value.

    Args:
        name: the unknown name, `--lr` or `lr`.
        known: this command's own names, as they are written.
    """
    dashes, theirs = split(name)
    for ours, names in THEIR_NAMES.items():
        setting, _, value = ours.partition(" ")
        if theirs in names.split() and dashes + setting in known:
            between = " " if dashes else ": "
            return dashes + setting + (between + value if value else "")
    return None


def why_not_needed(name: str) -> str | None:
    """Why this name has no setting here, if it is one of those."""
    _, theirs = split(name)
    return next((why for names, why in NOT_NEEDED.items() if theirs in names.split()), None)


def split(name: str) -> tuple[str, str]:
    """("--", "num_epochs") of "--num-epochs"."""
    bare = name.lstrip("-")
    return "--" if bare != name else "", bare.replace("-", "_").lower()
