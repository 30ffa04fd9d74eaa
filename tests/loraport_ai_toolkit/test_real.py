"""The real ai-toolkit: its parsers, its caption code, and trainings on a CPU; see docs/ai-toolkit.md."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ai_toolkit_specs import GOLDEN
from equal_work import native_work, work_of

from loraport.dataset import scan
from loraport.planning import Kind
from loraport.spec.models import TrainSpec, value_at
from loraport_ai_toolkit import layout
from loraport_ai_toolkit.capabilities import INT8_COMPUTE, QTYPES, matching_modules, verdicts
from loraport_ai_toolkit.captions import staged
from loraport_ai_toolkit.job import _local_text_encoder
from loraport_ai_toolkit.launch import TINY_RUN
from loraport_ai_toolkit.translate import NO_CLIPPING, config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

Ask = Callable[[dict[str, Any]], dict[str, Any]]
IMAGES = Path(__file__).parents[2] / "examples" / "quickstart" / "images"

#: What LoraPort does itself, or what being off means nothing to ai-toolkit.
OURS = {
    "version",
    "name",
    "model.family",
    "model.revision",
    "dataset.path",
    "dataset.sets",
    "dataset.caption_field",
    "dataset.default_caption",
    "dataset.trigger_word",
    "dataset.upscale",
    "dataset.max_text_tokens",
    "dataset.regularization.path",
    "dataset.regularization.caption_ext",
    "dataset.regularization.repeats",
    "lora.rslora",
    "lora.dora",
    "train.lr_cycles",
    "memory.profile",
    "save.every",
    "validation.every",
    "validation.images",
    "validation.path",
    "backend.name",
    "backend.python",
    "backend.options",
}


#: Of the fields of sets, those that ai-toolkit has a key for; the others are ours, as staged.
OF_SETS = {
    "resolution": "resolution",
    "repeats": "num_repeats",
    "flip": "flip_x",
    "caption_dropout": "caption_dropout_rate",
    "loss_weight": "loss_multiplier",
}


def norm(spec: TrainSpec, parsed: dict[str, Any]) -> float:
    found = parsed["train"]["max_grad_norm"]
    return 0.0 if found == NO_CLIPPING else found / spec.train.gradient_accumulation


def found_in(spec: TrainSpec, parsed: dict[str, Any], path: str) -> Any:
    """The value that ai-toolkit's parsed objects hold for a field."""
    network, train, model, save, sample = (parsed[name] for name in ("network", "train", "model", "save", "sample"))
    dataset = parsed["datasets"][0]
    if path.startswith("dataset.sets["):
        number, field = re.fullmatch(r"dataset\.sets\[(\d+)\]\.(\w+)", path).groups()  # type: ignore[union-attr]
        return parsed["datasets"][int(number)][OF_SETS[field]]
    values: dict[str, Callable[[], Any]] = {
        "model.checkpoint": lambda: model["name_or_path"],
        "model.dtype": lambda: train["dtype"],
        "dataset.repeats": lambda: dataset["num_repeats"],
        "dataset.resolution": lambda: dataset["resolution"],
        "dataset.flip": lambda: dataset["flip_x"],
        "dataset.caption_dropout": lambda: dataset["caption_dropout_rate"],
        "dataset.regularization.weight": lambda: (
            parsed["datasets"][-1]["loss_multiplier"] if spec.dataset.regularization.path else 1.0
        ),
        "lora.type": lambda: network["type"],
        "lora.rank": lambda: network["linear"],
        "lora.dropout": lambda: network["dropout"] or 0.0,
        "lora.factor": lambda: network["lokr_factor"],
        "train.steps": lambda: train["steps"],
        "train.batch_size": lambda: train["batch_size"],
        "train.gradient_accumulation": lambda: train["gradient_accumulation"],
        "train.learning_rate": lambda: train["lr"],
        "train.optimizer": lambda: train["optimizer"],
        "train.weight_decay": lambda: train["optimizer_params"]["weight_decay"],
        "train.max_grad_norm": lambda: norm(spec, parsed),
        "train.seed": lambda: parsed["process"]["training_seed"],
        "train.ema_decay": lambda: train["ema_config"]["ema_decay"] if train["ema_config"]["use_ema"] else 0.0,
        "memory.gradient_checkpointing": lambda: "full" if train["gradient_checkpointing"] else "none",
        "save.keep": lambda: save["max_step_saves_to_keep"],
        "save.dtype": lambda: save["dtype"],
        "sample.every": lambda: sample["sample_every"],
        "sample.prompts": lambda: [one["prompt"] for one in sample["samples"]],
        "sample.steps": lambda: sample["sample_steps"],
        "sample.guidance": lambda: sample["guidance_scale"],
        "sample.width": lambda: sample["width"],
        "sample.height": lambda: sample["height"],
        "sample.seed": lambda: sample["seed"],
    }
    return values[path]()


def check_schedule(spec: TrainSpec, rates: list[float]) -> None:
    """The rate of each step by ai-toolkit's classes is the one the spec's words mean."""
    steps, warm = spec.train.steps, spec.train.warmup_steps
    shape = {
        "constant": lambda done: min(1.0, done / warm) if warm else 1.0,
        "linear": lambda done: 1 - done / steps,
        "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done / steps)),
    }[spec.train.lr_scheduler]
    for done, rate in enumerate(rates):
        assert rate == pytest.approx(spec.train.learning_rate * shape(done), abs=1e-9)


def test_a_field_called_exact_is_found_with_that_value_by_ai_toolkits_own_classes(ask: Ask, tmp_path: Path) -> None:
    paths = []
    for case, spec in GOLDEN.items():
        paths.append(str(tmp_path / f"{case}.json"))
        Path(paths[-1]).write_text(json.dumps(config(spec)))

    answers = ask({"configs": paths})["configs"]

    for (case, spec), parsed in zip(GOLDEN.items(), answers, strict=True):
        kinds = {verdict.path: verdict.kind for verdict in verdicts(spec)}
        special = {"lora.alpha", "lora.targets", "train.lr_scheduler", "train.warmup_steps", "train.gpus"}
        special |= {path for path in kinds if path.startswith("memory.")} - {"memory.gradient_checkpointing"}
        special |= {path for path in kinds if "sets[" in path and path.rpartition(".")[2] not in OF_SETS}
        for path in (path for path, kind in kinds.items() if kind is Kind.EXACT and path not in OURS | special):
            assert found_in(spec, parsed, path) == value_at(spec, path), f"{case}: {path}"
        model = parsed["model"]
        assert parsed["network"]["linear_alpha"] == spec.lora.rank
        assert model["quantize"] is (spec.memory.storage != "none")
        assert model["quantize_te"] is (spec.memory.text_encoder != "none")
        offloaded = spec.memory.offload == "group"
        assert model["layer_offloading"] is offloaded
        for name, stored in (("qtype", spec.memory.storage), ("qtype_te", spec.memory.text_encoder)):
            if stored != "none":
                computed = name == "qtype" and spec.memory.compute == "int8"
                qtype = INT8_COMPUTE if computed else QTYPES[stored or ""]
                assert model[name] == ("float8" if offloaded and qtype == "qfloat8" else qtype)
        assert model["compile"] is (spec.memory.compile != "none")
        assert model["block_compile"] is (spec.memory.compile == "regional")
        assert parsed["train"]["noise_scheduler"] == "flowmatch"
        if kinds["train.warmup_steps"] is Kind.EXACT and kinds["train.lr_scheduler"] is Kind.EXACT:
            check_schedule(spec, parsed["rates"])


def test_every_key_that_is_written_is_read(ask: Ask) -> None:
    read = ask({})["read"]
    for case, spec in GOLDEN.items():
        process = config(spec)["config"]["process"][0]
        for section, keys in read.items():
            here: Any = process
            for part in () if section == "process" else section.split("."):
                here = here.get(part, {})
            for one in here if isinstance(here, list) else [here]:
                assert set(one) <= set(keys), f"{case}: {section}"


def test_captions_are_read_as_they_are_by_ai_toolkits_own_code(ask: Ask) -> None:
    captions = [item.caption for item in scan(IMAGES, "json")]
    captions += ["a red house, in the rain, at night", "no comma", "häuser, 夜"]
    captions += ['{"compositional_deconstruction":{"background":"a [trigger], on [name]","elements":[]}}']

    assert ask({"captions": [staged(caption) for caption in captions]})["captions"] == captions


def test_a_text_encoder_in_fp8_would_be_loaded_without_its_scales(ask: Ask, tmp_path: Path) -> None:
    from loraport_native.tiny import write_tiny

    folders = [write_tiny(tmp_path / name, "official", fp8=name == "fp8") / "text_encoder" for name in ("bf16", "fp8")]

    plain, fp8 = ask({"text_encoders": [str(folder) for folder in folders]})["text_encoders"]

    assert fp8 > 100 * plain
    assert _local_text_encoder(folders[1].parent, tmp_path) is None
    assert _local_text_encoder(folders[0].parent, tmp_path) == layout.TEXT_ENCODER


def write_spec(tmp_path: Path, ai_toolkit: dict[str, Path], **sections: dict[str, Any]) -> Path:
    content: dict[str, Any] = {
        "version": 1,
        "name": "tiny run".replace(" ", "_"),
        "model": {"checkpoint": str(tmp_path / "tiny checkpoint, ü"), "dtype": "fp32"},
        "dataset": {"path": str(IMAGES), "resolution": 64, "trigger_word": "zork", "caption_dropout": 0.1},
        "lora": {"rank": 4},
        "train": {"steps": 4, "optimizer": "adamw", "learning_rate": 1e-3},
        "save": {"every": 2, "keep": 2, "dtype": "fp32"},
        "backend": {
            "name": "ai-toolkit",
            "python": str(ai_toolkit["python"]),
            "options": {"device": "cpu"},
        },
    }
    for name, section in sections.items():
        content[name] = {**content.get(name, {}), **section}
    path = tmp_path / "spec.yaml"
    path.write_text(json.dumps(content))
    return path


def start(tmp_path: Path, ai_toolkit: dict[str, Path], *arguments: str, tiny: bool = True) -> subprocess.Popen[str]:
    """The `loraport` command; `tiny` lets ai-toolkit take the small checkpoint."""
    environment = {
        **os.environ,
        "LORAPORT_AI_TOOLKIT": str(ai_toolkit["checkout"]),
        "LORAPORT_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        **({"HARNESS_TINY": str(TINY_RUN.parent)} if tiny else {}),
    }
    command = [sys.executable, str(Path(__file__).with_name("command.py")), *arguments]
    return subprocess.Popen(
        command,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=tmp_path,
        # Tests that run in the background of a shell have it ignored, and the run would honour that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output[-3000:]
    return output


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    path = run / "events.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [event for event in found if event["type"] == kind]


def wait_for_checkpoint(process: subprocess.Popen[str], run: Path) -> int:
    until = time.monotonic() + 120
    while not (found := events(run, "checkpoint")):
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < until
        time.sleep(0.05)
    return int(found[-1]["step"])


def optimizer_steps(ai_toolkit: dict[str, Path], run: Path) -> int:
    """The steps that Adam has counted, from ai-toolkit's optimizer.pt."""
    code = "import sys, torch; print(int(torch.load(sys.argv[1], weights_only=True)['state'][0]['step']))"
    path = run / layout.save_folder("tiny_run") / "optimizer.pt"
    done = subprocess.run([ai_toolkit["python"], "-c", code, path], capture_output=True, text=True, check=True)
    return int(done.stdout)


def images_seen(run: Path) -> int:
    """The images that ai-toolkit's model was given, as the harness noted them in its process."""
    return sum(int(line) for line in (run / "images-seen").read_text().splitlines())


def modules_in(path: Path) -> set[str]:
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        names = set(json.loads(file.read(length))) - {"__metadata__"}
    return {
        name.removeprefix("diffusion_model.").split(".lora_")[0].split(".lokr_")[0].removesuffix(".alpha")
        for name in names
    }


@pytest.fixture
def tiny(tmp_path: Path, ai_toolkit: dict[str, Path]) -> Path:
    from loraport_native.tiny import write_tiny

    return write_tiny(tmp_path / "tiny checkpoint, ü", layout="official")


def test_four_steps_with_a_checkpoint_end_in_a_proven_lora_for_comfyui(
    tmp_path: Path, ai_toolkit: dict[str, Path], tiny: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in IMAGES.iterdir()}
    run = tmp_path / "out put ü"

    spec = write_spec(tmp_path, ai_toolkit, train={"gradient_accumulation": 2})

    finish(start(tmp_path, ai_toolkit, "train", str(spec), "--out", str(run)))

    assert [event["step"] for event in events(run, "step")] == [1, 2, 3, 4]
    assert all(math.isfinite(event["loss"]) and event["lr"] == 1e-3 for event in events(run, "step"))
    assert [event["step"] for event in events(run, "checkpoint")] == [2]
    assert optimizer_steps(ai_toolkit, run) == 4
    patterns = [r"layers\.\d+\.(attention\.(qkv|o)|feed_forward\.w[123])"]
    assert modules_in(run / "tiny_run.safetensors") == {
        m for m in matching_modules(patterns) if int(m.split(".")[1]) < 3
    }
    assert json.loads((run / "proof.json").read_text())["ok"] is True
    assert not events(run, "warning")
    assert {path: path.stat().st_mtime_ns for path in IMAGES.iterdir()} == before
    theirs = work_of(run, images_seen(run))
    assert theirs.images == 4 * 2
    assert theirs == native_work(run, tmp_path / "ours")


def test_a_killed_run_goes_on_from_its_checkpoint_and_does_each_step_once(
    tmp_path: Path, ai_toolkit: dict[str, Path], tiny: Path
) -> None:
    run = tmp_path / "run"
    spec = write_spec(tmp_path, ai_toolkit, train={"steps": 300}, save={"every": 100})
    process = start(tmp_path, ai_toolkit, "train", str(spec), "--out", str(run))
    wait_for_checkpoint(process, run)
    process.kill()
    process.communicate()
    kept = max(event["step"] for event in events(run, "checkpoint"))

    finish(start(tmp_path, ai_toolkit, "resume", str(run)))

    assert events(run, "resumed")[-1]["step"] >= kept
    assert [event["step"] for event in events(run, "step")][-1] == 300
    assert optimizer_steps(ai_toolkit, run) == 300
    assert (run / "tiny_run.safetensors").is_file()


def test_ctrl_c_saves_before_it_stops_and_the_run_goes_on_from_there(
    tmp_path: Path, ai_toolkit: dict[str, Path], tiny: Path
) -> None:
    run = tmp_path / "run"
    spec = write_spec(tmp_path, ai_toolkit, train={"steps": 400}, save={"every": 0})
    process = start(tmp_path, ai_toolkit, "train", str(spec), "--out", str(run))
    until = time.monotonic() + 120
    while not events(run, "step"):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    finish(process, 130)
    (kept,) = (event["step"] for event in events(run, "checkpoint"))
    assert 0 < kept < 400
    assert optimizer_steps(ai_toolkit, run) == kept

    finish(start(tmp_path, ai_toolkit, "resume", str(run)))

    assert events(run, "resumed")[-1]["step"] == kept
    assert optimizer_steps(ai_toolkit, run) == 400


def test_a_lokr_is_trained_and_proven(tmp_path: Path, ai_toolkit: dict[str, Path], tiny: Path) -> None:
    run = tmp_path / "run"
    spec = write_spec(
        tmp_path, ai_toolkit, lora={"type": "lokr", "rank": 2, "factor": 4, "targets": "attention"}, save={"every": 0}
    )

    finish(start(tmp_path, ai_toolkit, "train", str(spec), "--out", str(run)))

    expected = {m for m in matching_modules([r"layers\.\d+\.attention\.(qkv|o)"]) if int(m.split(".")[1]) < 3}
    assert modules_in(run / "tiny_run.safetensors") == expected


def test_a_checkpoint_that_does_not_fit_is_one_clear_error(
    tmp_path: Path, ai_toolkit: dict[str, Path], tiny: Path
) -> None:
    spec = write_spec(tmp_path, ai_toolkit)

    output = finish(start(tmp_path, ai_toolkit, "train", str(spec), "--out", str(tmp_path / "run"), tiny=False), 4)

    assert "do not fit ai-toolkit's model" in output


def test_one_image_is_enough_and_a_caption_that_is_too_long_is_one_clear_error(
    tmp_path: Path, ai_toolkit: dict[str, Path], tiny: Path
) -> None:
    images = tmp_path / "ein Bild – ü"
    images.mkdir()
    shutil.copyfile(IMAGES / "cat.jpg", images / "é 1.jpg")
    shutil.copyfile(IMAGES / "cat.json", images / "é 1.json")
    spec = write_spec(
        tmp_path, ai_toolkit, dataset={"path": str(images)}, train={"batch_size": 2, "gradient_accumulation": 2}
    )
    finish(start(tmp_path, ai_toolkit, "train", str(spec), "--out", str(tmp_path / "rün")))
    assert images_seen(tmp_path / "rün") == 4 * 2 * 2

    (images / "é 1.json").write_text(json.dumps({"compositional_deconstruction": {"background": "wall " * 2500}}))
    output = finish(start(tmp_path, ai_toolkit, "train", str(spec), "--out", str(tmp_path / "too long")), 4)
    assert "é 1.jpg has" in output
    assert "dataset.max_text_tokens (2048)" in output
    assert "Traceback" not in output


def test_the_doctor_trains_two_steps_with_the_tiny_checkpoint(tmp_path: Path, ai_toolkit: dict[str, Path]) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps({"python": {"ai-toolkit": str(ai_toolkit["python"])}}))
    code = "from loraport.cli.doctor import train_two_steps; train_two_steps('ai-toolkit', print)"
    environment = {
        **os.environ,
        "LORAPORT_AI_TOOLKIT": str(ai_toolkit["checkout"]),
        "LORAPORT_HOME": str(tmp_path),
        "CUDA_VISIBLE_DEVICES": "",
    }

    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    assert done.stdout.strip() == "trained 2 steps to a LoRA that is proven for ComfyUI", done.stderr[-3000:]
