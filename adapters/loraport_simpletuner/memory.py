"""What SimpleTuner makes of `memory` and of `train.gpus`: its keys, and what is said of each field.

Read at 4.8.0 and 4.10.1. Of what its documentation offers, three things do not reach Ideogram 4, whose loader and
transformer are its own: `nf4-bnb` (for the transformer or the text encoder), Musubi block swap, and RamTorch.
"""

from __future__ import annotations

from typing import Any

from loraport.planning import VerdictTable
from loraport.spec.models import TrainSpec
from loraport_simpletuner import mapping
from loraport_simpletuner.recipe import has_group_offload

#: What the fp8 Linears of an Ideogram checkpoint multiply in: "1" is fp8, "0" the dtype of the model.
SCALED_MM = "SIMPLETUNER_IDEOGRAM_FP8_SCALED_MM"

#: How a text encoder that is not stored quantised is quantised.
_TEXT_ENCODER = {"none": "no_change", "fp8": "fp8wo-torchao", "int8": "int8-torchao"}
_COMPUTES = {"none": ["model"], "fp8": ["model", "fp8"], "int8": ["model", "int8"], "nf4": ["model"]}
#: Modes of torch.compile that record CUDA graphs (`torch._inductor.list_mode_options`).
_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
#: Every second block is recomputed where the spec says selective.
_SELECTIVE_INTERVAL = 2


def keys(spec: TrainSpec) -> dict[str, Any]:
    """The part of config.json that says how the model fits and runs fast; see `mapping.base_of` for the weights."""
    memory = spec.memory
    compiled, offloaded = memory.compile != "none", memory.offload != "none"
    found: dict[str, Any] = {
        "text_encoder_1_precision": _text_encoder_precision(spec),
        "gradient_checkpointing": memory.gradient_checkpointing != "none",
        "gradient_checkpointing_backend": "unsloth" if memory.offload == "group+activations" else "torch",
        "dynamo_backend": "inductor" if compiled else "no",
        "dynamo_use_regional_compilation": memory.compile == "regional",
        "ramtorch": False,
    }
    if memory.gradient_checkpointing == "selective":
        found["gradient_checkpointing_interval"] = _SELECTIVE_INTERVAL
    if not has_group_offload(mapping.version_of(spec)):
        return found | {"musubi_blocks_to_swap": 0}
    found |= {
        "enable_group_offload": offloaded,
        "group_offload_type": "block_level",
        "group_offload_blocks_per_group": 1,
        "group_offload_use_stream": True,
    }
    return found | ({"group_offload_to_disk_path": "cache/offload"} if memory.offload == "disk" else {})


def environment(spec: TrainSpec) -> dict[str, str]:
    """Variables of SimpleTuner's process. Left alone, it multiplies in fp8 on cards of compute capability 8.9 only."""
    return {SCALED_MM: "1" if spec.memory.compute == "fp8" else "0"}


def arguments(spec: TrainSpec) -> list[str]:
    """What the interpreter is started with: SimpleTuner itself, or accelerate's launcher for several GPUs."""
    trainer = ["-m", "simpletuner.train"]
    if spec.train.gpus == 1:
        return trainer
    launcher = [
        "--multi_gpu",
        f"--num_processes={spec.train.gpus}",
        "--num_machines=1",
        f"--mixed_precision={mapping.MIXED_PRECISION[spec.model.dtype]}",
        "--dynamo_backend=no",
    ]
    return ["-m", "accelerate.commands.launch", *launcher, *trainer]


def judge(table: VerdictTable) -> None:
    """The verdicts on `memory` and `train.gpus`."""
    table.exact("memory.profile", "memory.quantize", reason="already filled into the fields below")
    _storage(table)
    _compute(table)
    _text_encoder(table)
    _offload(table)
    table.choose(
        "memory.compile",
        ["none", "regional", "full"],
        "dynamo_backend, with dynamo_use_regional_compilation for regional",
        "choose one of these",
    )
    checkpointing = table.spec.memory.gradient_checkpointing
    if checkpointing in ("none", "full"):
        table.exact("memory.gradient_checkpointing", reason="gradient_checkpointing: every block, or none")
    elif checkpointing == "selective":
        table.approximated(
            "memory.gradient_checkpointing",
            reason=f"gradient_checkpointing_interval: {_SELECTIVE_INTERVAL}: every second block is recomputed, whole",
        )
    else:
        table.approximated("memory.gradient_checkpointing", reason="full: SimpleTuner does not look at the memory")
    if table.spec.train.gpus > 1 and table.spec.memory.offload != "none":
        table.refused("train.gpus", reason="blocks are offloaded on one GPU only: set memory.offload: none, or gpus: 1")
    else:
        table.exact("train.gpus", reason="accelerate launch --num_processes, each with a batch of its own")


def conflict(spec: TrainSpec) -> str | None:
    """Why keys that the user adds by hand (`backend.options.config`) cannot be used, or None."""
    config = spec.backend.options.get("config", {})
    precision = str(config.get("base_model_precision", ""))
    if precision == "nf4-bnb":
        return (
            "base_model_precision: nf4-bnb quantises nothing of Ideogram: set memory.quantize: nf4 and "
            f"model.checkpoint: {mapping.OFFICIAL['nf4']}"
        )
    if config.get("text_encoder_1_precision") == "nf4-bnb":
        return (
            "text_encoder_1_precision: nf4-bnb quantises nothing of Ideogram: leave it out and set memory.text_encoder"
        )
    if "quanto" in precision and (spec.memory.offload != "none" or config.get("enable_group_offload")):
        moved = "enable_group_offload" if spec.memory.offload == "none" else f"memory.offload: {spec.memory.offload}"
        return (
            f"base_model_precision: {precision} with {moved}: quanto's weights cannot be moved by group offloading; "
            "leave it out and set memory.quantize"
        )
    mode = config.get("dynamo_mode")
    if mode in _CUDA_GRAPHS and spec.lora.type == "lora":
        return f"dynamo_mode: {mode} records CUDA graphs, whose memory PEFT's LoRA layers overwrite: leave it out"
    for key in ("musubi_blocks_to_swap", "ramtorch"):
        if config.get(key):
            return f"{key}: SimpleTuner's Ideogram transformer has none, and blocks left on the CPU end the run"
    return None


def _storage(table: VerdictTable) -> None:
    base = mapping.base_of(table.spec)
    if isinstance(base, str):
        table.refused("memory.storage", reason=base)
    elif base.upcast:
        table.exact("memory.storage", reason="fp8 weights of the checkpoint are unpacked")
    elif base.precision == "no_change":
        table.exact("memory.storage", reason="the checkpoint's own, kept as it is")
    else:
        table.approximated("memory.storage", reason=f"base_model_precision: {base.precision}, beyond the blocks too")


def _compute(table: VerdictTable) -> None:
    memory, base = table.spec.memory, mapping.base_of(table.spec)
    possible = _COMPUTES[memory.storage or "none"]
    own = isinstance(base, mapping.Base) and base.precision == "no_change"
    if memory.compute not in possible:
        table.refused(
            "memory.compute",
            reason=f"with memory.storage: {memory.storage} only {' or '.join(possible)}: set it so, or choose native",
        )
    elif memory.compute == "model":
        table.exact("memory.compute", reason=f"{SCALED_MM}=0" if own else "mixed_precision")
    elif own:
        table.approximated(
            "memory.compute",
            reason=f"{SCALED_MM}=1: forward in fp8, with one scale for all of an activation; backward in model.dtype",
        )
    else:
        table.approximated("memory.compute", reason="torchao's dynamic quantisation of activations, forward only")


def _text_encoder(table: VerdictTable) -> None:
    wanted, stored = table.spec.memory.text_encoder or "none", _stored_text_encoder(table.spec)
    if stored is not None and wanted == stored:
        table.exact("memory.text_encoder", reason="the checkpoint's own, kept as it is")
    elif stored is not None:
        table.defaulted("memory.text_encoder", reason=f"{stored}: kept as the checkpoint stores it")
    elif wanted == "none":
        table.exact("memory.text_encoder", reason="text_encoder_1_precision: no_change")
    elif wanted in _TEXT_ENCODER:
        table.approximated(
            "memory.text_encoder",
            reason=f"text_encoder_1_precision: {_TEXT_ENCODER[wanted]}, where the folder's own is not quantised yet",
        )
    else:
        table.refused(
            "memory.text_encoder",
            reason="SimpleTuner quantises Ideogram's text encoder to nf4 in no way: set it to fp8 or int8",
        )


def _offload(table: VerdictTable) -> None:
    memory = table.spec.memory
    if memory.offload == "none":
        table.exact("memory.offload", reason="every block stays on the device")
    elif not has_group_offload(mapping.version_of(table.spec)):
        table.refused(
            "memory.offload",
            reason="SimpleTuner cannot: group offloading left it in 4.9, and its Ideogram has neither block swap nor "
            "RamTorch. Set memory.offload: none with memory.quantize: nf4, or choose native",
        )
    elif memory.offload == "group+activations" and memory.gradient_checkpointing == "none":
        table.refused(
            "memory.offload",
            reason="SimpleTuner offloads only what checkpointing saves: set memory.gradient_checkpointing: full",
        )
    elif memory.offload in _GROUP_OFFLOAD:
        table.approximated("memory.offload", reason=f"diffusers' group offloading{_GROUP_OFFLOAD[memory.offload]}")
    else:
        table.refused("memory.offload", reason=f"only none, {', '.join(_GROUP_OFFLOAD)}; choose one of these")


#: What SimpleTuner before 4.9 can offload, and how it differs.
_GROUP_OFFLOAD = {
    "group": ", which waits for each block while activations are recomputed; CUDA only",
    "group+activations": " with gradient_checkpointing_backend: unsloth; CUDA only",
    "disk": " with group_offload_to_disk_path; CUDA only",
}


def _stored_text_encoder(spec: TrainSpec) -> str | None:
    """How the text encoder is stored in the official checkpoint that is loaded; None for any other checkpoint."""
    base = mapping.base_of(spec)
    checkpoint = base.checkpoint if isinstance(base, mapping.Base) else spec.model.checkpoint
    return next((name for name, official in mapping.OFFICIAL.items() if official == checkpoint), None)


def _text_encoder_precision(spec: TrainSpec) -> str:
    stored = _stored_text_encoder(spec)
    return "no_change" if stored is not None else _TEXT_ENCODER[spec.memory.text_encoder or "none"]
