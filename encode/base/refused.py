"""Flags that a command does not take, of another command or of diffusers' scripts, with what to do about them."""

TRAIN_ONLY = """
    output_dir logging_dir report_to seed train_batch_size num_train_epochs max_train_steps
    gradient_accumulation_steps gradient_checkpointing learning_rate scale_lr lr_scheduler lr_warmup_steps
    conditioning_dropout_prob use_ema non_ema_revision use_8bit_adam allow_tf32 adam_beta1 adam_beta2
    adam_weight_decay adam_epsilon max_grad_norm checkpointing_steps checkpoints_total_limit resume_from_checkpoint
    enable_xformers_memory_efficient_attention val_image_url val_image_url_or_path validation_prompt
    num_validation_images validation_epochs validation_steps push_to_hub hub_token hub_model_id
    cache_weights compile deterministic edit_weight ema_decay ema_device ema_length ema_power ema_steps estimate
    fused_backward hub_license hub_private_repo ignore_memory keep keep_best logging_steps lora_alpha lora_rank
    lora_targets noise_offset num_validation_samples optimizer rescale_betas_zero_snr sample_by score_samples snr_gamma
    verify_cache weights window window_dir
""".split()
"""Names of all flags that `ip2p-train` has and `ip2p-encode` has not: first those of diffusers' scripts."""
NOT_NEEDED: dict[str, str] = dict.fromkeys(
    ("crops_coords_top_left_h", "crops_coords_top_left_w"), "is not needed: SDXL is trained with each sample's own crop"
) | {"local_rank": "is not needed: launchers tell it in another way"}
REFUSED: dict[str, str] = NOT_NEEDED | dict.fromkeys(TRAIN_ONLY, "belongs to ip2p-train: give it there")
"""Flags that `ip2p-encode` does not take, with what to do about them."""
