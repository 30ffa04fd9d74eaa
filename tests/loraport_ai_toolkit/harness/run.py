"""Stands for ai-toolkit's run.py in a test's copy of its folder: the real one, where parts of it cannot be had.

Packages that it imports at the top and an Ideogram training never calls are replaced by empty ones when they are not
installed, and torchvision's operators, which a torch for CPUs lacks, are left out.
"""

import importlib.abc
import importlib.machinery
import importlib.util
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


if __name__ == "__main__":
    install()
    runpy.run_path(str(Path(__file__).with_name("real_run.py")), run_name="__main__")
