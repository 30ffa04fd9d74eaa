"""Keys of ai-toolkit's configuration that an import may leave out without a note."""

from __future__ import annotations

from typing import Any

#: By section, keys whose effect the spec has no field for, with the value (or values) under which nothing is lost.
#: `...` is any value; the section "" is the process itself.
HARMLESS: dict[str, dict[str, Any]] = {
    "network": {"transformer_only": True, "old_lokr_format": False, "conv": None, "conv_alpha": None},
    "save": {
        "save_format": ("safetensors", "diffusers"),
        "push_to_hub": False,
        "hf_private": False,
        "hf_repo_id": None,
    },
    "datasets": {
        "mask_path": None,
        "mask_min_value": ...,
        "cache_latents": ...,
        "cache_text_embeddings": ...,
        "buckets": True,
        "shuffle_tokens": False,
        "token_dropout_rate": 0,
        "network_weight": 1,
        "controls": [],
        "shrink_video_to_frames": ...,
        "num_frames": 1,
        "flip_y": False,
    },
    "train": {
        "train_unet": True,
        "train_text_encoder": False,
        "noise_scheduler": "flowmatch",
        "cache_text_embeddings": ...,
        "unload_text_encoder": ...,
        "skip_first_sample": ...,
        "force_first_sample": False,
        "bypass_guidance_embedding": ...,
        "loss_type": "mse",
        "diff_output_preservation": False,
        "diff_output_preservation_multiplier": ...,
        "diff_output_preservation_class": ...,
        "blank_prompt_preservation": False,
        "switch_boundary_every": ...,
        "validation_config": ...,
    },
    "sample": {"sampler": "flowmatch", "neg": "", "walk_seed": ..., "num_frames": 1, "fps": ..., "format": ...},
    "logging": {"log_every": ..., "use_ui_logger": ..., "use_wandb": False, "verbose": ...},
    "": {
        "type": ("sd_trainer", "diffusion_trainer", "ui_trainer"),
        "training_folder": ...,
        "sqlite_db_path": ...,
        "performance_log_every": ...,
        "logging": ...,
        "sample": ...,
    },
}
