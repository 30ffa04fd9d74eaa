"""The families' tables of module names.

The names are facts of the models: diffusers' of its model classes, the native ones of the original releases. The tests
build every model of diffusers without weights and check that each Linear and convolution is named here exactly once,
and that the rows go where diffusers' own checkpoint conversion puts them.
"""

from __future__ import annotations

IDEOGRAM4 = """
    layers.#.attention.qkv = layers.#.attention.{to_q,to_k,to_v}
    layers.#.attention.qkv <- layers.#.attention.to_qkv
    layers.#.attention.o = layers.#.attention.to_out.0
    layers.#.attention.o <- layers.#.attention.to_out
    layers.#.feed_forward.w1
    layers.#.feed_forward.w2
    layers.#.feed_forward.w3
    layers.#.adaln_modulation
    input_proj
    llm_cond_proj
    t_embedding.mlp_in
    t_embedding.mlp_out
    adaln_proj
    final_layer.linear
    final_layer.adaln_modulation
"""

_DOUBLE_BLOCKS = """
    double_blocks.#.img_attn.qkv = transformer_blocks.#.attn.{to_q,to_k,to_v}
    double_blocks.#.img_attn.qkv <- transformer_blocks.#.attn.to_qkv
    double_blocks.#.img_attn.proj = transformer_blocks.#.attn.to_out.0
    double_blocks.#.img_attn.proj <- transformer_blocks.#.attn.to_out
    double_blocks.#.txt_attn.qkv = transformer_blocks.#.attn.{add_q_proj,add_k_proj,add_v_proj}
    double_blocks.#.txt_attn.qkv <- transformer_blocks.#.attn.to_added_qkv
    double_blocks.#.txt_attn.proj = transformer_blocks.#.attn.to_add_out
    img_in = x_embedder
    txt_in = context_embedder
    double_blocks.#.img_attn.qkv <- double_blocks.#.img_attn_qkv
    double_blocks.#.img_attn.proj <- double_blocks.#.img_attn_proj
    double_blocks.#.txt_attn.qkv <- double_blocks.#.txt_attn_qkv
    double_blocks.#.txt_attn.proj <- double_blocks.#.txt_attn_proj
    final_layer.linear = proj_out
    final_layer.adaLN_modulation.1 ~ norm_out.linear
"""

FLUX1 = (
    _DOUBLE_BLOCKS
    + """
    double_blocks.#.img_mlp.0 = transformer_blocks.#.ff.net.0.proj
    double_blocks.#.img_mlp.2 = transformer_blocks.#.ff.net.2
    double_blocks.#.txt_mlp.0 = transformer_blocks.#.ff_context.net.0.proj
    double_blocks.#.txt_mlp.2 = transformer_blocks.#.ff_context.net.2
    double_blocks.#.img_mod.lin = transformer_blocks.#.norm1.linear
    double_blocks.#.txt_mod.lin = transformer_blocks.#.norm1_context.linear
    single_blocks.#.linear1 = single_transformer_blocks.#.{attn.to_q,attn.to_k,attn.to_v,proj_mlp*4}
    single_blocks.#.linear2 = single_transformer_blocks.#.proj_out
    single_blocks.#.modulation.lin = single_transformer_blocks.#.norm.linear
    time_in.in_layer = time_text_embed.timestep_embedder.linear_1
    time_in.out_layer = time_text_embed.timestep_embedder.linear_2
    guidance_in.in_layer = time_text_embed.guidance_embedder.linear_1
    guidance_in.out_layer = time_text_embed.guidance_embedder.linear_2
    vector_in.in_layer = time_text_embed.text_embedder.linear_1
    vector_in.out_layer = time_text_embed.text_embedder.linear_2
    double_blocks.#.img_attn.qkv <- blocks.#.attn.a_to_qkv
    double_blocks.#.txt_attn.qkv <- blocks.#.attn.b_to_qkv
    double_blocks.#.img_attn.proj <- blocks.#.attn.a_to_out
    double_blocks.#.txt_attn.proj <- blocks.#.attn.b_to_out
    double_blocks.#.img_mlp.0 <- blocks.#.ff_a.0
    double_blocks.#.img_mlp.2 <- blocks.#.ff_a.2
    double_blocks.#.txt_mlp.0 <- blocks.#.ff_b.0
    double_blocks.#.txt_mlp.2 <- blocks.#.ff_b.2
    double_blocks.#.img_mod.lin <- blocks.#.norm1_a.linear
    double_blocks.#.txt_mod.lin <- blocks.#.norm1_b.linear
    single_blocks.#.linear1 <- single_blocks.#.to_qkv_mlp
    single_blocks.#.linear2 <- single_blocks.#.proj_out
    single_blocks.#.modulation.lin <- single_blocks.#.norm.linear
    final_layer.adaLN_modulation.1 <- final_norm_out.linear
    final_layer.linear <- final_proj_out
    time_in.in_layer <- time_embedder.timestep_embedder.0
    time_in.out_layer <- time_embedder.timestep_embedder.2
    guidance_in.in_layer <- guidance_embedder.timestep_embedder.0
    guidance_in.out_layer <- guidance_embedder.timestep_embedder.2
    vector_in.in_layer <- pooled_text_embedder.0
    vector_in.out_layer <- pooled_text_embedder.2
"""
)

FLUX2 = (
    _DOUBLE_BLOCKS
    + """
    double_blocks.#.img_mlp.0 = transformer_blocks.#.ff.linear_in
    double_blocks.#.img_mlp.2 = transformer_blocks.#.ff.linear_out
    double_blocks.#.txt_mlp.0 = transformer_blocks.#.ff_context.linear_in
    double_blocks.#.txt_mlp.2 = transformer_blocks.#.ff_context.linear_out
    single_blocks.#.linear1 = single_transformer_blocks.#.attn.to_qkv_mlp_proj
    single_blocks.#.linear2 = single_transformer_blocks.#.attn.to_out
    double_stream_modulation_img.lin = double_stream_modulation_img.linear
    double_stream_modulation_txt.lin = double_stream_modulation_txt.linear
    single_stream_modulation.lin = single_stream_modulation.linear
    time_in.in_layer = time_guidance_embed.timestep_embedder.linear_1
    time_in.out_layer = time_guidance_embed.timestep_embedder.linear_2
    guidance_in.in_layer = time_guidance_embed.guidance_embedder.linear_1
    guidance_in.out_layer = time_guidance_embed.guidance_embedder.linear_2
"""
)

QWEN_IMAGE = """
    transformer_blocks.#.attn.to_q
    transformer_blocks.#.attn.to_k
    transformer_blocks.#.attn.to_v
    transformer_blocks.#.attn.to_out.0
    transformer_blocks.#.attn.to_out.0 <- transformer_blocks.#.attn.to_out
    transformer_blocks.#.attn.{to_q,to_k,to_v} <- transformer_blocks.#.attn.to_qkv
    transformer_blocks.#.attn.add_q_proj
    transformer_blocks.#.attn.add_k_proj
    transformer_blocks.#.attn.add_v_proj
    transformer_blocks.#.attn.to_add_out
    transformer_blocks.#.attn.{add_q_proj,add_k_proj,add_v_proj} <- transformer_blocks.#.attn.to_added_qkv
    transformer_blocks.#.img_mod.1
    transformer_blocks.#.img_mlp.net.0.proj
    transformer_blocks.#.img_mlp.net.2
    transformer_blocks.#.txt_mod.1
    transformer_blocks.#.txt_mlp.net.0.proj
    transformer_blocks.#.txt_mlp.net.2
    time_text_embed.timestep_embedder.linear_1
    time_text_embed.timestep_embedder.linear_2
    img_in
    txt_in
    norm_out.linear
    proj_out
"""


def _z_image_block(stack: str) -> str:
    return f"""
    {stack}.#.attention.qkv = {stack}.#.attention.{{to_q,to_k,to_v}}
    {stack}.#.attention.qkv <- {stack}.#.attention.to_qkv
    {stack}.#.attention.out = {stack}.#.attention.to_out.0
    {stack}.#.attention.out <- {stack}.#.attention.to_out
    {stack}.#.feed_forward.w1
    {stack}.#.feed_forward.w2
    {stack}.#.feed_forward.w3
"""


Z_IMAGE = (
    "".join(map(_z_image_block, ("layers", "noise_refiner", "context_refiner")))
    + """
    layers.#.adaLN_modulation.0
    noise_refiner.#.adaLN_modulation.0
    t_embedder.mlp.0
    t_embedder.mlp.2
    cap_embedder.1
    x_embedder = all_x_embedder.2-1
    final_layer.linear = all_final_layer.2-1.linear
    final_layer.adaLN_modulation.1 = all_final_layer.2-1.adaLN_modulation.1
"""
)

SD3 = """
    joint_blocks.#.x_block.attn.qkv = transformer_blocks.#.attn.{to_q,to_k,to_v}
    joint_blocks.#.x_block.attn.qkv <- transformer_blocks.#.attn.to_qkv
    joint_blocks.#.x_block.attn.proj = transformer_blocks.#.attn.to_out.0
    joint_blocks.#.x_block.attn2.qkv = transformer_blocks.#.attn2.{to_q,to_k,to_v}
    joint_blocks.#.x_block.attn2.qkv <- transformer_blocks.#.attn2.to_qkv
    joint_blocks.#.x_block.attn2.proj = transformer_blocks.#.attn2.to_out.0
    joint_blocks.#.x_block.mlp.fc1 = transformer_blocks.#.ff.net.0.proj
    joint_blocks.#.x_block.mlp.fc2 = transformer_blocks.#.ff.net.2
    joint_blocks.#.x_block.adaLN_modulation.1 = transformer_blocks.#.norm1.linear
    joint_blocks.#.context_block.attn.qkv = transformer_blocks.#.attn.{add_q_proj,add_k_proj,add_v_proj}
    joint_blocks.#.context_block.attn.qkv <- transformer_blocks.#.attn.to_added_qkv
    joint_blocks.#.context_block.attn.proj = transformer_blocks.#.attn.to_add_out
    joint_blocks.#.context_block.mlp.fc1 = transformer_blocks.#.ff_context.net.0.proj
    joint_blocks.#.context_block.mlp.fc2 = transformer_blocks.#.ff_context.net.2
    joint_blocks.#.context_block.adaLN_modulation.1 ~2 transformer_blocks.#.norm1_context.linear
    context_embedder
    x_embedder.proj = pos_embed.proj
    t_embedder.mlp.0 = time_text_embed.timestep_embedder.linear_1
    t_embedder.mlp.2 = time_text_embed.timestep_embedder.linear_2
    y_embedder.mlp.0 = time_text_embed.text_embedder.linear_1
    y_embedder.mlp.2 = time_text_embed.text_embedder.linear_2
    final_layer.linear = proj_out
    final_layer.adaLN_modulation.1 ~ norm_out.linear
"""

_WAN_ATTENTION = """
    blocks.#.{native}.q = blocks.#.{source}.to_q
    blocks.#.{native}.k = blocks.#.{source}.to_k
    blocks.#.{native}.v = blocks.#.{source}.to_v
    blocks.#.{native}.o = blocks.#.{source}.to_out.0
    blocks.#.{native}.o <- blocks.#.{source}.to_out
"""

WAN = (
    _WAN_ATTENTION.format(native="self_attn", source="attn1")
    + _WAN_ATTENTION.format(native="cross_attn", source="attn2")
    + """
    blocks.#.cross_attn.k_img = blocks.#.attn2.add_k_proj
    blocks.#.cross_attn.v_img = blocks.#.attn2.add_v_proj
    blocks.#.ffn.0 = blocks.#.ffn.net.0.proj
    blocks.#.ffn.2 = blocks.#.ffn.net.2
    patch_embedding
    time_embedding.0 = condition_embedder.time_embedder.linear_1
    time_embedding.2 = condition_embedder.time_embedder.linear_2
    time_projection.1 = condition_embedder.time_proj
    text_embedding.0 = condition_embedder.text_embedder.linear_1
    text_embedding.2 = condition_embedder.text_embedder.linear_2
    img_emb.proj.1 = condition_embedder.image_embedder.ff.net.0.proj
    img_emb.proj.3 = condition_embedder.image_embedder.ff.net.2
    head.head = proj_out
"""
)


def _krea_block(native: str, source: str, query: int) -> str:
    """`query`: how many times as many query heads as key heads."""
    return f"""
    {native}.#.attn.wq = {source}.#.attn.to_q
    {native}.#.attn.wk = {source}.#.attn.to_k
    {native}.#.attn.wv = {source}.#.attn.to_v
    {native}.#.attn.{{wq*{query},wk,wv}} <- {source}.#.attn.to_qkv
    {native}.#.attn.gate = {source}.#.attn.to_gate
    {native}.#.attn.wo = {source}.#.attn.to_out.0
    {native}.#.attn.wo <- {source}.#.attn.to_out
    {native}.#.mlp.gate = {source}.#.ff.gate
    {native}.#.mlp.up = {source}.#.ff.up
    {native}.#.mlp.down = {source}.#.ff.down
"""


KREA2 = (
    _krea_block("blocks", "transformer_blocks", 4)
    + _krea_block("txtfusion.layerwise_blocks", "text_fusion.layerwise_blocks", 1)
    + _krea_block("txtfusion.refiner_blocks", "text_fusion.refiner_blocks", 1)
    + """
    first = img_in
    tmlp.0 = time_embed.linear_1
    tmlp.2 = time_embed.linear_2
    tproj.1 = time_mod_proj
    txtmlp.1 = txt_in.linear_1
    txtmlp.3 = txt_in.linear_2
    txtfusion.projector = text_fusion.projector
    last.linear = final_layer.linear
"""
)

CLIP = """
    text_model.encoder.layers.#.self_attn.q_proj
    text_model.encoder.layers.#.self_attn.k_proj
    text_model.encoder.layers.#.self_attn.v_proj
    text_model.encoder.layers.#.self_attn.out_proj
    text_model.encoder.layers.#.mlp.fc1
    text_model.encoder.layers.#.mlp.fc2
    text_projection
    text_model.encoder.layers.#.self_attn.q_proj <- encoder.layers.#.self_attn.q_proj
    text_model.encoder.layers.#.self_attn.k_proj <- encoder.layers.#.self_attn.k_proj
    text_model.encoder.layers.#.self_attn.v_proj <- encoder.layers.#.self_attn.v_proj
    text_model.encoder.layers.#.self_attn.out_proj <- encoder.layers.#.self_attn.out_proj
    text_model.encoder.layers.#.mlp.fc1 <- encoder.layers.#.mlp.fc1
    text_model.encoder.layers.#.mlp.fc2 <- encoder.layers.#.mlp.fc2
"""

T5 = """
    encoder.block.#.layer.0.SelfAttention.q
    encoder.block.#.layer.0.SelfAttention.k
    encoder.block.#.layer.0.SelfAttention.v
    encoder.block.#.layer.0.SelfAttention.o
    encoder.block.#.layer.1.DenseReluDense.wi_0
    encoder.block.#.layer.1.DenseReluDense.wi_1
    encoder.block.#.layer.1.DenseReluDense.wo
"""
