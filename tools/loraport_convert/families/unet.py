"""The U-Net of Stable Diffusion: its two ways of counting blocks.

The original counts every layer of the way down and up in one list; diffusers counts stages, and layers within them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

_RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_TRANSFORMER = ["proj_in", "proj_out"] + [
    f"transformer_blocks.#.{module}"
    for module in (
        *(f"{attention}.{each}" for attention in ("attn1", "attn2") for each in ("to_q", "to_k", "to_v", "to_out.0")),
        "ff.net.0.proj",
        "ff.net.2",
    )
]
_NORMS = {"in_layers.0": "norm1", "out_layers.0": "norm2"}
_TRANSFORMER_NORMS = ("norm", *(f"transformer_blocks.#.norm{number}" for number in (1, 2, 3)))
_ENDS = {
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
}
_ADDED = {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
_LAYERS = 2  # resnets in a stage on the way down; on the way up there is one more


def unet_table(attention: Sequence[bool], added: bool) -> str:
    """The rules of a U-Net whose stages on the way down have `attention` or not, the way up being its mirror image.
    `added` says that it is told sizes besides the text, as SDXL is."""
    return "\n".join(_rules(attention, added))


def unet_norms(attention: Sequence[bool]) -> str:
    """The rules of its norms."""
    rules = list(_rules(attention, added=False))
    lines = ["out.0 = conv_norm_out"]
    for rule in rules:
        native, _, source = rule.partition(" = ")
        if native.endswith(".in_layers.2"):
            one, other = native.removesuffix(".in_layers.2"), source.removesuffix(".conv1")
            lines += [f"{one}.{mine} = {other}.{theirs}" for mine, theirs in _NORMS.items()]
        elif native.endswith(".proj_in"):
            one, other = native.removesuffix(".proj_in"), source.removesuffix(".proj_in")
            lines += [f"{one}.{norm} = {other}.{norm}" for norm in _TRANSFORMER_NORMS]
    return "\n".join(lines)


def _rules(attention: Sequence[bool], added: bool) -> Iterator[str]:
    stages = len(attention)
    for stage, attends in enumerate(attention):
        for layer in range(_LAYERS):
            block = 1 + stage * (_LAYERS + 1) + layer
            yield from _resnet(f"input_blocks.{block}.0", f"down_blocks.{stage}.resnets.{layer}")
            if attends:
                yield from _transformer(f"input_blocks.{block}.1", f"down_blocks.{stage}.attentions.{layer}")
        if stage < stages - 1:
            yield f"input_blocks.{(stage + 1) * (_LAYERS + 1)}.0.op = down_blocks.{stage}.downsamplers.0.conv"
    for resnet, block in enumerate((0, 2)):
        yield from _resnet(f"middle_block.{block}", f"mid_block.resnets.{resnet}")
    yield from _transformer("middle_block.1", "mid_block.attentions.0")
    for stage, attends in enumerate(reversed(attention)):
        for layer in range(_LAYERS + 1):
            block = stage * (_LAYERS + 1) + layer
            yield from _resnet(f"output_blocks.{block}.0", f"up_blocks.{stage}.resnets.{layer}")
            if attends:
                yield from _transformer(f"output_blocks.{block}.1", f"up_blocks.{stage}.attentions.{layer}")
        if stage < stages - 1:
            last = stage * (_LAYERS + 1) + _LAYERS
            yield f"output_blocks.{last}.{2 if attends else 1}.conv = up_blocks.{stage}.upsamplers.0.conv"
    for native, source in (_ENDS | (_ADDED if added else {})).items():
        yield f"{native} = {source}"


def _resnet(native: str, source: str) -> Iterator[str]:
    for one, other in _RESNET.items():
        yield f"{native}.{one} = {source}.{other}"


def _transformer(native: str, source: str) -> Iterator[str]:
    for module in _TRANSFORMER:
        yield f"{native}.{module} = {source}.{module}"
        if module.endswith("to_out.0"):
            yield f"{native}.{module} <- {source}.{module.removesuffix('.0')}"
