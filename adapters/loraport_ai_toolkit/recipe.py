"""What ai-toolkit needs to run. It is a checkout, no package: it is started by the `run.py` in its folder."""

from __future__ import annotations

import re
from pathlib import Path

from loraport.envs import Checkout, Recipe, source_folder

REPOSITORY = "https://github.com/ostris/ai-toolkit"
#: The commit that the adapter was written for and tried with (docs/backends-verified/ai-toolkit.json).
COMMIT = "27a03a91f23eb1b757d5ec2e80ee3e129cfcc350"
#: Versions in its version.py that the adapter is for. 0.12.26 has the job database this adapter saves and stops by.
VERSIONS = ">=0.12.26,<0.13"
#: Environment variable that names a checkout.
CHECKOUT_VARIABLE = "LORAPORT_AI_TOOLKIT"

#: ai-toolkit's own pins of what an Ideogram training imports. Its checkout is not installed.
ENVIRONMENT = Recipe(
    package="optimum-quanto",
    versions=">=0.2.4,<0.3",
    module="optimum.quanto",
    python=">=3.10,<3.13",
    requirements=[
        "torch>=2.9",
        "torchvision",
        "torchaudio",
        "optimum-quanto==0.2.4",
        "torchao==0.10.0",
        "transformers==5.5.3",
        "huggingface_hub==1.23.0",
        "diffusers @ git+https://github.com/huggingface/diffusers.git@c943837899b16cbae2f619b8dd4f7bb6f07dd81a",
        "peft==0.18.1",
        "lycoris-lora==1.8.3",
        "accelerate",
        "albumentations==1.4.15",
        "albucore==0.0.16",
        "av==16.0.1",
        "bitsandbytes",
        "controlnet_aux==0.0.10",
        "einops",
        "flatten_json",
        "hf_transfer",
        "invisible-watermark",
        "kornia",
        "librosa==0.11.0",
        "lion-pytorch",
        "lpips",
        "matplotlib==3.10.1",
        "mutagen==1.47.0",
        "omegaconf",
        "open_clip_torch",
        "opencv-python",
        "oyaml",
        "prodigyopt",
        "pydantic",
        "python-dotenv",
        "python-slugify",
        "pytorch-wavelets==1.3.0",
        "pytorch_fid",
        "pyyaml",
        "safetensors",
        "scipy",
        "sentencepiece",
        "tensorboard",
        "timm==1.0.22",
        "toml",
        "torchcodec",
    ],
    checkout=Checkout(REPOSITORY, COMMIT),
)


def default_checkout() -> Path:
    """Where a checkout is looked for when none is named."""
    return source_folder("ai-toolkit")


def how_to_get_it() -> str:
    """What to do where there is no checkout."""
    return (
        "Get it with: loraport backends install ai-toolkit"
        f" — or name a checkout in the environment variable {CHECKOUT_VARIABLE}"
    )


def checkout_version(folder: Path) -> str | None:
    """The version that a checkout says it is, or None when the folder holds no ai-toolkit."""
    try:
        text = (folder / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"""VERSION\s*=\s*["']([^"']+)["']""", text)
    return found.group(1) if found and (folder / "run.py").is_file() else None


def checkout_problem(folder: Path) -> str | None:
    """Why ai-toolkit cannot be run from a folder, or None."""
    from packaging.specifiers import SpecifierSet

    version = checkout_version(folder)
    if version is None:
        return f"{folder} holds no ai-toolkit"
    if not SpecifierSet(VERSIONS).contains(version, prereleases=True):
        return f"{folder} holds ai-toolkit {version}; the adapter is for {VERSIONS}"
    if not (folder / "extensions_built_in" / "diffusion_models" / "ideogram4").is_dir():
        return f"{folder} holds an ai-toolkit without Ideogram 4"
    return None
