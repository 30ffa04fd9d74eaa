"""What SimpleTuner says, read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loraport.errors import BackendError, DataError, LoraPortError, OutOfMemoryError
from loraport.run import events
from loraport.run.errors_line import encode_error
from loraport_simpletuner.progress import Metrics, Watch, bar_step, explain_failure, phase_of, read_line

BAR = "Epoch 1/3, Steps:  50%|█████     | 2/4 [00:00<00:00,  3.80it/s, lr=8.54e-5, step_loss=3.13]"


def record(step: int, **metrics: float) -> str:
    return json.dumps({"schema_version": 1, "step": step, "metrics": metrics}) + "\n"


def test_a_bar_tells_a_step_once_it_has_a_loss() -> None:
    step = bar_step(BAR)
    assert (step.step, step.total, step.loss, step.lr) == (2, 4, 3.13, 8.54e-5)
    assert bar_step("Epoch 1/1, Steps:   0%|          | 0/4 [00:00<?, ?it/s]") is None
    assert bar_step("Loading weights: 100%|██████████| 425/425 [00:00<00:00, 15261.15it/s]") is None


def test_phases_are_known_by_their_lines() -> None:
    assert phase_of("[INFO] (id=images) Creating VAE latent cache: vae_cache_dir='x'").phase == "cache"
    loading = phase_of("[INFO] Text encoder 1 successfully moved to meta device")
    assert (loading.phase, loading.detail) == ("load", "transformer")
    assert phase_of(BAR).phase == "train"
    assert phase_of("something else") is None


def test_metrics_begin_where_an_earlier_session_ended_and_wait_for_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "training_metrics.jsonl"
    path.write_text(record(1, learning_rate=1.0, train_loss=9.0))
    metrics = Metrics(tmp_path, steps=4, images=6)
    assert list(metrics.read()) == []
    line = record(2, learning_rate=0.5, train_loss=2.0, seconds_per_step=3.0, grad_norm=0.1)
    with path.open("a") as file:
        file.write(line[:20])
    assert list(metrics.read()) == []
    with path.open("a") as file:
        file.write(line[20:] + record(2, **{"system/cpu": 1.0}) + "not json\n" + line)
    (step,) = metrics.read()
    assert (step.step, step.total, step.loss, step.lr, step.seconds) == (2, 4, 2.0, 0.5, 3.0)
    assert (step.images_per_second, step.grad_norm) == (2.0, 0.1)
    assert list(metrics.read()) == []


def test_a_step_without_a_loss_is_a_divergence(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, steps=4, images=1)
    (tmp_path / "training_metrics.jsonl").write_text(record(3, learning_rate=0.5))
    with pytest.raises(BackendError, match="step 3"):
        list(metrics.read())


def test_only_new_and_whole_checkpoints_and_images_are_told(tmp_path: Path) -> None:
    output = tmp_path / "backend" / "output"
    for number in (2, 4):
        (output / f"checkpoint-{number}").mkdir(parents=True)
    (output / "checkpoint-2" / ".guard").write_text("complete")
    watch = Watch(output, tmp_path)
    assert list(watch.read()) == []
    (output / "checkpoint-4" / ".guard").write_text("comp")
    assert list(watch.read()) == []
    (output / "checkpoint-4" / ".guard").write_text("complete\n")
    (output / "validation_images").mkdir()
    (output / "validation_images" / "step_4_prompt_1_768x512.png").touch()
    told = [(event.type, event.step, event.path) for event in watch.read()]
    assert told == [
        ("checkpoint", 4, "backend/output/checkpoint-4"),
        ("sample", 4, "backend/output/validation_images/step_4_prompt_1_768x512.png"),
    ]
    assert list(watch.read()) == []


TRACE = "Traceback (most recent call last):\n  File x\n"


@pytest.mark.parametrize(
    ("log", "code", "kind", "words"),
    [
        (f"{TRACE}torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", 1, OutOfMemoryError, "out of memory"),
        ("step 3", 137, OutOfMemoryError, "SIGKILL"),
        (f"{TRACE}huggingface_hub.errors.GatedRepoError: 401 Client Error", 1, BackendError, "hf auth login"),
        (f"{TRACE}RepositoryNotFoundError: 404", 1, DataError, "not on the hub"),
        (f"{TRACE}ModuleNotFoundError: No module named 'optimi'", 1, BackendError, "backends install simpletuner"),
        ("train.py: error: unrecognized arguments: --enable_group_offload", 2, BackendError, "backend.options"),
        (f"{TRACE}ValueError: prompt has 3000 tokens, exceeds max_text_tokens=2048", 1, DataError, "too long"),
        (f"{TRACE}ValueError: configuration will produce zero usable batches", 1, DataError, "dataset.repeats"),
        (f"{TRACE}RuntimeError: Non-finite training loss detected (loss=nan)", 1, BackendError, "not a number"),
        (f"{TRACE}OSError: [Errno 28] No space left on device", 1, BackendError, "disk is full"),
        ("a\nb\nZeroDivisionError: division by zero", 1, BackendError, "ZeroDivisionError"),
    ],
)
def test_each_known_failure_is_one_clear_error(log: str, code: int, kind: type[LoraPortError], words: str) -> None:
    found = explain_failure(code, f"start\nWARNING: ModuleNotFoundError was got over\n{log}\n" if TRACE in log else log)
    assert type(found) is kind
    assert words in str(found)
    assert "got over" not in str(found)


def test_an_error_that_was_told_comes_before_all_guessing() -> None:
    line = encode_error(DataError("this one"))
    assert explain_failure(1, f"CUDA out of memory\n{line}\n").message == "this one"


def test_events_of_the_launcher_are_read_and_other_output_is_not() -> None:
    event = events.Step(step=1, total=2, loss=0.5)
    assert list(read_line(events.encode(event)) or []) == [event]
    assert read_line(BAR) is None
