"""Starts ai-toolkit with its Ideogram 4 in the sizes of a small checkpoint: `python tiny_run.py CHECKOUT JOB`.

Runs in ai-toolkit's own interpreter, with the standard library alone; no package of LoraPort's is imported. ai-toolkit
has the sizes of Ideogram 4 as defaults of two classes. Once its module is loaded, those defaults become what the
checkpoint's own config.json files say, within this process; nothing in the checkout is changed.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import json
import runpy
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

MODULE = "extensions_built_in.diffusion_models.ideogram4.ideogram4"


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls `change` with ai-toolkit's module of Ideogram 4 as soon as it is loaded."""

    def __init__(self, change: Callable[[ModuleType], None]):
        self._change = change

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_and_change(module: ModuleType) -> None:
            load(module)
            self._change(module)

        setattr(spec.loader, "exec_module", load_and_change)  # noqa: B010 - the type checker sees a method
        return spec


def resize(module: Any, base: Path) -> None:
    """Give the module's two classes of sizes the defaults that the checkpoint in `base` has."""
    transformer = json.loads((base / "transformer" / "config.json").read_text(encoding="utf-8"))
    vae = json.loads((base / "vae" / "config.json").read_text(encoding="utf-8"))
    channels = vae["block_out_channels"]
    module.Ideogram4Config = functools.partial(
        module.Ideogram4Config,
        emb_dim=transformer["num_attention_heads"] * transformer["attention_head_dim"],
        num_layers=transformer["num_layers"],
        num_heads=transformer["num_attention_heads"],
        intermediate_size=transformer["intermediate_size"],
        adanln_dim=transformer["adaln_dim"],
        llm_features_dim=transformer["llm_features_dim"],
        mrope_section=tuple(transformer["mrope_section"]),
    )
    module.AutoEncoderParams = functools.partial(
        module.AutoEncoderParams,
        ch=channels[0],
        ch_mult=[each // channels[0] for each in channels],
        num_res_blocks=vae["layers_per_block"],
    )


def main() -> None:
    checkout, job = sys.argv[1:]
    model = json.loads(Path(job).read_text(encoding="utf-8"))["config"]["process"][0]["model"]
    sys.meta_path.insert(0, AfterImport(lambda module: resize(module, Path(model["name_or_path"]))))
    script = str(Path(checkout) / "run.py")
    # As if run.py had been started: its folder comes first, and this one, with its plain names, is not there.
    sys.path[0] = checkout
    sys.argv = [script, job]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
