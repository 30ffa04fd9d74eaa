"""The training loop. Everything random is a function of the seed and the step, so a resumed run repeats nothing and
loses nothing: it ends bit-identical to one that was never stopped."""

from __future__ import annotations

import gc
import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from loraport.buckets import Size
from loraport.errors import BackendError
from loraport.run.events import Checkpoint, Event, PhaseStarted, Progress, Resumed, Step, Validation
from loraport.spec.models import TrainSpec
from loraport_native import flow
from loraport_native.checkpoints import Writer, load_state, on_host, save_checkpoint, whole_checkpoints
from loraport_native.data import Sample, TrainingSet, epoch_batches
from loraport_native.device import free_memory_bytes, peak_memory_gib, peak_reserved_gib, read_later, restart_peak
from loraport_native.distributed import ALONE, Group
from loraport_native.footprint import OPTIMIZER_BYTES
from loraport_native.held_out import case, case_count
from loraport_native.lora import Adapter, Ema, Masters, written_adapter
from loraport_native.models.ideogram4 import Ideogram4
from loraport_native.optim import make_optimizer, make_schedule, wants_shapes
from loraport_native.recompute import recompute_what_must_be
from loraport_native.seeds import derived_seed

Emit = Callable[[Event], None]


class Stopped(Exception):
    """A stop was asked for and the checkpoint is written."""


@dataclass(frozen=True)
class Draw:
    """What one forward pass takes, on the device: latents and noise (B, N, channels), sigma (B,), text (B, T, hidden)
    with the lengths of the samples' own (see `pad_left`), and the grid (height, width) in tokens."""

    latents: Tensor
    noise: Tensor
    sigma: Tensor
    text: Tensor
    lengths: list[int] | None
    grid: tuple[int, int]


@dataclass(frozen=True)
class Taken:
    """An optimizer step that was queued, and when (`time.perf_counter`); `numbers` waits for its losses and the norm of
    its gradient.

    A step is told while the next one is queued, so that the device never waits for the host.
    """

    step: int
    started: float
    batches: list[list[Sample]]
    rate: float
    numbers: Callable[[], list[float]]


class Trainer:
    """One training run over prepared data. `fit` trains from the last whole checkpoint to the end."""

    def __init__(
        self,
        spec: TrainSpec,
        run_dir: Path,
        model: Ideogram4,
        adapter: Adapter,
        data: TrainingSet,
        emit: Emit,
        draw_samples: Callable[[int], None] = lambda step: None,
        group: Group = ALONE,
    ):
        self.spec, self.run_dir, self.model = spec, run_dir, model
        self.adapter, self.data, self.emit, self.draw_samples = adapter, data, emit, draw_samples
        self.group = group
        self.device = model.embed_image_indicator.weight.device
        self.masters = Masters(adapter, model.dtype)
        stepped = self.masters.weights if wants_shapes(spec.train) else [self.masters.flat]
        self.optimizer = make_optimizer(stepped, spec.train)
        self.schedule = make_schedule(self.optimizer, spec.train)
        self.ema = Ema(self.masters, spec.train.ema_decay) if spec.train.ema_decay else None
        self.step = 0
        self.stop_requested = False
        self._epoch: tuple[int, list[list[Sample]]] = (-1, [])
        self._ahead: dict[int, Draw] = {}
        self._untold: Taken | None = None
        self._told_at = 0.0
        self.runs_ahead = self.device.type == "cuda"  #: whether what the host queues is done later
        self._writer = Writer()

    def fit(self) -> None:
        """Train to the last step. Raises Stopped when a stop was asked for, BackendError when training diverges."""
        self._resume()
        self._warm_up()
        self._at_intervals()  # also after resuming: what was due at that step may not have been done
        gc.collect()
        gc.freeze()  # the libraries' objects, by the hundred thousand, need not be looked through during steps
        try:
            self._take_steps()
        finally:
            gc.unfreeze()

    def _take_steps(self) -> None:
        spec = self.spec
        phase_is_over = True
        while self.step < spec.train.steps:
            if phase_is_over:
                self.emit(PhaseStarted(phase="train"))
            self._one_step()
            last = self.step == spec.train.steps
            stop = self.group.any(self.stop_requested)
            if last or stop or (spec.save.every and self.step % spec.save.every == 0):
                self._save()
            if last or stop or not self.runs_ahead:
                self._tell_checkpoint(wait=True)
            if stop and not last:
                raise Stopped
            phase_is_over = self._at_intervals()

    def _warm_up(self) -> None:
        """Compile before the first step is timed, and settle what is recomputed. Changes nothing that is trained."""
        memory = self.spec.memory
        settles = memory.gradient_checkpointing == "auto" and memory.offload == "none" and self.device.type == "cuda"
        if self.step == self.spec.train.steps or (memory.compile == "none" and not settles):
            return
        self.emit(PhaseStarted(phase="compile"))
        batch = self._largest_batch()

        def probe() -> None:
            self.model.train()
            try:
                self._loss(batch, 0).backward()
            finally:
                for parameter in self.adapter.parameters():
                    parameter.grad = None

        if not settles:
            probe()
            self._compiled()
            return
        # What is not there yet: the optimizer's state, and the gradients that wait in float32 for the next pass.
        later = OPTIMIZER_BYTES[self.spec.train.optimizer] + (4 if self.spec.train.gradient_accumulation > 1 else 0)
        state = int(later * sum(weight.numel() for weight in self.masters.weights))
        limit = torch.cuda.memory_allocated(self.device) + free_memory_bytes(self.device) - state
        count = recompute_what_must_be(self.model, probe, limit)
        print(f"memory.gradient_checkpointing: auto recomputes {count} of {len(self.model.layers)} blocks.", flush=True)
        self._compiled()

    def _compiled(self) -> None:
        """Tell what compiling took, of which the compiler's own trials are a part, and count the steps' memory anew."""
        self.emit(Progress(done=1, total=1, peak_memory_gib=peak_memory_gib(self.device)))
        restart_peak(self.device)

    def _largest_batch(self) -> list[Sample]:
        """A batch of as many tokens as any may have: of one size, the longest captions, none of them dropped."""
        length = {sample.text: len(self.data.text(sample.text)) for sample in self.data.samples}
        buckets: defaultdict[Size, list[Sample]] = defaultdict(list)
        for sample in sorted(self.data.samples, key=lambda one: length[one.text], reverse=True):
            if len(buckets[sample.bucket]) < self.spec.train.batch_size:
                buckets[sample.bucket].append(replace(sample, caption_dropout=0.0))

        def tokens(batch: list[Sample]) -> int:
            width, height = batch[0].bucket
            return sum((width // 16) * (height // 16) + length[one.text] for one in batch)

        return max(buckets.values(), key=tokens)

    # -- one optimizer step -------------------------------------------------------------------------------------

    def _one_step(self) -> None:
        """Queue one optimizer step; the one before is told meanwhile."""
        started = time.perf_counter()
        train = self.spec.train
        if not self.model.training:
            self.model.train()
        # Counted over all GPUs, so that the data and the noise of a step do not depend on how many there are.
        parts = train.gradient_accumulation * self.group.size
        indices = range(self.step * parts, (self.step + 1) * parts)
        batches = [self._batch(index) for index in indices]
        losses = torch.zeros(parts, device=self.device)
        for part in self.group.share(range(parts)):
            loss = self._loss(batches[part], indices[part]) / parts
            self._settle()  # the step before; the device has this forward pass to go on with
            loss.backward()
            if indices[part] + self.group.size < train.steps * parts:
                self._draw_ahead(indices[part] + self.group.size)  # while the device still computes
            self.masters.collect_gradients()
            losses[part] = loss.detach()
        gradients = self.masters.flat.grad
        assert gradients is not None
        for values in (gradients, losses):
            self.group.sum(values)
        norm = torch.nn.utils.clip_grad_norm_(self.masters.flat, train.max_grad_norm or math.inf)
        numbers = read_later(torch.cat((losses, norm[None])))
        gradients.nan_to_num_(0.0, 0.0, 0.0)  # a step that diverged, which is noticed later, leaves the masters finite
        rate = float(self.schedule.get_last_lr()[0])
        self.optimizer.step()
        self.schedule.step()
        self.masters.forget_gradients()
        self.masters.publish()
        if self.ema:
            self.ema.update(self.masters)
        self.step += 1
        self._untold = Taken(self.step, started, batches, rate, numbers)
        if not self.runs_ahead:
            self._settle()

    def _settle(self) -> None:
        """Wait for the last step and tell it."""
        if self._untold:
            taken, self._untold = self._untold, None
            self._tell(taken)

    def _tell(self, taken: Taken) -> None:
        """Tell a step once the device has come to its end. Raises BackendError when training has diverged in it."""
        *losses, norm = taken.numbers()
        if not all(map(math.isfinite, (*losses, norm))):
            suspects = [batch for loss, batch in zip(losses, taken.batches, strict=True) if not math.isfinite(loss)]
            bad, every = ([sample for batch in some for sample in batch] for some in (suspects, taken.batches))
            raise self._diverged("loss" if bad else "gradient", taken.step, bad or every)
        now = time.perf_counter()
        seconds, self._told_at = now - max(taken.started, self._told_at), now
        self.emit(
            Step(
                step=taken.step,
                total=self.spec.train.steps,
                loss=sum(losses),
                lr=taken.rate,
                seconds=seconds,
                images_per_second=sum(map(len, taken.batches)) / seconds,
                grad_norm=norm,
                peak_memory_gib=peak_memory_gib(self.device),
                peak_reserved_gib=peak_reserved_gib(self.device),
            )
        )
        self._tell_checkpoint(wait=False)

    def _batch(self, index: int) -> list[Sample]:
        """The batch of a forward pass, counted from the start of the run."""
        seed, size = self.spec.train.seed, self.spec.train.batch_size
        if self._epoch[0] < 0:
            self._epoch = (0, epoch_batches(self.data.samples, size, seed, 0))
        epoch, position = divmod(index, len(self._epoch[1]))
        if epoch != self._epoch[0]:
            self._epoch = (epoch, epoch_batches(self.data.samples, size, seed, epoch))
        return self._epoch[1][position]

    def _draw_ahead(self, index: int) -> None:
        self._ahead = {index: self._draw(self._batch(index), index)}

    def _draw(self, batch: list[Sample], index: int) -> Draw:
        """A batch on the device, with noise, time and dropped captions drawn from (seed, index)."""
        train = self.spec.train
        generator = torch.Generator().manual_seed(derived_seed(train.seed, "train", index))
        width, height = batch[0].bucket
        dropped = torch.rand(len(batch), generator=generator) < torch.tensor([one.caption_dropout for one in batch])
        sigma = flow.sample_sigma(
            len(batch), flow.shifted_mean(train.timestep_mean, width, height), train.timestep_std, generator
        )
        keys = [self.data.empty_text if drop else sample.text for sample, drop in zip(batch, dropped, strict=True)]
        latents = [self.data.latents(sample) for sample in batch]
        shape, pinned = (len(batch), *latents[0].shape), self.device.type == "cuda"
        noise = torch.randn(shape, generator=generator, pin_memory=pinned)  # else the copy waits for the device
        return self._on_device(latents, noise, sigma, keys, (height // 16, width // 16))

    def _on_device(
        self, latents: list[Tensor], noise: Tensor, sigma: Tensor, keys: list[str], grid: tuple[int, int]
    ) -> Draw:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(self.device, non_blocking=True)

        text, lengths = pad_left([move(self.data.text(key)) for key in keys])
        return Draw(torch.stack([move(one) for one in latents]), move(noise), move(sigma), text, lengths, grid)

    def _loss(self, batch: list[Sample], index: int) -> Tensor:
        """Weighted mean loss of a batch; its dropout is drawn from (seed, index) too."""
        draw = self._ahead.pop(index) if index in self._ahead else self._draw(batch, index)
        torch.manual_seed(derived_seed(self.spec.train.seed, "dropout", index))
        weights = torch.tensor([sample.weight for sample in batch]).to(self.device, non_blocking=True)
        return (self._losses(draw) * weights).mean()

    def _losses(self, draw: Draw) -> Tensor:
        inputs, target = flow.noisy(draw.latents, draw.noise, draw.sigma)
        prediction = self.model.velocity(inputs, draw.text, draw.lengths, 1 - draw.sigma, draw.grid)
        return flow.losses(prediction, target)

    def _diverged(self, what: str, step: int, samples: list[Sample]) -> BackendError:
        self._tell_checkpoint(wait=True)
        names = ", ".join(dict.fromkeys(sample.name for sample in samples))
        whole = list(whole_checkpoints(self.run_dir).values())
        good = f"The last good checkpoint is {whole[-1]}." if whole else "No checkpoint was written yet."
        return BackendError(
            f"The {what} of step {step} is not finite{f', on: {names}' if names else ''}. {good}",
            hint="Lower train.learning_rate, or check these images and captions, then start again.",
        )

    # -- what happens between steps -----------------------------------------------------------------------------

    def _at_intervals(self) -> bool:
        """Validate and draw samples where the spec asks for it. Whether anything was done."""
        spec, last = self.spec, self.step == self.spec.train.steps
        validate = spec.validation.every and (last or self.step % spec.validation.every == 0)
        sample = spec.sample.every and self.step and (last or self.step % spec.sample.every == 0)
        if validate or sample:
            self._settle()
        if validate:
            self.emit(PhaseStarted(phase="validate"))
            self._with_saved_weights(self._validate)
        if sample and self.group.leads:
            self.emit(PhaseStarted(phase="sample"))
            self._with_saved_weights(lambda: self.draw_samples(self.step))
        return bool(validate or sample)

    def _with_saved_weights(self, action: Callable[[], None]) -> None:
        """Run `action` with the weights that would be saved (the EMA's, if there is one) and without dropout."""
        self.model.eval()
        if self.ema:
            live = [weight.detach().clone() for weight in self.masters.weights]
            self.masters.publish(self.ema.weights)
            action()
            self.masters.publish(live)
        else:
            action()

    @torch.no_grad()
    def _validate(self) -> None:
        """The held-out loss: each image at fixed noise and noise levels, the same in every run whatever its seed."""
        values = torch.zeros(case_count(self.data), device=self.device)
        for number in self.group.share(range(len(values))):
            values[number] = self._losses(self._on_device(*case(self.data, self.spec.train, number)))[0]
        self.group.sum(values)
        mean_loss = values.double().mean().item()
        if not math.isfinite(mean_loss):
            raise self._diverged("held-out loss", self.step, self.data.held_out)
        self.emit(Validation(step=self.step, loss=mean_loss))

    # -- checkpoints --------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Begin a checkpoint of this step, once the one before is whole."""
        self._settle()
        self._tell_checkpoint(wait=True)
        if not all(weight.isfinite().all() for weight in self.masters.weights):
            raise self._diverged("adapter", self.step, [])
        if not self.group.leads:
            return
        state = {
            "step": self.step,
            "masters": self.masters.state(),
            "optimizer": on_host(self.optimizer.state_dict()),
            "schedule": on_host(self.schedule.state_dict()),
            "ema": self.ema.state() if self.ema else None,
        }
        weights = self.ema.weights if self.ema else self.masters.weights
        tensors = dict(zip(self.masters.names, weights, strict=True))
        adapter = written_adapter(self.adapter, tensors, self.spec.model.family, self.step)
        self._writer.begin(partial(save_checkpoint, self.run_dir, self.step, adapter, state, self.spec.save.keep))

    def _tell_checkpoint(self, wait: bool) -> None:
        """Tell the checkpoint that is being written if it is whole. Raises RunFolderError when it could not be."""
        folder = self._writer.written(wait)
        if folder is not None:
            step = int(folder.name.removeprefix("step-"))
            self.emit(Checkpoint(step=step, path=str(folder.relative_to(self.run_dir))))

    def _resume(self) -> None:
        whole = whole_checkpoints(self.run_dir)
        if not whole:
            return
        state = load_state(list(whole.values())[-1])
        self.masters.load(state["masters"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.ema:
            self.ema.load(state["ema"])
        self.step = state["step"]
        self.emit(Resumed(step=self.step))


def pad_left(texts: list[Tensor]) -> tuple[Tensor, list[int] | None]:
    """Stack text features (T_i, hidden) as (B, max T, hidden) with zeros on the left, and give their lengths.

    Lengths are None when all are equal.
    """
    lengths = [len(text) for text in texts]
    if len(set(lengths)) == 1:
        return torch.stack(texts), None
    longest = max(lengths)
    padded = [torch.cat((text.new_zeros(longest - len(text), text.shape[1]), text)) for text in texts]
    return torch.stack(padded), lengths
