"""Where things lie in the run folder, relative to it.

ai-toolkit runs with the run folder as its working folder and is given these relative paths: it looks for words like
`_cn` in the whole path of a save and then does not resume from it, so no folder name of the user's may be in there.
"""

from __future__ import annotations

CONFIG = "backend/config.yaml"  #: the generated configuration, as `loraport plan` shows it
LAUNCH = "backend/launch.json"  #: what the launcher is to do
JOB = "backend/job.json"  #: the configuration with what only the disk knows filled in; ai-toolkit reads this one
DATABASE = "backend/job.db"  #: the job as ai-toolkit's web interface would keep it
VALIDATION = "backend/validation"
CONVERTED = "backend/converted"  #: images that ai-toolkit would not read, or would read otherwise, as PNG
TEXT_ENCODER = "backend/text_encoder"  #: links to a local text encoder and its tokenizer
TINY = "backend/tiny"  #: the checkpoint that the spec calls tiny
OUTPUT = "backend/output"

#: What ai-toolkit itself writes beside its saves. It takes whatever begins with the job's name for a save of the job.
_OWN_FILES = ("config.yaml", "optimizer.pt", "loss_log.db", "samples", "learnable_snr.json")


def set_folder(label: str) -> str:
    """A set's staged images and captions, by its label; ai-toolkit's caches come to lie beside them."""
    return f"backend/{'dataset' if label == 'images' else label}"


def job_name(name: str) -> str:
    """The job's name for a run: the run's own, unless ai-toolkit would mistake a file of its own for a save of it."""
    return f"lora-{name}" if any(file.startswith(name) for file in _OWN_FILES) else name


def save_folder(name: str) -> str:
    """Where ai-toolkit saves, for a run's name."""
    return f"{OUTPUT}/{job_name(name)}"
