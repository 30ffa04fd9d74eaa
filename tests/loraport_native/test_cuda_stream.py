"""On a CUDA card: what is streamed is what would be there, also where copies or blocks take long enough to show a
missing wait. Run with `pytest -m gpu tests/loraport_native/test_cuda_stream.py`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tiny_steps import PATTERNS  # noqa: E402

from loraport.spec.models import LoraSection  # noqa: E402
from loraport_native.compile import compile_model  # noqa: E402
from loraport_native.lora import inject  # noqa: E402
from loraport_native.models.checkpoint import find_checkpoint, load_transformer  # noqa: E402
from loraport_native.quantize import quantize_blocks  # noqa: E402
from loraport_native.recompute import recompute  # noqa: E402
from loraport_native.stream import Disk, Host, HostActivations, Stream  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]
LONG = 20_000_000  #: cycles, about 10 ms
SAME = 0.02  #: of the largest number: attention's gradients are summed in any order


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from loraport_native.tiny import write_tiny

    return find_checkpoint(str(write_tiny(tmp_path_factory.mktemp("tiny") / "tiny", "official")))


@pytest.mark.parametrize(
    ("place", "slow", "storage", "compiled"),
    [
        *itertools.product(
            ["host", "disk", "host and activations"], ["copies", "blocks"], ["none", "fp8", "nf4", "int8"], [False]
        ),
        *itertools.product(["host", "disk"], ["blocks"], ["none", "fp8"], [True]),
    ],
)
def test_steps_of_a_streamed_model_are_those_of_a_resident_one(
    checkpoint: Any, tmp_path: Path, place: str, slow: str, storage: str, compiled: bool
) -> None:
    resident = steps(checkpoint, storage, compiled)
    streamed = steps(checkpoint, storage, compiled, place, slow, tmp_path)
    for wanted, got in zip(resident, streamed, strict=True):
        assert (got - wanted).abs().max() <= SAME * wanted.abs().max()


def test_recomputed_blocks_whose_inputs_wait_on_the_host_draw_the_dropout_they_drew(
    checkpoint: Any, tmp_path: Path
) -> None:
    resident = steps(checkpoint, "none", False, dropout=0.3)
    streamed = steps(checkpoint, "none", False, "host and activations", "blocks", tmp_path, dropout=0.3)
    for wanted, got in zip(resident, streamed, strict=True):
        assert (got - wanted).abs().max() <= SAME * wanted.abs().max()


def steps(
    checkpoint: Any,
    storage: str,
    compiled: bool,
    place: str | None = None,
    slow: str = "",
    folder: Path = Path(),
    dropout: float = 0.0,
) -> list[torch.Tensor]:
    """Predictions and the adapter's gradients of four steps, on the CPU; with `place` every block is fetched anew."""
    device = torch.device("cuda:0")
    source = None if place is None else Disk(device, folder) if place == "disk" else Host(device)
    stream = None if source is None else Stream(source, device, slots=1, states_upwards=0)
    if source is not None and slow == "copies":
        source.copy = after_a_while(source.copy)  # type: ignore[method-assign]
    numbers = iter(range(99))

    def prepare(block: torch.nn.Module) -> None:
        quantize_blocks(block, storage, storage if storage in ("fp8", "int8") else "model")
        if stream is not None:
            stream.take(next(numbers), block)

    model = load_transformer(checkpoint, torch.bfloat16, device, "transformer", prepare, storage == "fp8")
    lora = LoraSection.model_validate({"type": "lora", "rank": 8, "alpha": 8, "dropout": dropout})
    adapter = inject(model, lora, PATTERNS, seed=0)
    draw = torch.Generator().manual_seed(1)
    for factor in adapter.parameters():
        factor.data = torch.empty(factor.shape).normal_(std=0.1, generator=draw).to(device, torch.bfloat16)
    if compiled:
        torch._dynamo.reset()
        compile_model(model, model.layers, "regional")
    if place == "host and activations":
        HostActivations(device).attach(model)
    else:
        recompute(model, "full")
    if slow == "blocks":
        model.run_block = after_a_while(model.run_block)
    if stream is not None:
        stream.attach(model, keeps_inputs=False)
    return [tensor for number in range(4) for tensor in step(model, adapter, number, device)]


def step(model: Any, adapter: Any, number: int, device: torch.device) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(number)
    latents, text = (torch.randn(1, tokens, 128, generator=draw).to(device) for tokens in (64, 16))
    torch.manual_seed(number)
    velocity = model.train().velocity(latents, text, None, torch.full((1,), 0.3, device=device), (8, 8))
    velocity.float().square().sum().backward()
    found = [velocity.detach(), *(factor.grad for factor in adapter.parameters())]
    for factor in adapter.parameters():
        factor.grad = None
    return [tensor.float().cpu() for tensor in found]


def after_a_while(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, on the current stream, after the card did nothing for a while."""

    def late(*arguments: Any) -> Any:
        torch.cuda._sleep(LONG)
        return function(*arguments)

    return late
