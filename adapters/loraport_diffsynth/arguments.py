"""DiffSynth's options as a shell script, or a list of arguments, gives them. No torch."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from loraport.errors import SpecError

Options = dict[str, str | bool]

FLAGS = {
    "use_gradient_checkpointing",
    "use_gradient_checkpointing_offload",
    "find_unused_parameters",
    "enable_lora_hot_loading",
    "enable_model_cpu_offload",
    "enable_optimizer_cpu_offload",
    "enable_tensorboard_log",
    "enable_swanlab_log",
    "enable_wandb_log",
    "enable_csv_log",
}

#: DiffSynth's own values where an option is left out.
DEFAULTS: Options = {
    "dataset_repeat": "1",
    "max_pixels": "1048576",
    "learning_rate": "1e-4",
    "num_epochs": "1",
    "weight_decay": "0.01",
    "task": "sft",
    "customized_optimizer": "torch.optim.AdamW",
    "output_path": "./models",
    "lora_rank": "32",
    "gradient_accumulation_steps": "1",
}


def parse(arguments: list[str]) -> Options:
    """Options by name, without dashes; the last one counts. Raises SpecError for what is no option."""
    found: Options = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise SpecError(f"{word!r} is not an option of DiffSynth's training.")
        name, equals, value = word[2:].partition("=")
        if name in FLAGS:
            found[name] = True
        elif equals:
            found[name] = value
        elif rest:
            found[name] = rest.pop(0)
        else:
            raise SpecError(f"--{name} lacks its value.")
    return found


def commands_in(text: str, path: Path) -> list[Options]:
    """The options of each command in a shell script that runs a train.py. Its plain variables are filled in."""
    variables: dict[str, str] = {}
    found = []
    for line in re.sub(r"\\\r?\n", " ", text).splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise SpecError(f"{path}: this line is not shell: {line.strip()[:80]} ({error})") from error
        words = [_filled(word, variables) for word in words]
        if words and words[0] == "export":
            words = words[1:]
        assigned = [re.fullmatch(r"([A-Za-z_]\w*)=(.*)", word, re.DOTALL) for word in words]
        if words and all(assigned):
            variables |= {match[1]: match[2] for match in assigned if match}
            continue
        start = next((n for n, word in enumerate(words) if word.endswith("train.py")), None)
        if start is not None:
            found.append(parse(words[start + 1 :]))
    if not found:
        raise SpecError(f"{path} holds no command that runs DiffSynth's train.py.")
    return found


def _filled(word: str, variables: dict[str, str]) -> str:
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda found: variables.get(found[1] or found[2], found[0]), word)
