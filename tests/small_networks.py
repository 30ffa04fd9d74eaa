"""Real models of diffusers and transformers, a few numbers wide, whose LoRAs real libraries write."""

FLUX = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (2, 2, 4),
}
FLUX2 = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (2, 2, 2, 2),
}
UNET = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,
    "cross_attention_dim": 16,
    "norm_num_groups": 4,
    "use_linear_projection": True,
}
QWEN = {
    "num_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (2, 2, 4),
}
WAN = {
    "num_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "text_dim": 16,
    "ffn_dim": 32,
    "freq_dim": 16,
}

IDEOGRAM = {
    "num_layers": 1,
    "in_channels": 8,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "adaln_dim": 8,
    "llm_features_dim": 16,
    "mrope_section": (2, 1, 1),
}
Z_IMAGE = {
    "n_layers": 1,
    "n_refiner_layers": 1,
    "dim": 16,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 16,
    "in_channels": 4,
    "axes_dims": [2, 2, 4],
}
SD3 = {
    "num_layers": 2,
    "sample_size": 8,
    "in_channels": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 8,
    "dual_attention_layers": (0,),
}
KREA2 = {
    "num_layers": 1,
    "in_channels": 8,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "timestep_embed_dim": 16,
    "text_hidden_dim": 16,
    "num_text_layers": 3,
    "text_num_attention_heads": 2,
    "text_num_key_value_heads": 2,
    "text_intermediate_size": 24,
    "num_layerwise_text_blocks": 1,
    "num_refiner_text_blocks": 1,
    "axes_dims_rope": (2, 2, 4),
}
SD15 = UNET | {
    "block_out_channels": (8, 16, 16, 16),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "use_linear_projection": False,
}

#: family → (model, its sizes, the pipeline that saves its LoRA)
MODELS = {
    "ideogram4": ("Ideogram4Transformer2DModel", IDEOGRAM, "Ideogram4Pipeline"),
    "flux1": ("FluxTransformer2DModel", FLUX, "FluxPipeline"),
    "flux2": ("Flux2Transformer2DModel", FLUX2, "Flux2Pipeline"),
    "qwen-image": ("QwenImageTransformer2DModel", QWEN, "QwenImagePipeline"),
    "wan": ("WanTransformer3DModel", WAN, "WanPipeline"),
    "z-image": ("ZImageTransformer2DModel", Z_IMAGE, "ZImagePipeline"),
    "sd3": ("SD3Transformer2DModel", SD3, "StableDiffusion3Pipeline"),
    "krea2": ("Krea2Transformer2DModel", KREA2, "Krea2Pipeline"),
    "sdxl": ("UNet2DConditionModel", UNET, "StableDiffusionXLPipeline"),
    "sd15": ("UNet2DConditionModel", SD15, "StableDiffusionPipeline"),
}

CLIP = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 8,
    "vocab_size": 20,
    "max_position_embeddings": 8,
}


def network(family):
    """A family's model with random weights, and the pipeline class that saves its LoRA."""
    import diffusers
    import torch

    torch.manual_seed(0)
    kind, sizes, pipeline = MODELS[family]
    return getattr(diffusers, kind)(**sizes), getattr(diffusers, pipeline)


def clip(seed):
    """A CLIP text encoder with random weights."""
    import torch
    import transformers

    torch.manual_seed(seed)
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP))
