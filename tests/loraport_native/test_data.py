"""Preparing a dataset: what is trained, what is cached, and what is never in memory together."""

from __future__ import annotations

import gc
import json
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from loraport.dataset import scan
from loraport.errors import DataError
from loraport.run.events import Event, PhaseStarted, Progress, Warn
from loraport.spec.models import TrainSpec
from loraport_native import features
from loraport_native.data import Sample, TrainingSet, epoch_batches, prepare
from loraport_native.features import Picture, load_text_projection, pixels_of
from loraport_native.models.checkpoint import (
    Checkpoint,
    find_checkpoint,
    load_text_encoder,
    load_tokenizer,
    load_transformer,
    load_vae,
)
from loraport_native.models.latents import encode_image
from loraport_native.models.text import encode
from loraport_native.tiny import write_tiny

HIDDEN, WIDTH = 128, 64
LOADERS = ("load_vae", "load_text_encoder", "load_text_projection")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return find_checkpoint(str(write_tiny(tmp_path_factory.mktemp("tiny") / "checkpoint", "official")))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPORT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images: a landscape, a portrait and a square."""
    folder = tmp_path / "images"
    for name, size in {"a": (96, 64), "b": (64, 96), "c": (64, 64)}.items():
        add(folder, name, size)
    return folder


def add(folder: Path, name: str, size: tuple[int, int] = (64, 64), caption: str | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    noise = np.random.default_rng(sum(map(ord, name))).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / f"{name}.png")
    (folder / f"{name}.txt").write_text(caption if caption is not None else f"picture {name}")
    return folder / f"{name}.png"


def spec_for(folder: Path, validation: dict[str, Any] | None = None, **dataset: Any) -> TrainSpec:
    return TrainSpec.model_validate(
        {
            "name": "test",
            "model": {"checkpoint": "tiny"},
            "dataset": {"path": folder, "caption_ext": "txt", "resolution": 64, **dataset},
            "validation": validation or {},
        }
    )


def prepared(
    spec: TrainSpec,
    checkpoint: Checkpoint,
    dtype: torch.dtype = torch.float32,
    emit: Callable[[Event], None] = lambda event: None,
    extra: tuple[str, ...] = (),
) -> TrainingSet:
    return prepare(spec, checkpoint, "cpu", dtype, emit, extra)


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("a model was loaded")

    for name in names:
        monkeypatch.setattr(features, name, fail)


def test_latents_and_text_are_those_of_the_models(images: Path, checkpoint: Checkpoint) -> None:
    data = prepared(spec_for(images), checkpoint)
    sample = data.samples[0]
    assert (sample.name, sample.bucket, sample.weight) == ("a.png", (80, 48), 1.0)
    latents = data.latents(sample)
    assert latents.dtype == torch.float32
    assert latents.shape == (5 * 3, 128)
    picture = Picture(scan(images, "txt")[0], (80, 48))
    assert pixels_of(picture).shape == (1, 3, 48, 80)
    vae = load_vae(checkpoint, torch.float32, "cpu")
    assert torch.equal(latents, encode_image(vae, pixels_of(picture))[0])

    encoder = load_text_encoder(checkpoint, torch.float32, "cpu")
    (raw,) = encode(encoder, load_tokenizer(checkpoint), ["picture a"], 2048)
    transformer = load_transformer(checkpoint, torch.float32, "cpu")
    text = data.text(sample.text)
    assert torch.allclose(text, transformer.project_text(raw[None])[0], atol=1e-6)


@pytest.mark.parametrize("layout", ["diffusers", "official"])
def test_the_projection_alone_is_the_transformers_own(tmp_path: Path, layout: Any) -> None:
    checkpoint = find_checkpoint(str(write_tiny(tmp_path / layout, layout)))
    raw = torch.randn(1, 5, WIDTH * 13)
    alone = load_text_projection(checkpoint, torch.bfloat16, "cpu")
    whole = load_transformer(checkpoint, torch.bfloat16, "cpu")
    assert torch.equal(alone(raw), whole.project_text(raw))
    assert not any(parameter.requires_grad for parameter in alone.parameters())


def test_text_is_stored_projected_and_in_the_compute_dtype(images: Path, checkpoint: Checkpoint) -> None:
    data = prepared(spec_for(images), checkpoint, torch.bfloat16)
    stored = data.store.read("text", data.samples[0].text)["text"]
    assert stored.shape[1] == HIDDEN != 13 * WIDTH
    assert stored.dtype == torch.bfloat16
    assert data.latents(data.samples[0]).dtype == torch.float32
    assert data.text(data.empty_text).shape[1] == HIDDEN


def test_a_second_time_loads_no_model(images: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepared(spec_for(images, flip=True), checkpoint, extra=("a prompt",))
    forbid(monkeypatch, *LOADERS)
    monkeypatch.setattr("loraport_native.data.load_tokenizer", None)
    second = prepared(spec_for(images, flip=True), checkpoint, extra=("a prompt",))
    assert second.samples == first.samples
    assert torch.equal(second.latents(second.samples[0]), first.latents(first.samples[0]))


def test_a_changed_caption_encodes_text_and_no_image(
    images: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = prepared(spec_for(images), checkpoint)
    (images / "a.txt").write_text("something else")
    forbid(monkeypatch, "load_vae")
    events: list[Event] = []
    after = prepared(spec_for(images), checkpoint, emit=events.append)
    assert [event.total for event in events if isinstance(event, Progress)] == [1]
    assert after.samples[0].text != before.samples[0].text
    assert after.samples[1:] == before.samples[1:]
    assert after.text(after.samples[0].text).shape != before.text(before.samples[0].text).shape


def test_a_changed_image_encodes_that_image_and_no_text(
    images: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = prepared(spec_for(images), checkpoint)
    Image.new("RGB", (96, 64), "red").save(images / "a.png")
    forbid(monkeypatch, "load_text_encoder", "load_text_projection")
    after = prepared(spec_for(images), checkpoint)
    assert after.samples[0].latents != before.samples[0].latents
    assert not torch.equal(after.latents(after.samples[0]), before.latents(before.samples[0]))
    assert after.samples[1:] == before.samples[1:]


def test_another_size_mirror_model_or_limit_is_another_key(
    images: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    base = prepared(spec_for(images), checkpoint).samples[0]
    smaller = prepared(spec_for(images, resolution=80), checkpoint).samples[0]
    assert smaller.bucket != base.bucket
    assert smaller.latents != base.latents
    assert smaller.text == base.text
    mirrored = prepared(spec_for(images, flip=True), checkpoint).samples[1]
    assert mirrored.latents != base.latents
    limited = prepared(spec_for(images, max_text_tokens=100), checkpoint).samples[0]
    assert limited.text != base.text
    halved = prepared(spec_for(images), checkpoint, torch.bfloat16).samples[0]
    assert halved.text != base.text
    other = find_checkpoint(str(write_tiny(tmp_path / "other", "official", seed=1)))
    changed = prepared(spec_for(images), other).samples[0]
    assert changed.latents != base.latents
    assert changed.text != base.text


def test_no_model_is_alive_after_it_nor_two_at_once(
    images: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: dict[str, weakref.ref] = {}
    alive_at_load: dict[str, list[str]] = {}

    def watched(name: str) -> Callable[..., Any]:
        original = getattr(features, name)

        def load(*arguments: Any) -> Any:
            alive_at_load[name] = [other for other, model in models.items() if model() is not None]
            model = original(*arguments)
            models[name] = weakref.ref(model)
            return model

        return load

    for name in LOADERS:
        monkeypatch.setattr(features, name, watched(name))
    data = prepared(spec_for(images), checkpoint)
    assert set(models) == set(LOADERS)
    assert alive_at_load["load_text_encoder"] == []
    gc.collect()
    assert [name for name, model in models.items() if model() is not None] == []
    assert data.samples


def test_a_step_reads_no_file_unless_the_budget_is_spent(
    images: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def everything(data: TrainingSet) -> list[torch.Tensor]:
        tensors = [data.text(data.empty_text)]
        return tensors + [tensor for one in data.samples for tensor in (data.latents(one), data.text(one.text))]

    held = prepared(spec_for(images), checkpoint)
    monkeypatch.setattr("loraport_native.data.HELD_BYTES", 0)
    unheld = prepared(spec_for(images), checkpoint)
    from_disk = everything(unheld)
    monkeypatch.setattr(type(held.store), "read", None)
    assert all(torch.equal(one, other) for one, other in zip(everything(held), from_disk, strict=True))
    with pytest.raises(TypeError):
        everything(unheld)


def test_another_storage_of_the_text_encoder_is_another_text(images: Path, checkpoint: Checkpoint) -> None:
    spec = spec_for(images)
    small = spec.model_copy(update={"memory": spec.memory.model_copy(update={"text_encoder": "nf4"})})
    full, other = (prepared(each, checkpoint) for each in (spec, small))
    assert full.samples[0].latents == other.samples[0].latents
    assert full.samples[0].text != other.samples[0].text
    exact, close = full.text(full.samples[0].text), other.text(other.samples[0].text)
    assert 0 < (close - exact).norm() / exact.norm() < 0.3


@pytest.mark.parametrize(("free", "where"), [(2**40, "cuda"), (2**20, "cpu")])
def test_an_image_too_large_for_the_card_is_encoded_on_the_cpu(
    images: Path,
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    free: int,
    where: str,
) -> None:
    monkeypatch.setattr(features, "free_memory_bytes", lambda device: free)
    picture = Picture(scan(images, "txt")[0], (1024, 768))
    vae = load_vae(checkpoint, torch.float32, "cpu")
    assert features._where_it_fits(vae, picture, torch.device("cuda")) == torch.device(where)
    assert ("a.png: 1024 x 768 px take" in capsys.readouterr().out) == (where == "cpu")
    assert features._where_it_fits(vae, picture, torch.device("cpu")) == torch.device("cpu")


def test_a_damaged_entry_is_warned_of_and_computed_anew(images: Path, checkpoint: Checkpoint) -> None:
    before = prepared(spec_for(images), checkpoint)
    path = before.store.path("latents", before.samples[0].latents)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    events: list[Event] = []
    prepared(spec_for(images), checkpoint, emit=events.append)
    assert [path.name in event.message for event in events if isinstance(event, Warn)] == [True]
    assert path.read_bytes() == content


def test_both_passes_and_their_progress_are_told(
    images: Path, checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[Event] = []
    data = prepared(spec_for(images), checkpoint, emit=events.append, extra=("a prompt",))
    phases = [event.detail for event in events if isinstance(event, PhaseStarted)]
    assert all(event.phase == "cache" for event in events if isinstance(event, PhaseStarted))
    assert phases[0].startswith("3 of 3 images to encode; the cache will grow by about 0.1 MB")
    assert phases[1] == "5 of 5 captions to encode"  # three images, the empty one, the prompt
    assert [(event.done, event.total) for event in events if isinstance(event, Progress)] == [
        *((done, 3) for done in range(1, 4)),
        *((done, 5) for done in range(1, 6)),
    ]
    assert f"0.1 MB for this dataset, in {data.store.root}" in capsys.readouterr().out
    assert data.text(data.extra_texts["a prompt"]).shape[1] == HIDDEN


def test_the_estimate_is_the_true_size(images: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    from loraport_native import data as module

    sizes: list[int] = []
    monkeypatch.setattr(module, "_size", lambda count: sizes.append(count) or "")
    for index in range(4):
        add(images, f"{index}", (512, 512))
    prepared(spec_for(images, resolution=512), checkpoint)
    estimate, true = sizes
    assert 0.95 * true < estimate <= true


def test_repeats_mirrors_and_regularisation_are_all_there(images: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    add(tmp_path / "general", "d")
    (tmp_path / "general" / "d.txt").rename(tmp_path / "general" / "d.caption")
    spec = spec_for(
        images,
        repeats=2,
        flip=True,
        trigger_word="mp_word",
        regularization={"path": tmp_path / "general", "caption_ext": "caption", "repeats": 3, "weight": 0.5},
    )
    data = prepared(spec, checkpoint)
    assert Counter(sample.name for sample in data.samples) == {"a.png": 4, "b.png": 4, "c.png": 4, "d.png": 3}
    assert len({sample.latents for sample in data.samples if sample.name == "a.png"}) == 2
    assert {sample.weight for sample in data.samples if sample.name == "d.png"} == {0.5}
    assert {sample.weight for sample in data.samples if sample.name != "d.png"} == {1.0}
    assert data.held_out == []


def test_several_sets_are_mixed_each_with_its_own_size_weight_and_dropout(
    images: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    add(tmp_path / "one more", "a", (128, 128), "the other a")
    add(tmp_path / "general", "g", caption="in general")
    sets = [
        {"path": images, "weight": 1},
        {"path": tmp_path / "one more", "weight": 2, "resolution": 128, "caption_dropout": 0.5, "flip": True},
        {"path": tmp_path / "general", "weight": 1, "regularization": True, "loss_weight": 0.25},
    ]
    spec = spec_for(images, path=None, sets=sets, caption_dropout=0.125, trigger_word="zork")
    data = prepared(spec, checkpoint)
    kinds = Counter((sample.name, sample.bucket, sample.weight, sample.caption_dropout) for sample in data.samples)
    assert kinds == {
        ("a.png", (80, 48), 1.0, 0.125): 1,
        ("b.png", (48, 80), 1.0, 0.125): 1,
        ("c.png", (64, 64), 1.0, 0.125): 1,
        ("a.png", (128, 128), 1.0, 0.5): 6,
        ("g.png", (64, 64), 0.25, 0.125): 3,
    }
    assert [len({sample.text for sample in data.samples if sample.bucket == bucket}) for bucket in ((128, 128),)] == [1]
    epoch = epoch_batches(data.samples, 1, seed=1, epoch=0)
    assert Counter(sample.weight for (sample,) in epoch) == {1.0: 9, 0.25: 3}


def test_a_mirrored_sample_is_the_mirrored_image(images: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    data = prepared(spec_for(images, flip=True), checkpoint)
    twin = tmp_path / "mirrored"
    add(twin, "a", (96, 64))
    Image.open(images / "a.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(twin / "a.png")
    (expected,) = prepared(spec_for(twin), checkpoint).samples
    assert data.samples[1].name == "a.png"
    assert torch.allclose(data.latents(data.samples[1]), data.latents(expected), atol=0.1)
    assert not torch.allclose(data.latents(data.samples[0]), data.latents(expected), atol=0.1)


def test_the_trigger_word_goes_inside_json_of_the_main_set_only(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    caption = {
        "high_level_description": "a car",
        "compositional_deconstruction": {"background": "", "elements": []},
    }
    for folder in ("main", "general"):
        add(tmp_path / folder, "a")
        (tmp_path / folder / "a.json").write_text(json.dumps(caption, indent=1))
    spoken: list[str] = []
    original = features.encode

    def listen(encoder: Any, tokenizer: Any, captions: list[str], limit: int) -> Any:
        spoken.extend(captions)
        return original(encoder, tokenizer, captions, limit)

    monkeypatch.setattr(features, "encode", listen)
    prepared(
        spec_for(
            tmp_path / "main",
            caption_ext="json",
            trigger_word="mp_word",
            regularization={"path": tmp_path / "general"},
        ),
        checkpoint,
    )
    rest = '"compositional_deconstruction":{"background":"","elements":[]}}'
    assert set(spoken) == {
        "",
        '{"high_level_description":"mp_word, a car",' + rest,
        '{"high_level_description":"a car",' + rest,
    }


def test_the_last_images_by_name_are_held_out(images: Path, checkpoint: Checkpoint) -> None:
    data = prepared(spec_for(images, {"every": 10, "images": 2}, flip=True, repeats=5), checkpoint)
    assert [sample.name for sample in data.held_out] == ["b.png", "c.png"]
    assert {sample.name for sample in data.samples} == {"a.png"}
    assert not {sample.latents for sample in data.samples} & {sample.latents for sample in data.held_out}


def test_nothing_is_held_out_when_nothing_is_measured(images: Path, checkpoint: Checkpoint) -> None:
    data = prepared(spec_for(images, {"images": 2}), checkpoint)
    assert len(data.samples) == 3
    assert data.held_out == []


def test_a_validation_folder_leaves_the_dataset_whole(images: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    add(tmp_path / "others", "v")
    data = prepared(spec_for(images, {"every": 1, "path": tmp_path / "others"}), checkpoint)
    assert [sample.name for sample in data.held_out] == ["v.png"]
    assert len(data.samples) == 3


def test_holding_out_every_image_is_refused(images: Path, checkpoint: Checkpoint) -> None:
    with pytest.raises(DataError, match="3 of 3 images"):
        prepared(spec_for(images, {"every": 1, "images": 3}), checkpoint)


def test_long_captions_are_named_before_any_model_is_loaded(
    images: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, *LOADERS)
    add(images, "long", caption="word " * 60)
    add(images, "longer", caption="wordy " * 200)
    with pytest.raises(DataError) as caught:
        prepared(spec_for(images, max_text_tokens=64), checkpoint)
    told = str(caught.value).splitlines()
    assert "max_text_tokens, which is 64" in told[0]
    counts = [int(line.split()[1].replace(",", "")) for line in told[1:3]]
    assert told[1].strip().startswith("long.png: ")
    assert told[2].strip().startswith("longer.png: ")
    assert 64 < counts[0] < counts[1]


def test_images_smaller_than_a_token_are_named(images: Path, checkpoint: Checkpoint) -> None:
    add(images, "tiny", (64, 10))
    with pytest.raises(DataError, match=r"tiny\.png: 64 x 10 px"):
        prepared(spec_for(images), checkpoint)
    assert len(prepared(spec_for(images, upscale=True), checkpoint).samples) == 4


def test_a_truncated_image_is_named(images: Path, checkpoint: Checkpoint) -> None:
    path = images / "a.png"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"a\.png: "):
        prepared(spec_for(images), checkpoint)


def test_features_that_are_not_finite_are_not_cached(
    images: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "encode_image", lambda vae, pixels: torch.full((1, 4, 128), torch.nan))
    with pytest.raises(DataError, match=r"a\.png.*NaN"):
        prepared(spec_for(images), checkpoint)


BUCKETS = [(64, 64)] * 5 + [(96, 32)] * 3 + [(32, 96)]
SAMPLES = [Sample(str(index), "", "", bucket) for index, bucket in enumerate(BUCKETS)] * 2


@pytest.mark.parametrize("size", [1, 2, 4, 100])
def test_an_epoch_has_every_sample_once_and_never_mixes_buckets(size: int) -> None:
    batches = epoch_batches(SAMPLES, size, seed=1, epoch=0)
    assert Counter(sample.name for batch in batches for sample in batch) == Counter(s.name for s in SAMPLES)
    assert all(len({sample.bucket for sample in batch}) == 1 for batch in batches)
    assert max(map(len, batches)) <= size
    assert len(batches) == sum(-(-count // size) for count in (10, 6, 2))


def test_epochs_differ_by_seed_and_number_and_repeat_exactly() -> None:
    def names(seed: int, epoch: int) -> list[list[str]]:
        return [[sample.name for sample in batch] for batch in epoch_batches(SAMPLES, 2, seed, epoch)]

    assert names(1, 0) == names(1, 0)
    assert len({str(names(*which)) for which in [(1, 0), (1, 1), (2, 0), (11, 0)]}) == 4


def test_every_sample_meets_every_other_over_the_epochs() -> None:
    """Batches are drawn anew each epoch, not only their order."""
    met = {frozenset(s.name for s in batch) for epoch in range(60) for batch in epoch_batches(SAMPLES, 2, 1, epoch)}
    assert {frozenset((a, b)) for a in "01234" for b in "01234" if a < b} <= met
