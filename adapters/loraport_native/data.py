"""From a spec's dataset to what the training loop reads: samples whose latents and text features are cached."""

from __future__ import annotations

import random
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from loraport.buckets import Size, bucket_for
from loraport.dataset import Item
from loraport.errors import DataError
from loraport.families import Family, check_family
from loraport.plugins import plugins
from loraport.run.events import Event, PhaseStarted, Progress, Warn
from loraport.sets import ImageSet, held_out_items, subject, trained_sets
from loraport.spec.models import TrainSpec
from loraport_native import features
from loraport_native.cache import Store, cache_folder, key
from loraport_native.disk import cache_bytes
from loraport_native.distributed import ALONE, Group
from loraport_native.features import LATENTS, TEXT, Emit, Picture
from loraport_native.models.checkpoint import Checkpoint, load_tokenizer
from loraport_native.models.latents import PIXELS
from loraport_native.models.tokens import tokenize
from loraport_native.models.weights import Weights

T = TypeVar("T")

_PROBLEMS_TOLD = 10
#: Host memory for latents and text features, which then cost a step no disk: some 200 to 300 images of 1024 px.
HELD_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Sample:
    """One image as it is trained. `latents` and `text` are cache keys, `bucket` is (width, height) in pixels."""

    name: str
    latents: str
    text: str
    bucket: Size
    weight: float = 1.0  #: factor on the loss
    caption_dropout: float = 0.0  #: share of its turns that have an empty caption


@dataclass(frozen=True)
class TrainingSet:
    """Everything the loop reads. Texts are cache keys, for `text`."""

    store: Store = field(repr=False)
    samples: list[Sample]
    held_out: list[Sample]
    empty_text: str  #: what a dropped caption becomes
    extra_texts: dict[str, str]  #: of each caption that was asked for besides the dataset's
    held: Mapping[tuple[str, str], Tensor] = field(repr=False)  #: by (kind, key), in host memory; pinned for CUDA

    def latents(self, sample: Sample) -> Tensor:
        """The sample's image tokens (N, channels), float32, on the CPU. Not to be written to."""
        return self._read(LATENTS, sample.latents)

    def text(self, text_key: str) -> Tensor:
        """Projected text features (T, hidden) in the dtype they were prepared in, on the CPU. Not to be written to."""
        return self._read(TEXT, text_key)

    def _read(self, kind: str, name: str) -> Tensor:
        held = self.held.get((kind, name))
        return self.store.read(kind, name)[kind] if held is None else held


def prepare(
    spec: TrainSpec,
    checkpoint: Checkpoint,
    device: torch.device | str,
    dtype: torch.dtype,
    emit: Emit,
    extra_captions: Iterable[str] = (),
    group: Group = ALONE,
) -> TrainingSet:
    """Read and check the dataset, and compute what the cache lacks: first all latents, then all text features.

    A model is loaded only when something of its is missing, and is gone before the next one comes. Each process of the
    group computes its share of what is missing.
    The dataset's paths are folders (see `loraport.hub_datasets.on_disk`).
    `extra_captions` (prompts to draw) are encoded as they are. Raises DataError for what is wrong with images
    and captions (before any model is loaded, but for damaged pixels) and RunFolderError for a cache that cannot
    be written. Of what the loop reads, `HELD_BYTES` are kept in host memory.
    """
    device, storage = torch.device(device), spec.memory.text_encoder or "none"
    store = Store(cache_folder(), lambda path: emit(Warn(message=f"{path} was damaged; it is computed anew.")))
    family = check_family(spec, plugins().families())
    pictures: dict[str, Picture] = {}
    sources: dict[str, str] = {"": "the empty caption"}

    def text_key(caption: str) -> str:
        limit = spec.dataset.max_text_tokens
        return key("text", caption, checkpoint.identity, limit, str(dtype), storage)

    def sample(entry: Entry) -> Sample:
        picture = entry.picture
        image = entry.picture.item.image.read_bytes()
        latents = key("image", image, picture.bucket, picture.mirrored, checkpoint.identity)
        pictures.setdefault(latents, picture)
        sources.setdefault(entry.caption, entry.name)
        return Sample(entry.name, latents, text_key(entry.caption), picture.bucket, entry.weight, entry.caption_dropout)

    trained, held_out = entries_of(spec, family)
    samples = [one for entry in trained for one in [sample(entry)] * entry.repeats]
    validation = [sample(entry) for entry in held_out]
    extra_captions = list(extra_captions)
    for caption in extra_captions:
        sources.setdefault(caption, "a prompt")
    captions = {caption: text_key(caption) for caption in sources}

    def missing() -> tuple[dict[str, Picture], dict[str, str]]:
        return (
            {name: picture for name, picture in pictures.items() if not store.has(LATENTS, name)},
            {name: text for text, name in captions.items() if not store.has(TEXT, name)},
        )

    missing_pictures, missing_captions = group.from_leader(missing)
    tokens = _count_tokens(missing_captions, sources, checkpoint, spec.dataset.max_text_tokens)
    expected = _expected_bytes(missing_pictures.values(), tokens, checkpoint, dtype)

    told = f"{len(missing_pictures)} of {len(pictures)} images to encode"
    told += f"; the cache will grow by about {_size(expected)}" if expected else ""
    emit(PhaseStarted(phase="cache", detail=told))
    share, tell = _share(missing_pictures, group, emit)
    features.encode_images(share, checkpoint, device, store, tell)
    emit(PhaseStarted(phase="cache", detail=f"{len(missing_captions)} of {len(captions)} captions to encode"))
    share_of_text, tell = _share(missing_captions, group, emit)
    features.encode_captions(
        share_of_text, checkpoint, spec.dataset.max_text_tokens, dtype, storage, device, store, tell
    )
    group.wait()

    entries = [*((LATENTS, name) for name in pictures), *((TEXT, name) for name in captions.values())]
    if group.leads:
        print(f"The cache holds {_size(store.size(entries))} for this dataset, in {store.root}", flush=True)
    extra = {caption: captions[caption] for caption in extra_captions}
    read = [(TEXT, captions[""])]
    read += [entry for one in (*samples, *validation) for entry in ((LATENTS, one.latents), (TEXT, one.text))]
    held = store.hold(read, HELD_BYTES, pinned=device.type == "cuda")
    return TrainingSet(store, samples, validation, captions[""], extra, held)


def epoch_batches(samples: list[Sample], batch_size: int, seed: int, epoch: int) -> list[list[Sample]]:
    """The batches of an epoch, shuffled by (seed, epoch). A batch never mixes buckets, so some are smaller.

    Every sample comes exactly once, and every epoch has the same number of batches.
    """
    order = random.Random(f"{seed}/{epoch}")
    groups: defaultdict[Size, list[Sample]] = defaultdict(list)
    for sample in order.sample(samples, len(samples)):
        groups[sample.bucket].append(sample)
    batches = [
        group[start : start + batch_size] for group in groups.values() for start in range(0, len(group), batch_size)
    ]
    order.shuffle(batches)
    return batches


@dataclass(frozen=True)
class Entry:
    """A picture with its place in the training."""

    name: str
    picture: Picture
    caption: str
    repeats: int = 1
    weight: float = 1.0
    caption_dropout: float = 0.0


def _share(missing: Mapping[str, T], group: Group, emit: Emit) -> tuple[dict[str, T], Emit]:
    """This process's share, and an `emit` that tells its progress as that of all, which go at about the same pace."""

    def tell(event: Event) -> None:
        if isinstance(event, Progress):
            done = min(event.done * group.size, len(missing))
            event = event.model_copy(update={"done": done, "total": len(missing)})
        emit(event)

    return dict(group.share(list(missing.items()))), tell


def entries_of(spec: TrainSpec, family: Family) -> tuple[list[Entry], list[Entry]]:
    """What is trained and what is held out."""
    dataset, multiple = spec.dataset, family.side_multiple

    def entry(one: ImageSet, root: Path, item: Item, mirrored: bool = False, repeats: int = 1) -> Entry:
        bucket = bucket_for(item.size, one.resolution, multiple, dataset.upscale, dataset.aspect_buckets)
        name = item.image.relative_to(root).as_posix()
        picture = Picture(item, bucket, mirrored)
        return Entry(name, picture, item.caption, repeats, one.loss_weight, one.caption_dropout)

    def refuse_tiny(root: Path, items: list[Item]) -> None:
        if not dataset.upscale:
            _refuse_tiny(root, items, multiple)

    trained = []
    for each in trained_sets(spec, family):
        one = each.set
        refuse_tiny(one.path, each.items)
        sides = (False, True) if one.flip else (False,)
        trained += [entry(one, one.path, item, side, each.repeats) for item in each.items for side in sides]
    first = subject(dataset)
    root = spec.validation.path or first.path
    held_out = held_out_items(spec, family)
    refuse_tiny(root, held_out)
    return trained, [entry(first, root, item) for item in held_out]


def _refuse_tiny(root: Path, items: list[Item], multiple: int) -> None:
    tiny = [
        f"{item.image.relative_to(root).as_posix()}: {item.size[0]} x {item.size[1]} px"
        for item in items
        if min(item.size) < multiple
    ]
    if tiny:
        raise DataError(
            _listed(f"Images in {root} have a side of less than {multiple} px:", tiny),
            hint="Take them out or set dataset.upscale: true.",
        )


def _count_tokens(captions: Mapping[str, str], sources: Mapping[str, str], checkpoint: Checkpoint, limit: int) -> int:
    """Tokens of all captions (key → caption). Raises DataError naming each caption that has more than `limit`."""
    if not captions:
        return 0
    tokenizer = load_tokenizer(checkpoint)
    counts = {caption: len(tokenize(tokenizer, caption, sys.maxsize)) for caption in captions.values()}
    long = [f"{sources[caption]}: {count:,} tokens" for caption, count in counts.items() if count > limit]
    if long:
        raise DataError(
            _listed(f"Captions are longer than dataset.max_text_tokens, which is {limit:,}:", long),
            hint="Shorten them or raise dataset.max_text_tokens.",
        )
    return sum(counts.values())


def _expected_bytes(pictures: Iterable[Picture], tokens: int, checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    channels = Weights(checkpoint.transformer).shape("input_proj.weight")[1]
    hidden, _ = features.text_widths(checkpoint)
    image_tokens = sum(picture.bucket[0] * picture.bucket[1] // PIXELS**2 for picture in pictures)
    return cache_bytes(image_tokens, channels, tokens, hidden, dtype.itemsize)


def _listed(head: str, lines: list[str]) -> str:
    more = len(lines) - _PROBLEMS_TOLD
    return "\n  ".join([head, *lines[:_PROBLEMS_TOLD], *([f"and {more} more"] if more > 0 else [])])


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
