"""Makes SimpleTuner take the tiny checkpoint, from within its own process: sizes, and memory that a CPU cannot pin.

SimpleTuner's Ideogram has its sizes written into dataclasses. When their modules are imported, the defaults become
those of the checkpoint in TINY_CHECKPOINT. Put on the path by the tests' wrapper interpreter, and by nothing else.
"""

import importlib.abc
import importlib.util
import json
import os
import sys
from pathlib import Path

_PACKAGE = "simpletuner.helpers.models.ideogram"


def _sizes():
    root = Path(os.environ["TINY_CHECKPOINT"])
    transformer = json.loads((root / "transformer" / "config.json").read_text())
    vae = json.loads((root / "vae" / "config.json").read_text())
    channels = vae["block_out_channels"]
    return {
        f"{_PACKAGE}.transformer": (
            "Ideogram4Config",
            {
                "emb_dim": transformer["attention_head_dim"] * transformer["num_attention_heads"],
                "num_layers": transformer["num_layers"],
                "num_heads": transformer["num_attention_heads"],
                "intermediate_size": transformer["intermediate_size"],
                "adanln_dim": transformer["adaln_dim"],
                "llm_features_dim": transformer["llm_features_dim"],
                "mrope_section": tuple(transformer["mrope_section"]),
            },
        ),
        f"{_PACKAGE}.autoencoder": (
            "AutoEncoderParams",
            {
                "ch": channels[0],
                "ch_mult": [width // channels[0] for width in channels],
                "num_res_blocks": vae["layers_per_block"],
            },
        ),
    }


class _Shrink(importlib.abc.MetaPathFinder):
    def __init__(self, sizes):
        self.sizes = sizes

    def find_spec(self, name, path=None, target=None):
        if name not in self.sizes:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            cls, changes = self.sizes[name]
            init = getattr(module, cls).__init__
            names = init.__code__.co_varnames[1 : init.__code__.co_argcount]
            defaults = dict(zip(names[-len(init.__defaults__) :], init.__defaults__, strict=True)) | changes
            init.__defaults__ = tuple(defaults.values())

        spec.loader.exec_module = exec_module
        return spec


class _NoPinning(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.startswith("simpletuner"):
            sys.meta_path.remove(self)
            import torch

            torch.Tensor.pin_memory = lambda self, *_, **__: self
        return


if "TINY_CHECKPOINT" in os.environ:
    sys.meta_path[:0] = [_Shrink(_sizes()), _NoPinning()]
