"""Stands for ai-toolkit's run.py in a test's copy of its folder: the real one, where parts of it cannot be had.

Packages that it imports at the top and an Ideogram training never calls are replaced by empty ones when they are not
installed, and torchvision's operators, which a torch for CPUs lacks, are left out. With HARNESS_TINY set, ai-toolkit
takes the small checkpoint that the job names, and notes in the run folder how many images its model was given.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import runpy
import sys
import types
from pathlib import Path

UNUSED = ("torchaudio", "torchcodec", "albumentations", "lpips", "open_clip", "controlnet_aux", "imwatermark")


class _Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class Anything(metaclass=_Anything):
    """Whatever such a package is asked for at import."""


class _Empty(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Comes last, so a package that is installed is the real one."""

    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in UNUSED:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = _Empty(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module):
        pass


def install():
    import torch

    if not torch.cuda.is_available():
        sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
    # transformers looks which of them are there once, and must see the truth.
    import transformers.models.t5.modeling_t5  # noqa: F401

    sys.meta_path.append(_Finder())


def take_a_tiny_checkpoint():
    sys.path.append(os.environ["HARNESS_TINY"])
    import tiny_run

    base = json.loads(Path(sys.argv[1]).read_text())["config"]["process"][0]["model"]["name_or_path"]

    def change(module):
        if Path(base).name != "tiny":  # for that one tiny_run has been started itself
            tiny_run.resize(module, Path(base))
        predict = module.Ideogram4Model.get_noise_prediction

        def counted(self, latent_model_input, *arguments, **options):
            with open("images-seen", "a") as file:
                file.write(f"{len(latent_model_input)}\n")
            return predict(self, latent_model_input, *arguments, **options)

        module.Ideogram4Model.get_noise_prediction = counted

    sys.meta_path.insert(0, tiny_run.AfterImport(change))


if __name__ == "__main__":
    install()
    if "HARNESS_TINY" in os.environ:
        take_a_tiny_checkpoint()
    runpy.run_path(str(Path(__file__).with_name("real_run.py")), run_name="__main__")
