"""DiffSynth-Studio's training of Ideogram 4, started from outside, since its wheel ships no training script.

    python entry.py SETTINGS.json DIFFSYNTH-ARGUMENTS...

This runs in DiffSynth's own interpreter: the standard library and what DiffSynth brings, nothing of LoraPort's. The
training is DiffSynth's: its parsers, data set, pipeline, loss, logger and `launch_training_task`. What its arguments
have no word for is asked of the parameters of its public classes. SETTINGS.json holds:

    seed, steps, start   seed, optimizer steps in all, and those done before
    save_every, keep     optimizer steps between saves (0: only the last), and how many are kept
    alpha, rslora        the LoRA's scale is alpha / rank, or with rslora alpha / √rank
    timestep_mean, timestep_std   of its Ideogram 4 schedule, which is shifted for each image's size
    max_text_tokens      a longer caption ends the run before it begins
    checkpoint           folder of a local checkpoint, whose files are made known to DiffSynth; or null
    script               a checkout's training script to run instead; alpha and schedule are then its own

Lines that begin with `@loraport ` are events (docs/events.md), the one with `@loraport-error ` says why it ended.
SIGINT or SIGTERM: LoRA weights are saved after the optimizer step in progress, and the exit code is 130.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import runpy
import signal
import sys
import time
import types
from typing import Any

EXIT_CODES = {"DataError": 4, "BackendError": 5, "OutOfMemoryError": 6, "Interrupted": 130}


class Failure(Exception):
    """What ends the run, as one of LoraPort's kinds of error."""

    def __init__(self, kind: str, message: str, hint: str | None = None):
        super().__init__(message)
        self.kind, self.message, self.hint = kind, message, hint


class Stop:
    """Requests to stop. Before training there is nothing to save, so there it ends at once."""

    requested = False
    training = False

    def handle(self, number: int, frame: types.FrameType | None) -> None:
        if not self.training or self.requested:
            raise KeyboardInterrupt
        self.requested = True


def tell(kind: str, **fields: Any) -> None:
    say("@loraport ", {"type": kind, "time": time.time(), **fields})


def say(prefix: str, content: dict[str, Any]) -> None:
    """A line of its own, also where a progress bar has not ended its line."""
    print("\n" + prefix + json.dumps(content, ensure_ascii=False), flush=True)


def main(arguments: list[str]) -> int:
    with open(arguments[0], encoding="utf-8") as file:
        settings = json.load(file)
    stop = Stop()
    signal.signal(signal.SIGINT, stop.handle)
    signal.signal(signal.SIGTERM, stop.handle)
    # This file's folder holds modules of LoraPort's adapter, which no library must find by their plain names.
    sys.path[0] = os.path.dirname(os.path.abspath(settings["script"])) if settings["script"] else os.getcwd()
    try:
        train(settings, arguments[1:], stop)
    except Failure as failure:
        say("@loraport-error ", {"kind": failure.kind, "message": failure.message, "hint": failure.hint})
        return EXIT_CODES[failure.kind]
    except KeyboardInterrupt:
        return EXIT_CODES["Interrupted"]
    return 0


def train(settings: dict[str, Any], arguments: list[str], stop: Stop) -> None:
    tell("phase", phase="load", detail="DiffSynth-Studio")
    make_torchvision_importable()
    make_offloading_work_on_a_cpu()
    from accelerate.utils import set_seed

    # A resumed run must not draw the noise of its first session again. numpy takes 32 bits.
    set_seed((settings["seed"] + settings["start"]) % 2**32)
    if settings["checkpoint"]:
        register(settings["checkpoint"])
    logger_class = reporting_logger(settings, arguments, stop)
    if settings["script"]:
        import diffsynth.diffusion

        # The script takes its logger from there by name.
        diffsynth.diffusion.ModelLogger = logger_class
        sys.argv = [settings["script"], *arguments]
        runpy.run_path(settings["script"], run_name="__main__")
    else:
        run_task(settings, parse(arguments), logger_class)


def make_torchvision_importable() -> None:
    """PyPI's torchvision beside a CPU build of torch fails at the meta versions of its compiled operators, of which
    DiffSynth uses none: it resizes and crops in Python."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")


def make_offloading_work_on_a_cpu() -> None:
    """Where DiffSynth keeps weights on disk it empties the device's cache, which torch knows of accelerators only."""
    import torch

    if not hasattr(torch.cpu, "empty_cache"):
        setattr(torch.cpu, "empty_cache", lambda: None)  # noqa: B010 - the type checker knows what torch lacks


def parser() -> argparse.ArgumentParser:
    """DiffSynth's own options for training Ideogram 4."""
    from diffsynth.diffusion import add_general_config, add_image_size_config

    made = add_image_size_config(add_general_config(argparse.ArgumentParser(prog="diffsynth", allow_abbrev=False)))
    made.add_argument("--tokenizer_path", type=str, default=None, help="Tokenizer folder, or hub id and folder.")
    return made


def parse(arguments: list[str]) -> argparse.Namespace:
    return parser().parse_args(arguments)


def run_task(settings: dict[str, Any], args: argparse.Namespace, logger_class: Any) -> None:
    from accelerate import Accelerator
    from diffsynth.core import UnifiedDataset
    from diffsynth.diffusion import launch_data_process_task, launch_training_task

    # peft divides by the rank. DiffSynth writes its arguments beside the LoRA, which does not tell its scale by itself.
    args.lora_alpha = settings["alpha"] * (math.sqrt(args.lora_rank) if settings["rslora"] else 1)
    accelerator = Accelerator(gradient_accumulation_steps=args.gradient_accumulation_steps)
    dataset = UnifiedDataset(
        base_path=args.dataset_base_path,
        metadata_path=args.dataset_metadata_path,
        repeat=args.dataset_repeat,
        data_file_keys=args.data_file_keys.split(","),
        main_data_operator=UnifiedDataset.default_image_operator(
            base_path=args.dataset_base_path, max_pixels=args.max_pixels, height=args.height, width=args.width
        ),
    )
    if args.enable_model_cpu_offload and accelerator.device.type == "cpu":
        raise Failure("BackendError", "memory.offload: group needs a GPU.", "Set memory.offload: none.")
    tell("phase", phase="load", detail="models")
    module = training_module(settings, args, accelerator.device)
    if not dataset.load_from_cache:
        check_captions(module.pipe.tokenizer, [row["prompt"] for row in dataset.data], settings["max_text_tokens"])
    logger = logger_class(args.output_path, remove_prefix_in_ckpt=args.remove_prefix_in_ckpt)
    if args.task == "sft:data_process":
        tell("phase", phase="cache", detail="images and captions")
        module.total = len(dataset)
        launch_data_process_task(accelerator, dataset, module, logger, args=args)
    else:
        launch_training_task(accelerator, dataset, module, logger, args=args)


def training_module(settings: dict[str, Any], args: argparse.Namespace, device: Any) -> Any:
    """Ideogram 4 as DiffSynth trains it: what it would be given, and the loss that comes out."""
    import copy

    import torch
    from diffsynth.diffusion import DiffusionTrainingModule, FlowMatchSFTLoss
    from diffsynth.models.ideogram4_dit import Ideogram4Config
    from diffsynth.pipelines.ideogram4 import Ideogram4Pipeline

    class Ideogram4Training(DiffusionTrainingModule):
        def __init__(self) -> None:
            super().__init__()
            pipe = Ideogram4Pipeline.from_pretrained(
                torch_dtype=torch.bfloat16,
                device=device,
                model_configs=self.parse_model_configs(
                    args.model_paths,
                    args.model_id_with_origin_paths,
                    fp8_models=args.fp8_models,
                    offload_models=args.offload_models,
                    quant_options=args.quant_options,
                    device=device,
                ),
                tokenizer_config=self.parse_path_or_model_id(args.tokenizer_path),
            )
            if args.task == "sft:data_process" and pipe.dit is None:
                # Encoding asks the transformer for these two sizes, which all of Ideogram 4 share, and nothing else.
                pipe.dit = types.SimpleNamespace(patch_size=2, config=Ideogram4Config())
            self.pipe = self.split_pipeline_units(args.task, pipe, None, args.lora_base_model)
            self.switch_pipe_to_training_mode(
                self.pipe,
                None,
                args.lora_base_model,
                args.lora_target_modules,
                args.lora_rank,
                args.lora_checkpoint,
                args.preset_lora_path,
                args.preset_lora_model,
                task=args.task,
            )
            self.extra_inputs = args.extra_inputs.split(",") if args.extra_inputs else []
            self.schedules: dict[tuple[int, int], Any] = {}
            self.total = self.done = 0

        def parse_lora_target_modules(self, model: Any, lora_target_modules: str) -> list[str]:
            # DiffSynth would split it at commas, which a regular expression may hold.
            return [lora_target_modules]

        def add_lora_to_model(
            self, model: Any, target_modules: Any, lora_rank: int, lora_alpha: Any = None, upcast_dtype: Any = None
        ) -> Any:
            return super().add_lora_to_model(model, target_modules, lora_rank, args.lora_alpha, upcast_dtype)

        def schedule(self, height: int, width: int) -> Any:
            """DiffSynth's schedule for an image of this size."""
            if (height, width) not in self.schedules:
                made = copy.copy(self.pipe.scheduler)
                made.set_timesteps(
                    1000,
                    training=True,
                    image_resolution=(height, width),
                    mu=settings["timestep_mean"],
                    std=settings["timestep_std"],
                )
                self.schedules[height, width] = made
            return self.schedules[height, width]

        def inputs_of(self, data: dict[str, Any]) -> tuple[dict[str, Any], ...]:
            width, height = data["image"].size
            shared = {
                "input_image": data["image"],
                "height": height,
                "width": width,
                "cfg_scale": 1,
                "rand_device": self.pipe.device,
                "use_gradient_checkpointing": args.use_gradient_checkpointing,
                "use_gradient_checkpointing_offload": args.use_gradient_checkpointing_offload,
            }
            return self.parse_extra_inputs(data, self.extra_inputs, shared), {"prompt": data["prompt"]}, {}

        def forward(self, data: dict[str, Any], inputs: Any = None) -> Any:
            inputs = self.inputs_of(data) if inputs is None else inputs
            inputs = self.transfer_data_to_device(inputs, self.pipe.device, self.pipe.torch_dtype)
            for unit in self.pipe.units:
                inputs = self.pipe.unit_runner(unit, self.pipe, *inputs)
            if args.task == "sft:data_process":
                self.done += 1
                tell("progress", done=self.done, total=self.total)
                # Training would round to bf16 after reading; rounding before halves the files.
                return self.transfer_data_to_device(inputs, "cpu", self.pipe.torch_dtype)
            shared, positive, _ = inputs
            self.pipe.scheduler = self.schedule(shared["height"], shared["width"])
            return FlowMatchSFTLoss(self.pipe, **{**shared, **positive}) * shared.get("loss_weight", 1.0)

    return Ideogram4Training()


def check_captions(tokenizer: Any, captions: list[str], limit: int) -> None:
    """DiffSynth itself would notice a caption that is too long when it is its turn, in the middle of a run."""
    for caption in sorted(set(captions)):
        message = [{"role": "user", "content": [{"type": "text", "text": caption}]}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        count = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        if count > limit:
            raise Failure(
                "DataError",
                f"A caption has {count} tokens, more than dataset.max_text_tokens ({limit}): {caption[:80]}…",
                "Shorten that caption.",
            )


def reporting_logger(settings: dict[str, Any], arguments: list[str], stop: Stop) -> Any:
    """DiffSynth's logger, telling each optimizer step, saving by optimizer steps, and ending where it is asked to."""
    import torch
    from diffsynth.diffusion import ModelLogger

    args = parse(arguments)
    total, start = settings["steps"], settings["start"]

    class Reporter(ModelLogger):
        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **options)
            self.step, self.began = start, time.monotonic()
            self.losses: list[float] = []
            stop.training = args.task != "sft:data_process"

        def on_step_end(self, accelerator: Any, model: Any, save_steps: int | None = None, **results: Any) -> None:
            if not self.losses and self.step == start:
                tell("phase", phase="train", detail="")
            super().on_step_end(accelerator, model, None, **results)
            self.losses.append(float(results["loss"].detach().float().mean()))
            if not math.isfinite(self.losses[-1]):
                raise Failure(
                    "BackendError",
                    f"The loss became {self.losses[-1]} in step {self.step + 1}.",
                    "Start again with a lower train.learning_rate; the checkpoints before are kept.",
                )
            if accelerator.sync_gradients:
                self.step += 1
                self.tell_step()
                every = settings["save_every"]
                if self.step == total or stop.requested or (every and self.step % every == 0):
                    self.save_model(accelerator, model, f"step-{self.step:06d}.safetensors")
                if stop.requested and self.step < total:
                    raise KeyboardInterrupt

        def on_epoch_end(self, accelerator: Any, model: Any, epoch_id: int) -> None:
            pass

        def on_training_end(self, accelerator: Any, model: Any, save_steps: int | None = None) -> None:
            super().on_training_end(accelerator, model, None)

        def tell_step(self) -> None:
            seconds = time.monotonic() - self.began
            # torch.optim.lr_scheduler.ConstantLR, which DiffSynth makes with its defaults.
            warming = self.step - start <= 5
            peaks = {}
            if torch.cuda.is_available():
                peaks["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
                peaks["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
            tell(
                "step",
                step=self.step,
                total=total,
                loss=sum(self.losses) / len(self.losses),
                lr=args.learning_rate / 3 if warming else args.learning_rate,
                seconds=seconds,
                images_per_second=len(self.losses) / seconds,
                **peaks,
            )
            self.losses, self.began = [], time.monotonic()

        def save_model(self, accelerator: Any, model: Any, file_name: str) -> None:
            draft = f".{file_name}"
            super().save_model(accelerator, model, draft)
            path = os.path.join(self.output_path, file_name)
            os.replace(os.path.join(self.output_path, draft), path)
            tell("checkpoint", step=self.step, path=f"backend/{path}")
            saved = sorted(name for name in os.listdir(self.output_path) if name.startswith("step-"))
            for old in saved[: -settings["keep"]]:
                os.remove(os.path.join(self.output_path, old))

    return Reporter


def register(folder: str) -> None:
    """Make the files of a local checkpoint known to DiffSynth, which recognises models by a hash of their shapes."""
    from diffsynth.configs import MODEL_CONFIGS
    from diffsynth.core.loader import hash_model_file

    known = {config["model_hash"] for config in MODEL_CONFIGS}
    for part, file, describe in (
        ("transformer", "diffusion_pytorch_model.safetensors", describe_transformer),
        ("text_encoder", "model.safetensors", describe_text_encoder),
        ("vae", "diffusion_pytorch_model.safetensors", describe_vae),
    ):
        path = os.path.join(folder, part, file)
        found = hash_model_file(path)
        if found not in known:
            with open(os.path.join(folder, part, "config.json"), encoding="utf-8") as config:
                description = describe(json.load(config), os.path.dirname(path))
            MODEL_CONFIGS.append({"model_hash": found, **storage(path), **description})


def storage(path: str) -> dict[str, Any]:
    """How a file's weights are stored, where that is not plain numbers: the method, and the layers it was used on."""
    from diffsynth.core.loader.file import load_keys_dict

    keys = load_keys_dict(path)
    for mark, method, options in (
        (".weight_scale", "ideogram4_fp8", {}),
        # Its weights are written without a second quantisation of their scales.
        (".weight.quant_state.bitsandbytes__nf4", "bitsandbytes_nf4", {"compress_statistics": False}),
    ):
        layers = sorted(key.removesuffix(mark) for key in keys if key.endswith(mark))
        if layers:
            config = {"method": method, "load_prequantized": True, "target_modules": layers}
            return {"quant_config": {**config, "backend_config_kwargs": options}}
    return {}


def describe_transformer(config: dict[str, Any], folder: str) -> dict[str, Any]:
    sizes = {
        "emb_dim": config["num_attention_heads"] * config["attention_head_dim"],
        "num_layers": config["num_layers"],
        "num_heads": config["num_attention_heads"],
        "intermediate_size": config["intermediate_size"],
        "adanln_dim": config["adaln_dim"],
        "in_channels": config["in_channels"],
        "llm_features_dim": config["llm_features_dim"],
        "rope_theta": config["rope_theta"],
        "mrope_section": config["mrope_section"],
        "norm_eps": config["norm_eps"],
    }
    return {
        "model_name": "ideogram4_dit",
        "model_class": "diffsynth.models.ideogram4_dit.Ideogram4DiT",
        "extra_kwargs": {"config": sizes},
    }


def describe_text_encoder(config: dict[str, Any], folder: str) -> dict[str, Any]:
    converter = "diffsynth.utils.state_dict_converters.ideogram4_text_encoder.Ideogram4TextEncoderStateDictConverter"
    return {
        "model_name": "ideogram4_text_encoder",
        "model_class": "diffsynth.models.ideogram4_text_encoder.Ideogram4TextEncoder",
        "state_dict_converter": converter,
        "extra_kwargs": {"config_path": folder},
    }


def describe_vae(config: dict[str, Any], folder: str) -> dict[str, Any]:
    from diffsynth.models.flux2_vae import Flux2VAE

    # Releases name the number of groups differently.
    taken = inspect.signature(Flux2VAE).parameters
    sizes = {name: config[name] for name in ("latent_channels", "block_out_channels", "layers_per_block")}
    sizes["num_groups" if "num_groups" in taken else "norm_num_groups"] = config["norm_num_groups"]
    return {"model_name": "flux2_vae", "model_class": "diffsynth.models.flux2_vae.Flux2VAE", "extra_kwargs": sizes}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
