"""Predicted memory against what was measured on cards, and against the model itself on the meta device."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import loraport_native.models.ideogram4 as ideogram4
from loraport.errors import DataError
from loraport.families import matches
from loraport.footprint import Footprint
from loraport.ideogram4 import IDEOGRAM4, RELEASED, read_dimensions
from loraport.plugins import plugins
from loraport.profiles import resolve_memory
from loraport.spec.models import LoraSection, TrainSpec
from loraport_native import footprint, recompute, stream
from loraport_native.footprint import ASSUMED_TEXT_TOKENS, Run, predict, trained_parameters
from loraport_native.lora import inject
from loraport_native.models import latents
from loraport_native.models.ideogram4 import Ideogram4
from loraport_profiles.measured import memory_of, native_rows

BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks"
PROFILES = plugins().profiles()
ADAPTERS: list[dict[str, Any]] = [
    {},
    {"rank": 512},
    {"targets": "attention"},
    {"targets": "all"},
    {"dropout": 0.1},
    {"dora": True},
    {"type": "lokr"},
    {"type": "lokr", "factor": 8},
    {"type": "loha"},
]


def spec(**sections: Any) -> TrainSpec:
    content = {"name": "a", "model": {"checkpoint": "a/b"}, "dataset": {"path": "/nowhere"}} | sections
    return resolve_memory(TrainSpec.model_validate(content), PROFILES)


def gib(room_gib: float | None = None, **sections: Any) -> float:
    return predicted(room_gib, **sections).peak.gib


def predicted(room_gib: float | None = None, **sections: Any) -> Footprint:
    found = predict(spec(**sections), IDEOGRAM4, room_gib)
    assert found is not None
    return found


#: Rows over seeds, of losses that stay true, whose compiled blocks still kept weights as they were unpacked.
TAKE_LESS_NOW = {"quality-fp8", "quality-int8", "quality-nf4"}


def measured() -> list[Any]:
    rows = [(file, row) for file in sorted(BENCHMARKS.glob("*.jsonl")) for row in native_rows(file)]
    return [
        pytest.param(row, id=f"{file.stem}-{row['row']}-{row.get('seed', '')}")
        for file, row in rows
        if row["row"] not in TAKE_LESS_NOW
    ]


def forecast_of(row: dict[str, Any]) -> tuple[Run, float | None]:
    """The run that a row of a data file measured, and the room that it had where it was limited."""
    told = row["settings"]
    wanted = spec(
        dataset={"path": "/nowhere", "resolution": told["resolution"]},
        lora={"rank": told["rank"]},
        train={
            "batch_size": told["batch"],
            "optimizer": told["optimizer"],
            "gpus": told.get("gpus", 1),
        },
        memory=memory_of(row, PROFILES),
    )
    return Run(wanted, IDEOGRAM4, RELEASED, told["text_tokens"]), told.get("limit_gib")


@pytest.mark.parametrize("row", measured())
def test_every_row_measured_on_a_card_is_predicted_within_a_tenth(row: dict[str, Any]) -> None:
    run, room = forecast_of(row)
    assert run.training(room).gib == pytest.approx(row["peak_allocated_gib"], rel=0.1)
    if "cache_peak_allocated_gib" in row:
        cached = max(run.images(room).gib, run.captions().gib)
        assert cached == pytest.approx(row["cache_peak_allocated_gib"], rel=0.1)


def benched() -> list[Any]:
    """The native runs of benches of trainers; eager ones are among them, which no row of `loraport bench step` is."""
    return [
        pytest.param(run, id=f"{file.parent.name}-{run['key']}")
        for file in sorted(BENCHMARKS.glob("*/results.json"))
        for run in json.loads(file.read_text(encoding="utf-8"))["runs"]
        if run["backend"] == "native" and run["status"] == "ok" and run["torch_peaks"]
    ]


@pytest.mark.parametrize("run", benched())
def test_every_native_run_of_a_bench_on_a_card_is_predicted_within_a_tenth(run: dict[str, Any]) -> None:
    told = run["configuration"]["spec"]
    memory = {name: value for name, value in told["memory"].items() if name not in ("profile", "quantize")}
    train = {name: told["train"][name] for name in ("batch_size", "optimizer", "gradient_accumulation")}
    lora = {name: told["lora"][name] for name in ("rank", "targets")}
    wanted = spec(
        dataset={"path": "/nowhere", "resolution": told["dataset"]["resolution"]}, lora=lora, train=train, memory=memory
    )
    run_of = Run(wanted, IDEOGRAM4, RELEASED, ASSUMED_TEXT_TOKENS)  # how long its captions are is not told
    assert run_of.training().gib * 2**30 == pytest.approx(run["torch_peaks"]["allocated_bytes"], rel=0.1)


def test_rows_of_every_kind_were_measured() -> None:
    """So that the test above cannot pass by having nothing to compare."""
    rows = [param.values[0] for param in measured()]
    assert sum("cache_peak_allocated_gib" in row for row in rows) >= 5
    assert {row["settings"]["limit_gib"] for row in rows if "settings" in row} >= {None, 5.5, 7.5, 11.5}


def full_size(blocks: int) -> Ideogram4:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = Ideogram4(num_layers=blocks)
    finally:
        torch.set_default_dtype(before)
    model.drop_text_projection()
    return model


def adapted(blocks: int, lora: dict[str, Any]) -> tuple[Ideogram4, list[nn.Parameter]]:
    model, section = full_size(blocks), LoraSection(**lora)
    with torch.device("meta"):
        adapter = inject(model, section, IDEOGRAM4.target_patterns(section.targets), 0)
    return model, adapter.parameters()


@pytest.mark.parametrize("lora", ADAPTERS, ids=str)
def test_the_trained_numbers_are_those_that_are_injected(lora: dict[str, Any]) -> None:
    _, parameters = adapted(1, lora)
    section, one_block = LoraSection(**lora), RELEASED.block_linears
    names = {f"layers.0.{name}": shape for name, shape in one_block.items()}
    targets = [shape for name, shape in names.items() if matches(IDEOGRAM4.target_patterns(section.targets), name)]
    assert trained_parameters(section, targets) == sum(parameter.numel() for parameter in parameters)


class Followed(TorchDispatchMode):
    """Counts the bytes of the live storages that are made while it is on."""

    def __init__(self, known: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.kept = [tensor.untyped_storage() for tensor in (*known.parameters(), *known.buffers())]
        self.sizes = {storage._cdata: 0 for storage in self.kept}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.live += self.sizes[key]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


class Flash(torch.autograd.Function):
    """What a flash kernel keeps and gives, without the kernel."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = torch.empty_like(query.transpose(1, 2)).transpose(1, 2)
        ctx.save_for_backward(query, key, value, result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class Norm(torch.autograd.Function):
    """What CUDA's kernel for a norm keeps and gives, without the kernel; elsewhere a norm is several operators."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32), weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(ctx.saved_tensors[0]), None


@pytest.fixture
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention and norms as on CUDA."""
    monkeypatch.setattr(
        ideogram4.F, "scaled_dot_product_attention", lambda q, k, v, attn_mask=None: Flash.apply(q, k, v)
    )
    monkeypatch.setattr(ideogram4.F, "rms_norm", lambda x, shape, weight, eps: Norm.apply(x, weight))


def follow(blocks: int, lora: dict[str, Any], checkpointing: str) -> tuple[int, int]:
    """(bytes alive between the passes, most bytes alive) of a step of so many blocks of the real size."""
    model, parameters = adapted(blocks, lora)
    for parameter in parameters:
        parameter.data = parameter.data.to("meta", torch.bfloat16)
    model.rotary_emb.frequencies = model.rotary_emb.frequencies.to("meta")
    model.rotary_emb.axis_of = model.rotary_emb.axis_of.to("meta")
    recompute.recompute(model, checkpointing)
    latents, text = torch.empty(1, 4096, 128, device="meta"), torch.empty(1, 512, 4608, device="meta").bfloat16()
    with Followed(model.train()) as followed:
        velocity = model.velocity(latents, text, None, torch.empty(1, device="meta"), (64, 64))
        between = followed.live
        velocity.float().square().mean().backward()
    return between, followed.peak


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("lora", ADAPTERS, ids=str)
def test_an_eager_block_keeps_what_is_counted(lora: dict[str, Any]) -> None:
    run = Run(spec(lora=lora, memory={"gradient_checkpointing": "none"}), IDEOGRAM4, RELEASED, 512)
    (one, one_peak), (two, two_peak) = follow(1, lora, "none"), follow(2, lora, "none")
    assert run._kept() == pytest.approx(two - one, rel=0.04)
    assert run._kept() == pytest.approx(two_peak - one_peak, rel=0.04)
    (_, peak) = follow(2, lora, "full")
    assert 2 * run._state() + run._kept() + run._work() == pytest.approx(peak, rel=0.06)


def test_the_registered_dimensions_are_the_models() -> None:
    model = full_size(34)
    linears = {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    expected = {f"layers.{n}.{name}": shape for n in range(34) for name, shape in RELEASED.block_linears.items()}
    assert linears == expected | RELEASED.other_linears


def test_a_checkpoints_own_headers_tell_its_dimensions(tiny_diffusers: Path, tiny_fp8: Path) -> None:
    split, fused = read_dimensions(tiny_diffusers), read_dimensions(tiny_fp8)
    assert split == fused
    assert (fused.blocks, fused.width, fused.feed_forward, fused.text_features) == (3, 128, 256, 13 * 64)
    assert fused.block_linears["attention.qkv"] == (384, 128)
    assert fused.text_encoder_blocks == 36
    assert fused.vae_channels == 32
    assert predicted(model={"checkpoint": str(tiny_fp8)}).peak.gib < gib() / 20


def test_what_is_no_checkpoint_is_left_to_the_trainer_to_tell(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'input_proj\.weight' is missing"):
        read_dimensions(tmp_path)
    assert predict(spec(model={"checkpoint": str(tmp_path)}), IDEOGRAM4) is None


def test_less_storage_streaming_and_recomputation_each_take_less() -> None:
    assert gib() > gib(memory={"quantize": "fp8"}) > gib(memory={"quantize": "nf4"})
    offloads = [
        gib(memory={"quantize": "fp8-dynamic", "offload": name}) for name in ("none", "group", "group+activations")
    ]
    assert offloads == sorted(offloads, reverse=True)
    assert gib(memory={"offload": "disk"}) == gib(memory={"offload": "group"})
    dial = [gib(memory={"gradient_checkpointing": name}) for name in ("none", "selective", "full")]
    assert dial == sorted(dial, reverse=True)
    assert gib(memory={"compile": "regional"}) < gib()


def test_a_larger_training_takes_more() -> None:
    for larger in (
        {"train": {"batch_size": 2}},
        {"train": {"optimizer": "adamw"}},
        {"train": {"ema_decay": 0.99}},
        {"lora": {"rank": 128}},
        {"lora": {"targets": "all"}},
        {"dataset": {"path": "/nowhere", "resolution": 1280}},
        {"model": {"checkpoint": "a/b", "dtype": "fp32"}},
    ):
        assert gib(**larger) > gib(), larger


def test_collecting_the_gradients_is_the_peak_of_a_huge_adapter_on_a_streamed_model() -> None:
    found = predicted(
        lora={"rank": 1024}, dataset={"path": "/nowhere", "resolution": 256}, memory={"offload": "group+activations"}
    )
    run = Run(spec(lora={"rank": 1024}), IDEOGRAM4, RELEASED, 512)
    assert found.peak.name == "training"
    assert found.peak.terms["gradients"] == pytest.approx((4 + 2) * run.trained / 2**30)
    assert "activations" not in found.peak.terms


def test_auto_leaves_as_many_blocks_alone_as_there_is_room_for() -> None:
    full, none = (gib(memory={"gradient_checkpointing": name}) for name in ("full", "none"))
    auto = {"gradient_checkpointing": "auto"}
    assert gib(memory=auto) == full
    assert gib(full, memory=auto) == full
    assert gib(1.2 * none, memory=auto) == none
    assert gib(30, memory=auto) == pytest.approx(30 * (1 - footprint.MARGIN))
    assert gib(30, memory={**auto, "offload": "group"}) == gib(memory={"offload": "group"})


def test_samples_with_guidance_need_a_second_transformer() -> None:
    drawn = {"every": 10, "prompts": ["a cat"]}
    guided, plain = predicted(sample=drawn), predicted(sample={**drawn, "guidance": 1})
    assert guided.peak.name == "drawing samples"
    assert guided.peak.terms["unconditional transformer"] > 16
    assert plain.peak.name == "training"


def test_the_second_transformer_keeps_nothing_for_a_backward_pass() -> None:
    def second(checkpointing: str) -> float:
        memory = {"quantize": "fp8-dynamic", "gradient_checkpointing": checkpointing}
        found = predicted(sample={"every": 10, "prompts": ["a cat"]}, memory=memory)
        return next(phase for phase in found.phases if phase.name == "drawing samples").terms[
            "unconditional transformer"
        ]

    assert second("none") == second("full")


def test_caching_is_the_peak_where_the_model_is_streamed_and_images_are_large() -> None:
    large = {"path": "/nowhere", "resolution": 2048, "max_text_tokens": 16}
    found = predicted(dataset=large, memory={"quantize": "nf4", "offload": "group+activations", "compile": "regional"})
    assert {phase.name for phase in found.phases} == {"encoding images", "encoding captions", "training"}
    assert found.phases[0].gib == pytest.approx(10.3, rel=0.02)


def test_an_image_is_encoded_with_what_there_is_or_on_the_cpu() -> None:
    large = {"path": "/nowhere", "resolution": 2048, "max_text_tokens": 16}
    memory = {"quantize": "nf4", "offload": "group+activations", "compile": "regional"}
    enough, tight, small = (predicted(room, dataset=large, memory=memory).phases[0] for room in (11, 8.5, 7.5))
    assert enough.gib == pytest.approx(10.3, rel=0.02)
    assert tight.gib == pytest.approx(8.5)
    assert tight.terms["workspace"] < enough.terms["workspace"]
    assert set(small.terms) == {"VAE", "libraries"}


def test_the_longest_caption_is_reckoned_from_its_file(tmp_path: Path) -> None:
    assert footprint.longest_caption(spec(dataset={"path": str(tmp_path)})) == footprint.ASSUMED_TEXT_TOKENS
    (tmp_path / "more").mkdir()
    (tmp_path / "a.json").write_text("x" * 300)
    (tmp_path / "more" / "b.json").write_text("x" * 3000)
    (tmp_path / "c.txt").write_text("x" * 30000)
    assert footprint.longest_caption(spec(dataset={"path": str(tmp_path)})) == 1000
    assert footprint.longest_caption(spec(dataset={"path": str(tmp_path), "max_text_tokens": 64})) == 64


def test_the_longest_caption_of_any_set_counts_and_so_does_the_largest_resolution(tmp_path: Path) -> None:
    (tmp_path / "column").mkdir()
    metadata = tmp_path / "column" / "metadata.jsonl"
    metadata.write_text('{"file_name": "a.png", "text": "' + "x" * 600 + '"}\n')
    (tmp_path / "a.txt").write_text("x" * 300)
    sets = [
        {"path": str(tmp_path), "caption_ext": "txt", "resolution": 2048},
        {"path": str(tmp_path / "column"), "caption_field": "text"},
        {"path": "hub:me/more"},
    ]
    several = spec(dataset={"path": None, "sets": sets})
    assert footprint.longest_caption(several) == 200
    metadata.write_text("broken")
    assert footprint.longest_caption(several) == 100
    found = predicted(dataset={"path": None, "sets": sets})
    assert found.assumes["resolution"] == 2048


def test_a_limit_on_the_memory_is_the_room_and_the_option_unbinds() -> None:
    options = {"memory_limit_gib": 5.5, "ignore_memory_prediction": True}
    found = predicted(23.5, backend={"options": options})
    assert (found.room_gib, found.binding) == (5.5, False)
    assert predicted(23.5).binding


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"checkpoint": "tiny"}},
        {"backend": {"options": {"device": "cpu"}}},
        {"backend": {"options": {"device": "mps"}}},
    ],
    ids=str,
)
def test_nothing_is_predicted_for_the_tiny_checkpoint_or_off_cuda(sections: dict[str, Any]) -> None:
    assert predict(spec(**sections), IDEOGRAM4) is None


def test_what_the_trainer_counts_with_is_what_is_predicted_with() -> None:
    assert (footprint.SLOTS, footprint.STATES_UPWARDS) == (stream.SLOTS, stream.STATES_UPWARDS)
    assert footprint.MARGIN == recompute._MARGIN
    assert (footprint.VAE_ENCODES, footprint.VAE_SPARE) == (latents.ALIVE, latents.SPARE)
