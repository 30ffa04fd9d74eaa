"""Peak device memory of a run, predicted from shapes alone. No torch.

Each phase is a sum of terms, and each term follows from what the code holds at the fullest moment. Weights, adapter and
optimizer are counted exactly; activations are counted in *states*, one being the hidden states of a batch: tokens ×
width numbers in model.dtype. How many states an eager block takes was counted by running it on the meta device and
following every storage; what a compiled one keeps, by reading it. Only a compiled block's temporaries (`WORK`,
`FORWARD_WORK`) are fitted to the measured rows in docs/benchmarks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loraport.caption_sources import read_column
from loraport.errors import DataError
from loraport.families import BYTES_PER_TOKEN, matches
from loraport.footprint import Footprint, Phase
from loraport.sets import ImageSet, image_sets, largest_resolution

if TYPE_CHECKING:
    from loraport.families import Dimensions, Family
    from loraport.spec.models import LoraSection, TrainSpec

GIB = 2**30
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}  #: of a number in model.dtype
SLOTS = 2  #: blocks on the device when they are streamed (`stream.SLOTS`)
STATES_UPWARDS = 13  #: `stream.STATES_UPWARDS`
ASSUMED_TEXT_TOKENS = 512  #: of a caption, where no caption files tell
MARGIN = 0.04  #: share of the room that checkpointing: auto leaves (`recompute._MARGIN`)
LIBRARIES_GIB = 0.03  #: cuBLAS's workspace of 8 × 4 MiB, which the plan's environment asks for
#: Bytes of optimizer state for each trained number: two float32 moments; two 8-bit ones with a float32 scale for 256;
#: rows and columns only; two moments, the start and the numerator; one moment.
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw8bit": 2.03, "adafactor": 0.0, "prodigy": 16.0, "lion": 4.0}

#: States that a block keeps for its backward pass besides those that feed an adapter. Compiled: fused q, k and v (3),
#: rotated q and k (2), attention's result, its projection, the sum after it, the feed-forward's result; eager adds
#: the second norm's.
KEPT = {False: 10.0, True: 9.0}
#: The same, in widths of the feed-forward: w1 and w3; eager adds the activation of w1.
KEPT_FEED_FORWARD = {False: 3, True: 2}
#: States of gradients and temporaries at the fullest moment of a block's backward pass. Eager, the input of a trained
#: w2, a width of the feed-forward, has gone by then.
WORK = {False: 7.2, True: 5.5}
#: Temporaries as large as the largest weight while the gradient of an update of its size is formed.
UPDATES = 2.5
#: The same of a forward pass, of which a compiled block gives all that it keeps at its end, also if it is recomputed.
FORWARD_WORK = {False: 15.0, True: 4.3}
FORWARD = 16.0  #: states at the fullest moment of a block's pass without gradients
#: Full-size maps that the VAE has alive, in its first layer's channels: three to encode (`latents.ALIVE`), three of
#: twice the channels to decode. To encode, cuDNN takes two more to work in (measured on an H200 at 768 and 1024 px).
VAE_ENCODES, VAE_DECODES = 3, 6
VAE_WORKSPACE = 2
VAE_SPARE = 1.25  #: how much of its maps' size must be free for an image to be encoded on the card (`latents.SPARE`)


def predict(spec: TrainSpec, family: Family, room_gib: float | None = None) -> Footprint | None:
    """What a resolved spec takes on a CUDA card that has `room_gib` to give; see `Backend.predict_memory`.

    None for a run on another device, the tiny checkpoint, and a checkpoint or family of unknown dimensions. Reads the
    headers of a local checkpoint and the sizes of caption files.
    """
    options = spec.backend.options
    dimensions = dimensions_of(spec, family)
    if dimensions is None or str(options.get("device", "auto")).partition(":")[0] not in ("auto", "cuda"):
        return None
    if room_gib is not None and isinstance(limit := options.get("memory_limit_gib"), int | float):
        room_gib = min(room_gib, limit)
    text_tokens = longest_caption(spec)
    run = Run(spec, family, dimensions, text_tokens)
    phases = [run.images(room_gib), run.captions(), run.training(room_gib)]
    if spec.sample.every:
        phases.append(run.samples())
    assumes = {"text_tokens": text_tokens, "resolution": run.resolution, "batch_size": spec.train.batch_size}
    return Footprint(phases, assumes, room_gib, binding=not options.get("ignore_memory_prediction", False))


def longest_caption(spec: TrainSpec) -> int:
    """Tokens of the longest caption, by the sizes of the files; `ASSUMED_TEXT_TOKENS` where there are none."""
    largest = max((size for one in image_sets(spec.dataset) for size in _caption_sizes(one)), default=0)
    tokens = largest // BYTES_PER_TOKEN if largest else ASSUMED_TEXT_TOKENS
    return min(tokens, spec.dataset.max_text_tokens)


def _caption_sizes(one: ImageSet) -> Iterable[int]:
    """Bytes of each caption of a set; none of one that cannot be read, which those tell who train it."""
    if not one.path.is_dir():
        return []
    if one.caption_field is None:
        return (file.stat().st_size for file in one.path.rglob(f"*.{one.caption_ext}"))
    try:
        return [len(text.encode()) for text in read_column(one.path, one.caption_field).values()]
    except DataError:
        return []


def dimensions_of(spec: TrainSpec, family: Family) -> Dimensions | None:
    """The dimensions of the spec's checkpoint, read from a local one's headers; None when they are not known."""
    if spec.model.checkpoint == "tiny":
        return None
    folder = Path(spec.model.checkpoint)
    if family.read_dimensions is None or not folder.is_dir():
        return family.dimensions
    try:
        return family.read_dimensions(folder)
    except DataError:  # the trainer, which reads all of it, tells what is wrong
        return None


def blocks_bytes(spec: TrainSpec, family: Family, dimensions: Dimensions) -> int:
    """Bytes of all blocks as they are stored."""
    return round(dimensions.blocks * Run(spec, family, dimensions, 0).block_bytes())


class Run:
    """The phases of one run."""

    def __init__(self, spec: TrainSpec, family: Family, dimensions: Dimensions, text_tokens: int):
        self.spec, self.dimensions, self.text_tokens = spec, dimensions, text_tokens
        self.number = BYTES[spec.model.dtype]
        self.masters = spec.model.dtype != "fp32"  #: whether the optimizer steps float32 copies of the live factors
        self.patterns = family.target_patterns(spec.lora.targets)
        self.compiled = spec.memory.compile != "none"
        self.resolution = largest_resolution(spec.dataset)
        self.image_tokens = self.resolution**2 // family.side_multiple**2
        self.trained = trained_parameters(spec.lora, dimensions.matched(self.patterns))

    def images(self, room_gib: float | None = None) -> Phase:
        """The VAE in float32, one image's activations, and what cuDNN works in, which is less where there is less room.
        An image that finds no room is encoded on the CPU."""
        one_map = 4 * self.dimensions.vae_channels * self.resolution**2
        terms = {"VAE": 4.0 * self.dimensions.vae_parameters, "libraries": LIBRARIES_GIB * GIB}
        left = math.inf if room_gib is None else room_gib * GIB - sum(terms.values())
        if VAE_SPARE * VAE_ENCODES * one_map <= left:
            terms["activations"] = VAE_ENCODES * one_map
            terms["workspace"] = min(VAE_WORKSPACE * one_map, left - VAE_ENCODES * one_map)
        return _phase("encoding images", terms, "lower dataset.resolution")

    def captions(self) -> Phase:
        """Two blocks of the text encoder, one in use and one being read, and the projection of its features.

        Blocks that stay because there is room for them are left out: they make way.
        """
        of = self.dimensions
        block = of.text_encoder_block_parameters
        stored = block * _stored_bytes(self.spec.memory.text_encoder, self.number)
        read = block * self.number + (stored if self.spec.memory.text_encoder != "none" else 0)
        terms = {
            "text encoder": stored + read,
            "projection": of.text_features * of.width * self.number,
            # The features in model.dtype, and in the norm before the projection two float32 copies of them.
            "activations": self.text_tokens * of.text_features * (self.number + 8),
        }
        return _phase("encoding captions", terms, "set memory.text_encoder: nf4")

    def training(self, room_gib: float | None = None) -> Phase:
        """The fullest moment of a step; with `auto`, of what it makes of the room (of `full` where there is none)."""
        memory = self.spec.memory
        checkpointing = memory.gradient_checkpointing or "full"
        if memory.offload == "group+activations" or (memory.offload != "none" and checkpointing == "auto"):
            return self._fullest("full")  # from an input that comes back; or because nothing is settled for streams
        if checkpointing != "auto":
            return self._fullest(checkpointing)
        full, none = self._fullest("full"), self._fullest("none")
        if room_gib is None or none.gib <= room_gib * (1 - MARGIN):
            return full if room_gib is None else none
        spared = max(0.0, room_gib * (1 - MARGIN) - full.gib)
        return replace(full, terms={**full.terms, "activations of blocks left alone": spared}) if spared else full

    def samples(self) -> Phase:
        """Drawing: with guidance the second transformer, with its text projection, stands beside the first."""
        sample, of = self.spec.sample, self.dimensions
        pixels = sample.width * sample.height
        terms = self._always()
        if sample.guidance != 1:
            second = self._frozen(trains=False) + of.text_features * of.width * self.number
            terms["unconditional transformer"] = second
        tokens = self.text_tokens + pixels // (self.resolution**2 // self.image_tokens)
        forward = FORWARD * tokens * of.width * self.number
        terms["VAE"] = of.vae_parameters * self.number
        terms["activations"] = max(forward, VAE_DECODES * of.vae_channels * pixels * self.number)
        return _phase("drawing samples", terms, "set sample.guidance: 1, or sample.every: 0 to draw none")

    def _fullest(self, checkpointing: str) -> Phase:
        """The fullest moment: the backward pass begins, it ends, the gradients are collected; or, where blocks are
        streamed, the forward pass comes to its last blocks.

        Blocks' activations go as the backward pass comes down, while the adapter's gradients come.
        """
        blocks = self.dimensions.blocks
        live, summed = self.trained * self.number, self.trained * 4
        # In float32 the gradients of the live factors are those that are summed.
        waiting = summed if self.masters and self.spec.train.gradient_accumulation > 1 else 0
        block, work = self._kept(), self._work()
        each = {"none": block, "selective": 2 * self._state(), "full": self._state()}[checkpointing]
        on_device = min(blocks, 2) if self.spec.memory.offload == "group+activations" else blocks
        if checkpointing != "none":
            on_device -= 1  # the last block is never recomputed
        recomputed = 0.0 if checkpointing == "none" else block
        moments: list[dict[str, float]] = [
            {"activations": on_device * each + recomputed, "work": work, "gradients": waiting},
            {"activations": max(each, recomputed), "work": work, "gradients": waiting + live},
            # Collected in float32 from the live ones.
            {"gradients": summed + live},
        ]
        if self.spec.memory.offload in ("group", "disk"):  # forward, more blocks are on the device
            forward = FORWARD_WORK[self.compiled] * self._state() + self._widened()
            own = block if self.compiled else each
            for more in range(self._slots_upwards() + 1):
                # Of the last `SLOTS` blocks none is ahead that has no slot; before them one more for each.
                below = max(0, on_device - (SLOTS - 1 + more if more else 0))
                ahead = more * self.block_bytes()
                moments.append({"blocks ahead": ahead, "activations": below * each + own, "work": forward})
        fullest = max(moments, key=lambda moment: sum(moment.values()))
        return _phase("training", self._always() | fullest, "lower dataset.resolution, train.batch_size or lora.rank")

    def _always(self) -> dict[str, float]:
        """What stays on the device between steps, bytes."""
        copies = 4.0 + (self.number if self.masters else 0) + (4 if self.spec.train.ema_decay else 0)
        return {
            "frozen weights": self._frozen(),
            "adapter": copies * self.trained,
            "optimizer": OPTIMIZER_BYTES[self.spec.train.optimizer] * self.trained,
            "libraries": LIBRARIES_GIB * GIB,
        }

    def _frozen(self, trains: bool = True) -> float:
        """Bytes of the blocks on the device, as they are stored, and of the layers around them."""
        of, block = self.dimensions, self.block_bytes(trains)
        count = of.blocks if self.spec.memory.offload == "none" else min(of.blocks, SLOTS)
        return count * block + of.other_parameters * self.number

    def block_bytes(self, trains: bool = True) -> float:
        """Bytes of a block as it is stored: with what a backward pass wants of it, unless it only draws."""
        of, storage = self.dimensions, self.spec.memory.storage
        block = of.block_parameters * _stored_bytes(storage, self.number)
        if trains and self._keeps_columns():
            block *= 2
        if storage in ("fp8", "int8"):
            block += 4 * sum(rows for rows, _ in of.block_linears.values())
        return block

    def _keeps_columns(self) -> bool:
        """Whether rows multiplied in 8 bits are there transposed as well (`placement.load_placed`)."""
        memory = self.spec.memory
        spare = memory.offload == "none" and memory.gradient_checkpointing == "none"
        return spare and memory.storage in ("fp8", "int8") and memory.compute != "model"

    def _state(self) -> float:
        """Bytes of the hidden states of a batch."""
        tokens = self.spec.train.batch_size * (self.image_tokens + self.text_tokens)
        return tokens * self.dimensions.width * self.number

    def _kept(self) -> float:
        """Bytes that one block keeps for its backward pass when nothing of it is recomputed."""
        of, lora, targets = self.dimensions, self.spec.lora, self._targets()
        # It sees one vector a sample instead of tokens, but with a gradient its four factors keep what they multiply.
        states = 4.0 if targets.pop("adaln_modulation", None) else 0.0
        outputs = sum(rows for rows, _ in targets.values()) / of.width
        states += KEPT[self.compiled] + KEPT_FEED_FORWARD[self.compiled] * of.feed_forward / of.width
        states += sum(targets[name][1] for name in _kept_for_adapters(targets)) / of.width
        if lora.type == "lora":
            states += len(targets) * lora.rank / of.width
        if lora.dropout:  # each layer's input with some left out, and which
            states += 1.3 * sum(inputs for _, inputs in targets.values()) / of.width
        if lora.type == "lokr" or lora.dora:  # the update before it is scaled
            states += outputs
        kept = states * self._state()
        if self._forms_updates():
            kept += sum(rows * inputs for rows, inputs in targets.values()) * self.number
        return kept

    def _work(self) -> float:
        """Bytes of gradients and temporaries in one block's backward pass, and of weights widened for its products."""
        of = self.dimensions
        gone = of.feed_forward / of.width if "feed_forward.w2" in self._targets() and not self.compiled else 0
        updates = UPDATES * self._largest() * self.number if self._forms_updates() else 0
        return (WORK[self.compiled] - gone) * self._state() + updates + self._widened()

    def _targets(self) -> dict[str, tuple[int, int]]:
        """Of a block's Linears, (outputs, inputs) of those that get an adapter."""
        of = self.dimensions
        block = of.block_name.format(of.blocks // 2)
        return {name: shape for name, shape in of.block_linears.items() if matches(self.patterns, f"{block}.{name}")}

    def _forms_updates(self) -> bool:
        """Whether an update as large as the weight is formed anew in each pass."""
        return self.spec.lora.dora or self.spec.lora.type == "loha"

    def _largest(self) -> int:
        """Numbers of a block's largest weight."""
        return max(outputs * inputs for outputs, inputs in self.dimensions.block_linears.values())

    def _widened(self) -> float:
        memory, largest = self.spec.memory, self._largest()
        if memory.storage == "none":
            return 0.0
        if self.spec.lora.dora:  # widened to float32, and from that to what it is computed in
            return largest * (4 + self.number)
        return largest * (self.number if memory.compute == "model" else 1)

    def _slots_upwards(self) -> int:
        """Blocks that the forward pass may have on the device besides `SLOTS` (`stream.slots_upwards`)."""
        return int(STATES_UPWARDS * self._state() // self.block_bytes())


def trained_parameters(lora: LoraSection, shapes: Iterable[tuple[int, int]]) -> int:
    """Numbers that an adapter trains on Linears of these (outputs, inputs)."""
    return sum(_adapter_size(lora, outputs, inputs) for outputs, inputs in shapes)


def _adapter_size(lora: LoraSection, outputs: int, inputs: int) -> int:
    if lora.type == "lora":
        return lora.rank * (outputs + inputs) + (outputs if lora.dora else 0)
    if lora.type == "loha":
        return 2 * lora.rank * (outputs + inputs)
    (small_out, large_out), (small_in, large_in) = _split(outputs, lora.factor), _split(inputs, lora.factor)
    low_rank = lora.rank < max(large_out, large_in) / 2  # else LyCORIS keeps the larger factor whole
    return small_out * small_in + (lora.rank * (large_out + large_in) if low_rank else large_out * large_in)


def _split(size: int, factor: int) -> tuple[int, int]:
    """The two factors of a size, the smaller first, as LyCORIS splits it: the given one, or the most even."""
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    most = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    smaller = max(n for n in range(1, most + 1) if size % n == 0)
    return smaller, size // smaller


def _kept_for_adapters(targets: Iterable[str]) -> set[str]:
    """Of a block's trained Linears, those whose input is kept for them: w1 and w3 share one, and attention keeps its
    result, which is o's input, in any case."""
    kept = {name for name in targets if name != "attention.o"}
    return kept - {"feed_forward.w3"} if "feed_forward.w1" in kept else kept


def _stored_bytes(storage: str | None, number: int) -> float:
    """Bytes of a frozen weight: nf4 is half a byte, a byte for each 64, and two float32 for each 256 of these."""
    return {"fp8": 1.0, "int8": 1.0, "nf4": 0.5 + (1 + 8 / 256) / 64}.get(storage or "none", float(number))


def _phase(name: str, terms: dict[str, float], advice: str) -> Phase:
    return Phase(name, {term: size / GIB for term, size in terms.items() if size}, advice)
