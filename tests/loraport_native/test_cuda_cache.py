"""On a CUDA card: the caching passes at full size (random weights) within the memory of a 6 GB card.

Run with `pytest -m gpu tests/loraport_native/test_cuda_cache.py`; about 20 GB of disk. LORAPORT_FULL_CHECKPOINT names a
folder that `loraport tiny --size full` wrote, else one is made. With LORAPORT_BENCH_FILE set, each storage of the text
encoder appends one JSON line to that file.
"""

from __future__ import annotations

import gc
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from loraport.run.events import Event, PhaseStarted, Progress  # noqa: E402
from loraport.spec.models import TrainSpec  # noqa: E402
from loraport_native import data  # noqa: E402
from loraport_native.models import text  # noqa: E402
from loraport_native.models.checkpoint import (  # noqa: E402
    Checkpoint,
    find_checkpoint,
    load_text_encoder,
    load_tokenizer,
    load_vae,
)
from loraport_native.models.latents import encode_image, encoding_bytes  # noqa: E402
from loraport_native.models.text import encode  # noqa: E402
from loraport_native.sizes import FULL  # noqa: E402
from loraport_native.tiny import write_checkpoint, write_tiny  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]
CARD = torch.device("cuda", 0)
SIX_GB = (0.94 * 6 - 0.5) * 2**30  #: of a 6 GB card, without what the driver keeps and CUDA's context


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The official layout at full size, fp8 rows."""
    folder = os.environ.get("LORAPORT_FULL_CHECKPOINT")
    if folder is None:
        made = tmp_path_factory.mktemp("full") / "checkpoint"
        folder = str(write_checkpoint(made, "official", FULL, fp8=True, device=CARD, unconditional=False))
    return find_checkpoint(folder)


@contextmanager
def capped(size: float) -> Iterator[None]:
    """No more than `size` bytes of the card, from here on and with an empty allocator."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / torch.cuda.get_device_properties(0).total_memory))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@contextmanager
def host_memory() -> Iterator[list[int]]:
    """Bytes of the host that this process took for itself, without mapped files: the list's largest is the peak."""

    def own() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

    seen, done = [own()], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            seen.append(own())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


@pytest.mark.parametrize("storage", ["none", "fp8", "int8", "nf4"])
def test_blocks_that_are_read_ahead_give_the_same_features_as_kept_ones(storage: str, tmp_path: Path) -> None:
    checkpoint = find_checkpoint(str(write_tiny(tmp_path / "tiny", "official", fp8=True)))
    tokenizer = load_tokenizer(checkpoint)
    captions = ["a cat", '{"high_level_description":"two dogs"}', "a dog"] * 20

    def features(tokens: int, room: int) -> list[torch.Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text, "PASS_TOKENS", tokens)
            encoder = load_text_encoder(checkpoint, torch.bfloat16, CARD, storage, lambda: room)
            return list(encode(encoder, tokenizer, captions, 512))

    once = features(10**6, 0)
    assert once[0].device.type == "cuda"
    for again in (features(64, 0), features(64, 1)):
        assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))


def dataset(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    """Images of noise, their captions about 500 tokens long and all different."""
    folder.mkdir()
    for number, (width, height) in enumerate(sizes):
        noise = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(f"{number}: " + "a wooden door, painted dark green " * 60)
    return folder


@pytest.mark.parametrize("storage", ["fp8", "none", "nf4"])
def test_caching_at_full_size_fits_a_6_gb_card(
    storage: str, full: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More captions than pass at once, and images up to 1536 px; the features are those of a card with all the room."""
    images = dataset(tmp_path / "images", [(1536, 1536), (1024, 1024), (1920, 1216)] + [(64, 64)] * 47)
    memory = {"text_encoder": storage}
    content = {"name": "full", "model": {"checkpoint": str(full.root)}, "memory": memory}
    content["dataset"] = {"path": str(images), "caption_ext": "txt", "resolution": 1536}
    spec = TrainSpec.model_validate(content)

    def prepared(cache: str, limit: float) -> tuple[data.TrainingSet, list[Event]]:
        monkeypatch.setenv("LORAPORT_CACHE", str(tmp_path / cache))
        events: list[Event] = []
        with capped(limit):
            made = data.prepare(spec, full, CARD, torch.bfloat16, events.append)
            reserved = torch.cuda.max_memory_reserved()
            left = torch.cuda.memory_allocated()
        assert reserved <= limit
        assert left < 64 * 2**20, "the caching passes leave the card to the transformer"
        return made, events

    started = time.perf_counter()
    with host_memory() as seen:
        small, events = prepared("small", SIX_GB)
    seconds = time.perf_counter() - started
    assert max(seen) - seen[0] < 6 * 2**30, "fits beside a desktop in 16 GB"
    peaks: list[float] = []
    for event in events:
        if isinstance(event, PhaseStarted):
            peaks.append(0.0)
        if isinstance(event, Progress):
            peaks[-1] = event.peak_memory_gib or 0.0
    row = {
        "pass": "cache",
        "text_encoder": storage,
        "images_peak_allocated_gib": round(peaks[0], 2),
        "captions_peak_allocated_gib": round(peaks[1], 2),
        "host_gib": round((max(seen) - seen[0]) / 2**30, 2),
        "captions": len(small.samples) + 1,
        "all_s": round(seconds, 1),
        "card": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
    }
    print(json.dumps(row))
    if os.environ.get("LORAPORT_BENCH_FILE"):
        with open(os.environ["LORAPORT_BENCH_FILE"], "a") as file:
            file.write(json.dumps(row) + "\n")

    large, _ = prepared("large", torch.cuda.get_device_properties(0).total_memory)
    for one, other in zip(small.samples, large.samples, strict=True):
        assert torch.equal(small.text(one.text), large.text(other.text))
        ours, theirs = small.latents(one), large.latents(other)
        # cuDNN may choose another algorithm where there is less room for it.
        assert (ours - theirs).norm() < 5e-3 * theirs.norm()
    assert all(tensor.is_pinned() for tensor in small.held.values())


def test_an_image_of_1536_px_is_the_same_on_the_card_as_on_the_cpu_in_just_the_room_that_it_is_said_to_need(
    full: Checkpoint,
) -> None:
    """To the rounding of TF32, in which a card's convolutions multiply float32."""
    pixels = torch.rand(1, 3, 1536, 1536, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae = load_vae(full, torch.float32, "cpu")
    expected = encode_image(vae, pixels)
    room = sum(p.nbytes for p in vae.parameters()) + encoding_bytes(vae, 1536, 1536)
    assert room < SIX_GB
    with capped(room):  # with more, cuDNN takes more
        got = encode_image(vae.to(CARD), pixels).cpu()
    assert (got - expected).norm() < 1e-2 * expected.norm()
