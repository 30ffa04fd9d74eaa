"""The evaluator: a LoRA file put on the model scores as the trainer's own held-out loss says."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from loraport.errors import DataError  # noqa: E402
from loraport.lora.canonical import LoHa, LoraFile, LoraModule, LowRank, RowScale  # noqa: E402
from loraport.plugins import plugins  # noqa: E402
from loraport.profiles import resolve_memory  # noqa: E402
from loraport.run import events  # noqa: E402
from loraport.run.api import train  # noqa: E402
from loraport.run.errors_line import find_error  # noqa: E402
from loraport.scoring import Score, read_line, write_job  # noqa: E402
from loraport.spec.models import TrainSpec  # noqa: E402
from loraport_native import evaluate  # noqa: E402
from loraport_native.applied import applied  # noqa: E402

SOURCE = Path(__file__).parents[2] / "examples" / "quickstart" / "images"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainSpec, Path, list[float]]:
    """A spec, the LoRA that it trained, and the held-out losses that the trainer told at its start and end."""
    from loraport_native.tiny import write_tiny

    folder = tmp_path_factory.mktemp("evaluate")
    for place, names in (("images", ("cat", "coffee")), ("held-out", ("rocket",))):
        (folder / place).mkdir()
        for name in names:
            for suffix in ("jpg", "json"):
                (folder / place / f"{name}.{suffix}").symlink_to(SOURCE / f"{name}.{suffix}")
    content = {
        "name": "scored",
        "model": {"checkpoint": str(write_tiny(folder / "tiny", "official")), "dtype": "fp32"},
        "dataset": {"path": str(folder / "images"), "resolution": 64},
        "lora": {"rank": 4, "alpha": 8},
        "train": {"steps": 3, "learning_rate": 0.01, "optimizer": "adamw"},
        "save": {"dtype": "fp32"},
        "validation": {"every": 3, "path": str(folder / "held-out")},
    }
    spec = resolve_memory(TrainSpec.model_validate(content), plugins().profiles())
    told: list[float] = []
    result = train(
        spec, out=folder / "run", on_event=lambda e: told.append(e.loss) if isinstance(e, events.Validation) else None
    )
    return spec, result.lora, told


def test_the_scores_are_the_losses_that_the_trainer_measured_itself(
    trained: tuple[TrainSpec, Path, list[float]], tmp_path: Path
) -> None:
    spec, lora, (start, end) = trained
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    write_job(tmp_path / "job.json", spec, [tmp_path / "broken.safetensors", lora])
    (scorer,) = [backend for backend in plugins().backends().values() if backend.name == "native"]
    done = subprocess.run(scorer.score_command(tmp_path / "job.json"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    alone, broken, scored = filter(None, map(read_line, done.stdout.splitlines()))
    assert (alone.lora, broken.losses, scored.lora) == (None, [], str(lora))
    assert broken.problem
    assert len(alone.losses) == len(scored.losses) == 4
    assert np.mean(alone.losses) == pytest.approx(start, rel=1e-5)
    assert np.mean(scored.losses) == pytest.approx(end, rel=1e-5)
    assert end != pytest.approx(start, rel=1e-3)


def test_a_job_that_cannot_be_done_ends_with_its_error(
    trained: tuple[TrainSpec, Path, list[float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = trained[0].model_copy(update={"model": trained[0].model.model_copy(update={"checkpoint": "/none"})})
    write_job(tmp_path / "job.json", spec, [])
    monkeypatch.setattr(sys, "argv", ["evaluate", str(tmp_path / "job.json")])
    assert evaluate.main() == DataError.exit_code
    error = find_error(capsys.readouterr().out)
    assert error is not None
    assert "/none" in error.message


def linear() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"layer": torch.nn.Linear(6, 5)})


def factors(kind: str) -> LowRank | LoHa:
    random = np.random.default_rng(0)
    if kind == "lora":
        return LowRank(down=random.normal(size=(1, 6)), up=random.normal(size=(5, 1)))
    return LoHa(*(random.normal(size=shape) for shape in ((5, 2), (2, 6), (5, 2), (2, 6))))


@pytest.mark.parametrize("kind", ["lora", "loha"])
@pytest.mark.parametrize("dora", [False, True])
def test_an_applied_module_computes_what_the_changed_weight_would(kind: str, dora: bool) -> None:
    model, made = linear(), factors(kind)
    layer: torch.nn.Linear = model["layer"]  # type: ignore[index]
    layer.bias = None
    changed = layer.weight.detach().double() + 0.5 * torch.from_numpy(made.product()(0, 5))
    trained = np.linspace(0.5, 1.5, 5)
    if dora:
        changed *= torch.from_numpy(trained)[:, None] / changed.norm(dim=1, keepdim=True)
    module = LoraModule("layer", made, 0.5, RowScale(trained) if dora else None)
    inputs = torch.randn(3, 6)
    before = layer(inputs)
    with torch.no_grad(), applied(model, LoraFile(None, {"layer": module})):
        assert torch.allclose(layer(inputs).double(), inputs.double() @ changed.T, rtol=1e-5, atol=1e-6)
    assert torch.equal(layer(inputs), before)


def test_a_module_that_does_not_fit_the_model_is_refused_and_nothing_stays_on_it() -> None:
    model = linear()
    good = LoraModule("layer", factors("lora"), 1.0)
    for bad in (
        dataclasses.replace(good, name="layers.9"),
        LoraModule("layer", LowRank(down=np.ones((1, 7)), up=np.ones((5, 1))), 1.0),
    ):
        with pytest.raises(DataError, match=bad.name), applied(model, LoraFile(None, {bad.name: bad})):
            pass
    assert not model["layer"]._forward_hooks  # type: ignore[index]


def test_lines_that_are_no_scores_are_passed_over() -> None:
    assert read_line("Loading weights") is None
    assert read_line(Score("a", [1.0], None).encode()) == Score("a", [1.0])
