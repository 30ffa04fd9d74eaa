"""The loop: it learns, it sums, clips and averages as told, it repeats itself exactly, and it stops at a NaN."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraport.errors import BackendError, RunFolderError
from loraport.run.events import Checkpoint, PhaseStarted, Resumed, Step, Validation
from loraport_native import trainer as module
from loraport_native.checkpoints import load_state, whole_checkpoints
from loraport_native.data import epoch_batches
from loraport_native.dialect import NativeDialect
from loraport_native.trainer import Draw, Stopped, pad_left

OPTIMIZERS = {"adamw": 1e-2, "adamw8bit": 1e-2, "adafactor": 1e-2, "prodigy": 1.0, "lion": 1e-3}


def told(trainer: Any, kind: type) -> list[Any]:
    return [event for event in trainer.events if isinstance(event, kind)]


def adapter_bytes(run_dir: Path, step: int) -> bytes:
    return (run_dir / "checkpoints" / f"step-{step:06d}" / "adapter.safetensors").read_bytes()


def test_a_tiny_model_overfits_one_photo(make_spec, make_trainer, photos, tmp_path) -> None:
    """The held-out loss, at fixed noise and times, of the photo that is trained falls from 2.9 to about 1.1.

    1.0 is the variance of the noise, which is what is left to a model that knows the photo by heart.
    """
    one = tmp_path / "one"
    one.mkdir()
    for name in ("0.png", "0.txt"):
        (one / name).write_bytes((photos / name).read_bytes())
    trainer = make_trainer(
        make_spec(
            dataset={"path": str(one)},
            lora={"rank": 32, "targets": [".*"]},
            train={"steps": 300, "learning_rate": 5e-3, "lr_scheduler": "cosine"},
            validation={"every": 150, "path": str(one)},
        )
    )
    trainer.fit()
    first, middle, last = (event.loss for event in told(trainer, Validation))
    assert first > 2.5
    assert first > middle > last
    assert last < 0.42 * first


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_lowers_the_held_out_loss(make_spec, make_trainer, photos, optimizer: str) -> None:
    trainer = make_trainer(
        make_spec(
            train={"steps": 25, "batch_size": 4, "optimizer": optimizer, "learning_rate": OPTIMIZERS[optimizer]},
            validation={"every": 25, "path": str(photos)},
        )
    )
    trainer.fit()
    first, last = (event.loss for event in told(trainer, Validation))
    assert last < 0.85 * first


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_bf16_trains_about_as_well_as_float32(make_spec, make_trainer, photos, tmp_path, kind: str) -> None:
    losses = {}
    for dtype in ("fp32", "bf16"):
        spec = make_spec(
            model={"dtype": dtype},
            lora={"type": kind},
            train={"steps": 25, "batch_size": 4, "learning_rate": 1e-2},
            validation={"every": 25, "path": str(photos)},
        )
        trainer = make_trainer(spec, tmp_path / dtype)
        trainer.fit()
        losses[dtype] = [event.loss for event in told(trainer, Validation)]
        assert {weight.dtype for weight in trainer.masters.weights} == {torch.float32}
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.03)
    assert losses["bf16"][1] < 0.85 * losses["bf16"][0]


def test_accumulation_gives_the_gradient_of_one_bigger_batch(make_spec, make_trainer) -> None:
    trainer = make_trainer(make_spec(train={"gradient_accumulation": 4, "max_grad_norm": 0}))
    passes: list[Draw] = []
    compute = trainer._losses

    def spy(draw: Draw) -> Tensor:
        passes.append(draw)
        return compute(draw)

    trainer._losses = spy
    gradients: list[Tensor] = []
    trainer.optimizer.step = lambda: gradients.extend(weight.grad.clone() for weight in trainer.masters.weights)
    fill_up_factors(trainer)
    trainer._one_step()
    assert len(passes) == 4
    latents, noise, sigma = (
        torch.cat([getattr(each, name) for each in passes]) for name in ("latents", "noise", "sigma")
    )
    texts = [text for each in passes for text in each.text]
    assert len({len(text) for text in texts}) == 4
    loss = compute(Draw(latents, noise, sigma, *pad_left(texts), (4, 4))).mean()
    expected = torch.autograd.grad(loss, trainer.masters.weights)
    assert told(trainer, Step)[0].loss == pytest.approx(loss.item(), rel=1e-6)
    for got, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize(("limit", "clipped"), [(0.01, True), (1e5, False), (0, False)])
def test_the_gradient_is_clipped_to_the_norm_asked_for(make_spec, make_trainer, limit: float, clipped: bool) -> None:
    trainer = make_trainer(make_spec(train={"max_grad_norm": limit}))
    norms: list[float] = []

    def spy() -> None:
        norms.append(math.sqrt(sum(weight.grad.square().sum().item() for weight in trainer.masters.weights)))

    trainer.optimizer.step = spy
    trainer._one_step()
    before = told(trainer, Step)[0].grad_norm
    assert before > 0.1
    assert norms == [pytest.approx(limit if clipped else before, rel=1e-3)]


def test_the_average_follows_the_masters_and_is_what_is_saved(make_spec, make_trainer, tmp_path) -> None:
    spec = make_spec(
        train={"steps": 30, "ema_decay": 0.7},
        validation={"every": 10},
    )
    trainer = make_trainer(spec)
    expected = {name: weight.double() for name, weight in trainer.masters.state().items()}
    names = list(expected)
    step = trainer._one_step

    def spy() -> None:
        step()
        decay = min(0.7, (1 + trainer.step) / (10 + trainer.step))
        for name, weight in trainer.masters.state().items():
            expected[name] = decay * expected[name] + (1 - decay) * weight.double()

    trainer._one_step = spy
    trainer.fit()
    saved = NativeDialect().read(tmp_path / "run" / "checkpoints" / "step-000030" / "adapter.safetensors")
    live = trainer.masters.state()
    for name in names:
        module, _, factor = name.rpartition(".")
        factors = saved.modules[module].factors.arrays()
        got = torch.from_numpy(factors[{"lora_A": "down", "lora_B": "up"}[factor]]).double()
        torch.testing.assert_close(got, expected[name], rtol=1e-4, atol=1e-6)
    assert not torch.equal(live["layers.0.attention.qkv.lora_B"].double(), expected["layers.0.attention.qkv.lora_B"])


def test_measuring_the_held_out_loss_changes_nothing_in_training(make_spec, make_trainer, tmp_path, photos) -> None:
    lora = {"dropout": 0.3}
    train = {"ema_decay": 0.9}
    watched = make_trainer(
        make_spec(lora=lora, train=train, validation={"every": 1, "path": str(photos)}), tmp_path / "watched"
    )
    watched.fit()
    alone = make_trainer(make_spec(lora=lora, train=train), tmp_path / "alone")
    alone.fit()
    assert len(told(watched, Validation)) == 11
    assert adapter_bytes(tmp_path / "watched", 10) == adapter_bytes(tmp_path / "alone", 10)


def test_the_held_out_loss_does_not_depend_on_the_seed(make_spec, make_trainer, tmp_path, photos) -> None:
    losses = []
    for seed in (1, 2):
        spec = make_spec(train={"seed": seed, "steps": 1}, validation={"every": 1, "path": str(photos)})
        trainer = make_trainer(spec, tmp_path / str(seed))
        trainer.fit()
        losses.append(told(trainer, Validation)[0].loss)
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.25, 0.18, 0.32), (1.0, 1, 1)])
def test_captions_are_dropped_in_the_share_asked_for(make_spec, make_trainer, share, low, high) -> None:
    """1000 samples: five standard deviations are 0.068."""
    trainer = make_trainer(make_spec(dataset={"caption_dropout": share}, train={"batch_size": 2}))
    used: list[str] = []
    read = trainer.data.text
    object.__setattr__(trainer.data, "text", lambda key: (used.append(key), read(key))[1])
    trainer._losses = lambda draw: torch.zeros(len(draw.latents))
    for index in range(500):
        trainer._loss(trainer._batch(index), index)
    assert low <= used.count(trainer.data.empty_text) / len(used) <= high
    assert len(used) == 1000


def test_each_set_drops_its_own_share_of_captions(make_spec, make_trainer, photos) -> None:
    sets = [{"path": str(photos), "caption_dropout": 1}, {"path": str(photos), "resolution": 80, "caption_dropout": 0}]
    trainer = make_trainer(make_spec(dataset={"path": None, "sets": sets}))
    used: list[str] = []
    read = trainer.data.text
    object.__setattr__(trainer.data, "text", lambda key: (used.append(key), read(key))[1])
    for index in range(16):
        batch = trainer._batch(index)
        trainer._draw(batch, index)
        small = batch[0].caption_dropout == 1
        assert (used.pop() == trainer.data.empty_text) == small


def test_a_regularisation_image_counts_with_its_weight(make_spec, make_trainer, photos, tmp_path) -> None:
    spec = make_spec(
        dataset={"regularization": {"path": str(photos), "caption_ext": "txt", "weight": 0.25}},
        train={"batch_size": 8},
    )
    trainer = make_trainer(spec)
    batch = trainer._batch(0)
    assert sorted(sample.weight for sample in batch) == [0.25] * 4 + [1.0] * 4
    trainer._losses = lambda *arguments: torch.arange(1.0, 9.0)
    expected = sum(loss * sample.weight for loss, sample in enumerate(batch, start=1)) / 8
    assert trainer._loss(batch, 0).item() == pytest.approx(expected)


def test_gradient_checkpointing_changes_no_bit(make_spec, make_trainer, tmp_path) -> None:
    for on in (False, True):
        spec = make_spec(lora={"dropout": 0.5}, memory={"gradient_checkpointing": on})
        make_trainer(spec, tmp_path / str(on)).fit()
    assert adapter_bytes(tmp_path / "True", 10) == adapter_bytes(tmp_path / "False", 10)


def test_another_seed_is_another_lora(make_spec, make_trainer, tmp_path) -> None:
    for run, seed in {"a": 1, "b": 1, "c": 2}.items():
        make_trainer(make_spec(train={"seed": seed}, lora={"dropout": 0.5}), tmp_path / run).fit()
    assert adapter_bytes(tmp_path / "a", 10) == adapter_bytes(tmp_path / "b", 10)
    assert adapter_bytes(tmp_path / "a", 10) != adapter_bytes(tmp_path / "c", 10)


RESUMED: dict[str, dict[str, Any]] = {
    "adamw, bf16": {"model": {"dtype": "bf16"}, "train": {"lr_scheduler": "cosine", "warmup_steps": 3}},
    "adamw, everything": {
        "dataset": {"caption_dropout": 0.5, "flip": True},
        "lora": {"dropout": 0.3, "dora": True},
        "train": {"ema_decay": 0.9, "gradient_accumulation": 3, "batch_size": 2},
    },
    "several sets": {
        "dataset": {
            "path": None,
            "sets": [
                {"path": "PHOTOS", "weight": 1, "caption_dropout": 0.5},
                {"path": "PHOTOS", "weight": 3, "resolution": 80, "regularization": True, "loss_weight": 0.5},
            ],
        },
        "train": {"batch_size": 2},
    },
    "lokr": {"lora": {"type": "lokr"}},
    "loha": {"lora": {"type": "loha"}},
    "adamw8bit": {"lora": {"rank": 64}, "train": {"optimizer": "adamw8bit"}},  # rank 64: large enough for 8 bits
    "adafactor": {"train": {"optimizer": "adafactor"}},
    "prodigy": {"train": {"optimizer": "prodigy", "learning_rate": 1.0, "lr_scheduler": "linear"}},
    "lion": {"train": {"optimizer": "lion"}, "model": {"dtype": "bf16"}},
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_stopped_and_resumed_run_ends_bit_identical(make_spec, make_trainer, tmp_path, photos, case: str) -> None:
    changes = json.loads(json.dumps(RESUMED[case]).replace("PHOTOS", str(photos)))
    spec = make_spec(**changes, save={"every": 4})
    make_trainer(spec, tmp_path / "alone").fit()

    first = make_trainer(spec, tmp_path / "stopped")
    first.emit = lambda event: stop_at(first, event, 6)
    with pytest.raises(Stopped):
        first.fit()
    assert list(whole_checkpoints(tmp_path / "stopped")) == [4, 6]
    second = make_trainer(spec, tmp_path / "stopped")
    second.fit()
    assert told(second, Resumed)[0].step == 6
    assert [event.step for event in told(second, Step)] == [7, 8, 9, 10]
    assert adapter_bytes(tmp_path / "stopped", 10) == adapter_bytes(tmp_path / "alone", 10)


def stop_at(trainer: Any, event: Any, step: int) -> None:
    if isinstance(event, Step) and event.step == step:
        trainer.stop_requested = True


def test_a_step_told_while_the_next_is_queued_is_told_before_anything_is_saved(
    make_spec, make_trainer, tmp_path
) -> None:
    spec = make_spec(save={"every": 4})
    make_trainer(spec, tmp_path / "at once").fit()
    late = make_trainer(spec, tmp_path / "late")
    late.runs_ahead = True
    tell, taken = late._tell, []
    late._tell = lambda step: (taken.append((step.step, late.step)), tell(step))
    begin, told_before = late._writer.begin, []
    late._writer.begin = lambda save: (told_before.append(told(late, Step)[-1].step), begin(save))
    late.fit()
    assert taken == [(n, n) for n in range(1, 11)], "in the forward pass of the next step, so before that one counts"
    order = [(type(event), event.step) for event in late.events if isinstance(event, Step | Checkpoint)]
    assert told_before == [4, 8, 10]
    for saved in told_before:
        assert order.index((Checkpoint, saved)) > order.index((Step, saved))
    assert order[-1] == (Checkpoint, 10)
    assert adapter_bytes(tmp_path / "late", 10) == adapter_bytes(tmp_path / "at once", 10)


def test_training_goes_on_while_a_checkpoint_is_written_and_changes_nothing_of_it(
    make_spec, make_trainer, tmp_path, monkeypatch
) -> None:
    spec = make_spec(save={"every": 4, "keep": 9}, train={"ema_decay": 0.9})
    make_trainer(spec, tmp_path / "at once").fit()
    further, save = threading.Event(), module.save_checkpoint

    def slow(*arguments: Any) -> Path:
        assert further.wait(60)
        return save(*arguments)

    monkeypatch.setattr(module, "save_checkpoint", slow)
    late = make_trainer(spec, tmp_path / "late")
    late.runs_ahead = True
    emit = late.emit

    def hear(event: Any) -> None:
        emit(event)
        if isinstance(event, Step) and event.step == 6:
            further.set()

    late.emit = hear
    late.fit()
    order = [(type(event), event.step) for event in late.events if isinstance(event, Step | Checkpoint)]
    assert (Step, 6) in order[: order.index((Checkpoint, 4))]
    for step in (4, 8, 10):
        one, other = (load_state(whole_checkpoints(tmp_path / name)[step]) for name in ("at once", "late"))
        assert same(one, other)
        assert adapter_bytes(tmp_path / "late", step) == adapter_bytes(tmp_path / "at once", step)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_a_checkpoint_that_cannot_be_written_ends_a_training_that_went_on(
    make_spec, make_trainer, tmp_path, monkeypatch
) -> None:
    def full(*arguments: Any) -> Path:
        raise RunFolderError("The disk is full.")

    monkeypatch.setattr(module, "save_checkpoint", full)
    trainer = make_trainer(make_spec(save={"every": 4}))
    trainer.runs_ahead = True
    with pytest.raises(RunFolderError, match="The disk is full"):
        trainer.fit()
    assert trainer.step <= 8


def test_a_step_that_diverged_and_is_told_late_leaves_no_checkpoint(make_spec, make_trainer, tmp_path) -> None:
    trainer = make_trainer(make_spec(save={"every": 3}))
    trainer.runs_ahead = True
    poison(trainer, "latents", name="2.png", from_step=4)
    with pytest.raises(BackendError, match=r"step \d+ is not finite, on: 2.png"):
        trainer.fit()
    assert list(whole_checkpoints(tmp_path / "run")) == [3]


def test_a_resumed_run_measures_what_was_due_when_it_died(make_spec, make_trainer, tmp_path, photos) -> None:
    spec = make_spec(save={"every": 5}, validation={"every": 5, "path": str(photos)})
    first = make_trainer(spec)

    def die(event: Any) -> None:
        if isinstance(event, PhaseStarted) and event.phase == "validate" and first.step == 5:
            raise KeyboardInterrupt

    first.emit = die
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    second = make_trainer(spec)
    second.fit()
    assert [event.step for event in told(second, Validation)] == [5, 10]


def test_a_stop_in_the_last_step_is_a_finished_run(make_spec, make_trainer, tmp_path) -> None:
    trainer = make_trainer(make_spec())
    trainer.emit = lambda event: stop_at(trainer, event, 10)
    trainer.fit()
    assert list(whole_checkpoints(tmp_path / "run")) == [10]


def test_old_checkpoints_go_beyond_keep(make_spec, make_trainer, tmp_path) -> None:
    trainer = make_trainer(make_spec(save={"every": 2, "keep": 2}))
    trainer.fit()
    assert list(whole_checkpoints(tmp_path / "run")) == [8, 10]
    assert [event.path for event in told(trainer, Checkpoint)][-1] == "checkpoints/step-000010"


@pytest.mark.parametrize("what", ["latents", "text"])
def test_a_nan_names_step_sample_and_last_good_checkpoint(make_spec, make_trainer, tmp_path, what: str) -> None:
    spec = make_spec(train={"steps": 12, "gradient_accumulation": 2}, save={"every": 1})
    trainer = make_trainer(spec)
    poison(trainer, what, name="2.png", from_step=5)
    with pytest.raises(BackendError) as caught:
        trainer.fit()
    message = str(caught.value)
    failed = trainer.step
    assert failed > 5
    assert f"step {failed} is not finite, on: 2.png. " in message
    whole = whole_checkpoints(tmp_path / "run")
    assert str(whole[failed - 1]) in message
    assert max(whole) == failed - 1
    assert torch.isfinite(trainer.masters.weights[0]).all()


def test_a_learning_rate_that_explodes_ends_before_a_bad_checkpoint(make_spec, make_trainer, tmp_path) -> None:
    trainer = make_trainer(make_spec(train={"steps": 300, "max_grad_norm": 0}, save={"every": 1, "keep": 500}))
    for group in trainer.optimizer.param_groups:
        group["lr"] = 1e18
    trainer.schedule.base_lrs = [1e18] * len(trainer.schedule.base_lrs)
    with pytest.raises(BackendError, match=r"of step \d+ is not finite"):
        trainer.fit()
    for folder in whole_checkpoints(tmp_path / "run").values():
        NativeDialect().read(folder / "adapter.safetensors")  # raises DataError for a NaN


def poison(trainer: Any, what: str, name: str, from_step: int) -> None:
    read = getattr(type(trainer.data), what)
    (text,) = {sample.text for sample in trainer.data.samples if sample.name == name}

    def poisoned(wanted: Any) -> Tensor:
        tensor = read(trainer.data, wanted)
        bad = wanted == text if what == "text" else wanted.name == name
        return tensor * math.nan if bad and trainer.step >= from_step else tensor

    object.__setattr__(trainer.data, what, poisoned)


def fill_up_factors(trainer: Any) -> None:
    for name, factor in trainer.adapter.factors.items():
        if name.endswith("lora_B"):
            factor.data.normal_(std=0.1, generator=torch.Generator().manual_seed(9))


def test_what_is_tried_before_the_first_step_is_the_largest_batch_that_may_come(make_spec, make_trainer) -> None:
    trainer = make_trainer(make_spec(dataset={"caption_dropout": 0.9}, train={"batch_size": 2}))
    samples = trainer.data.samples
    lengths = {sample.text: len(trainer.data.text(sample.text)) for sample in samples}
    batch = trainer._largest_batch()
    assert len({sample.bucket for sample in batch}) == 1
    assert [sample.caption_dropout for sample in batch] == [0.0] * len(batch)

    def tokens(some: list[Any]) -> int:
        return sum((one.bucket[0] // 16) * (one.bucket[1] // 16) + lengths[one.text] for one in some)

    for epoch in range(20):
        assert all(tokens(other) <= tokens(batch) for other in epoch_batches(samples, 2, 0, epoch))


def test_texts_are_padded_on_the_left_only_where_lengths_differ() -> None:
    short, long = torch.ones(2, 3), torch.ones(4, 3)
    padded, lengths = pad_left([short, long])
    assert lengths == [2, 4]
    assert padded[0, :, 0].tolist() == [0, 0, 1, 1]
    assert pad_left([short, short])[1] is None
