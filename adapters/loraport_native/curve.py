"""Draws `loss.png` when a run ends: the training loss, its running mean, and the held-out loss."""

from __future__ import annotations

from pathlib import Path

from loraport.files import atomic_path
from loraport.run.events import Event, Failed, Finished, Interrupted, Resumed, Step, Validation, decode
from loraport.spec.models import TrainSpec

SMOOTHING = 0.95


class LossCurve:
    """A run-event listener that draws the losses in events.jsonl when the run ends, however it ends."""

    def __init__(self, spec: TrainSpec, run_dir: Path):
        self.spec, self.run_dir = spec, run_dir

    def handle(self, event: Event) -> None:
        if isinstance(event, Finished | Failed | Interrupted):
            train, held_out = self.losses()
            if train:
                self._draw(train, held_out)

    def losses(self) -> tuple[dict[int, float], dict[int, float]]:
        """Training and held-out loss by step. What was told of steps after a checkpoint that was resumed is gone."""
        train: dict[int, float] = {}
        held_out: dict[int, float] = {}
        for line in (self.run_dir / "events.jsonl").read_text(encoding="utf-8").splitlines():
            event = decode(line)
            if isinstance(event, Step) and event.loss is not None:
                train[event.step] = event.loss
            elif isinstance(event, Validation):
                held_out[event.step] = event.loss
            elif isinstance(event, Resumed):
                for losses in (train, held_out):
                    for step in [step for step in losses if step > event.step]:
                        del losses[step]
        return train, held_out

    def _draw(self, train: dict[int, float], held_out: dict[int, float]) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(*_line(train), color="#b9c6d6", linewidth=0.8, label="training, each step")
        axes.plot(*_line(smoothed(train)), color="#1f5a99", label="training, running mean")
        if held_out:
            axes.plot(*_line(held_out), "o-", color="#d1495b", label="held-out, fixed noise")
        axes.set(title=self.spec.name, xlabel="optimizer step", ylabel="loss (mean squared error)")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        with atomic_path(self.run_dir / "loss.png") as temporary:
            figure.savefig(temporary, format="png", dpi=120)


def smoothed(losses: dict[int, float]) -> dict[int, float]:
    """Exponential mean in the order of steps, with the bias of its start corrected, as in Adam."""
    mean, means = 0.0, {}
    for count, step in enumerate(sorted(losses), 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * losses[step]
        means[step] = mean / (1 - SMOOTHING**count)
    return means


def _line(losses: dict[int, float]) -> tuple[list[int], list[float]]:
    steps = sorted(losses)
    return steps, [losses[step] for step in steps]
