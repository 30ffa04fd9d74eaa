"""An ai-toolkit extension: its Ideogram 4 with the sizes of the checkpoint's own configuration files."""

import json
from pathlib import Path

from extensions_built_in.diffusion_models.ideogram4 import ideogram4
from extensions_built_in.diffusion_models.ideogram4.ideogram4 import Ideogram4Model


class TinyIdeogram4(Ideogram4Model):
    """Everything is the real class's; only the two classes of sizes it fills in are given other sizes."""

    arch = "loraport_tiny"

    def _load_transformer(self, base):
        sizes = json.loads((Path(base) / "transformer" / "config.json").read_text())
        real = ideogram4.Ideogram4Config
        ideogram4.Ideogram4Config = lambda: real(
            emb_dim=sizes["num_attention_heads"] * sizes["attention_head_dim"],
            num_layers=sizes["num_layers"],
            num_heads=sizes["num_attention_heads"],
            intermediate_size=sizes["intermediate_size"],
            adanln_dim=sizes["adaln_dim"],
            llm_features_dim=sizes["llm_features_dim"],
            mrope_section=tuple(sizes["mrope_section"]),
        )
        try:
            return super()._load_transformer(base)
        finally:
            ideogram4.Ideogram4Config = real

    def _load_vae(self, base):
        sizes = json.loads((Path(base) / "vae" / "config.json").read_text())
        real = ideogram4.AutoEncoderParams
        channels = sizes["block_out_channels"]
        ideogram4.AutoEncoderParams = lambda: real(
            ch=channels[0],
            ch_mult=[each // channels[0] for each in channels],
            num_res_blocks=sizes["layers_per_block"],
        )
        try:
            return super()._load_vae(base)
        finally:
            ideogram4.AutoEncoderParams = real


AI_TOOLKIT_MODELS = [TinyIdeogram4]
