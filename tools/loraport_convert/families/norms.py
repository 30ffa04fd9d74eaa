"""The families' parameters that are no matrices: norms, and what modulates a block. Rules as those of the modules.

Nobody trains a LoRA on them, but LyCORIS changes norms as a whole (`train_norm`), and so do distilled LoRAs. ComfyUI
calls most of them by the module whose weight they are; where it is no `weight`, its own name is the native one's end.
"""

from __future__ import annotations

#: The ends of native names of parameters that are the weight of no module.
PARAMETERS = (".scale", ".modulation")


def _sandwich(stack: str, query: str, key: str) -> str:
    """A block with norms before and after each of its two parts."""
    return f"""
    {stack}.#.attention.{query} = {stack}.#.attention.norm_q
    {stack}.#.attention.{key} = {stack}.#.attention.norm_k
    {stack}.#.attention_norm1
    {stack}.#.attention_norm2
    {stack}.#.ffn_norm1
    {stack}.#.ffn_norm2
"""


IDEOGRAM4 = _sandwich("layers", "norm_q", "norm_k") + "llm_cond_norm\n"

Z_IMAGE = (
    "".join(_sandwich(stack, "q_norm", "k_norm") for stack in ("layers", "noise_refiner", "context_refiner"))
    + "cap_embedder.0\n"
)

FLUX = """
    double_blocks.#.img_attn.norm.query_norm = transformer_blocks.#.attn.norm_q
    double_blocks.#.img_attn.norm.key_norm = transformer_blocks.#.attn.norm_k
    double_blocks.#.txt_attn.norm.query_norm = transformer_blocks.#.attn.norm_added_q
    double_blocks.#.txt_attn.norm.key_norm = transformer_blocks.#.attn.norm_added_k
    single_blocks.#.norm.query_norm = single_transformer_blocks.#.attn.norm_q
    single_blocks.#.norm.key_norm = single_transformer_blocks.#.attn.norm_k
"""

QWEN_IMAGE = """
    txt_norm
    transformer_blocks.#.attn.norm_q
    transformer_blocks.#.attn.norm_k
    transformer_blocks.#.attn.norm_added_q
    transformer_blocks.#.attn.norm_added_k
"""

SD3 = """
    joint_blocks.#.x_block.attn.ln_q = transformer_blocks.#.attn.norm_q
    joint_blocks.#.x_block.attn.ln_k = transformer_blocks.#.attn.norm_k
    joint_blocks.#.x_block.attn2.ln_q = transformer_blocks.#.attn2.norm_q
    joint_blocks.#.x_block.attn2.ln_k = transformer_blocks.#.attn2.norm_k
    joint_blocks.#.context_block.attn.ln_q = transformer_blocks.#.attn.norm_added_q
    joint_blocks.#.context_block.attn.ln_k = transformer_blocks.#.attn.norm_added_k
"""

WAN = """
    blocks.#.self_attn.norm_q = blocks.#.attn1.norm_q
    blocks.#.self_attn.norm_k = blocks.#.attn1.norm_k
    blocks.#.cross_attn.norm_q = blocks.#.attn2.norm_q
    blocks.#.cross_attn.norm_k = blocks.#.attn2.norm_k
    blocks.#.cross_attn.norm_k_img = blocks.#.attn2.norm_added_k
    blocks.#.norm3 = blocks.#.norm2
    blocks.#.modulation = blocks.#.scale_shift_table
    head.modulation = scale_shift_table
    img_emb.proj.0 = condition_embedder.image_embedder.norm1
    img_emb.proj.4 = condition_embedder.image_embedder.norm2
"""


def _krea_block(native: str, source: str) -> str:
    return f"""
    {native}.#.prenorm.scale = {source}.#.norm1
    {native}.#.postnorm.scale = {source}.#.norm2
    {native}.#.attn.qknorm.qnorm.scale = {source}.#.attn.norm_q
    {native}.#.attn.qknorm.knorm.scale = {source}.#.attn.norm_k
"""


KREA2 = (
    _krea_block("blocks", "transformer_blocks")
    + _krea_block("txtfusion.layerwise_blocks", "text_fusion.layerwise_blocks")
    + _krea_block("txtfusion.refiner_blocks", "text_fusion.refiner_blocks")
    + """
    txtmlp.0.scale = txt_in.norm
    last.norm.scale = final_layer.norm
"""
)

CLIP = """
    text_model.encoder.layers.#.layer_norm1
    text_model.encoder.layers.#.layer_norm2
    text_model.final_layer_norm
    text_model.encoder.layers.#.layer_norm1 <- encoder.layers.#.layer_norm1
    text_model.encoder.layers.#.layer_norm2 <- encoder.layers.#.layer_norm2
    text_model.final_layer_norm <- final_layer_norm
"""

T5 = """
    encoder.block.#.layer.0.layer_norm
    encoder.block.#.layer.1.layer_norm
    encoder.final_layer_norm
"""

#: What has no bias, as an expression for native names: a change of one there would be lost without a word.
UNBIASED = {
    "ideogram4": r".*attention\..*|.*feed_forward\..*|.*norm.*",
    "flux1": r".*_norm",
    "flux2": r".*",
    "qwen-image": r".*norm(?:_added)?_[qk]|txt_norm",
    "z-image": r".*attention\..*|.*feed_forward\..*|.*norm\d|cap_embedder\.0",
    "sd15": r".*attn[12]\.to_[qkv]",
    "sdxl": r".*attn[12]\.to_[qkv]",
    "sd3": r".*\.ln_[qk]",
    "wan": r".*\.norm_[qk](?:_img)?|.*modulation",
    "krea2": r"(?:blocks|txtfusion)\..*|.*\.scale",
    "clip": r"text_projection",
    "t5": r".*",
}
