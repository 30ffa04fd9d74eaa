"""The data of a bench: `results.json`, one `Run` for each training. docs/bench-results.md is generated from here.

Memory and disk are in bytes, times in seconds, energy in joules. A moment is in seconds since the run's process was
started, unless it says UTC. What could not be measured is null, never zero.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from loraport.errors import DataError
from loraport.files import write_atomic

Tier = Literal["matched", "best-effort"]
Status = Literal["ok", "failed", "refused"]
Reason = Literal["refused", "not-ready", "out-of-memory", "time-out", "error"]
PhaseName = Literal["start", "load_quantise", "cache", "compile", "train", "validate", "sample", "save", "convert"]


class Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Failure(Data):
    """Why a row has no result."""

    reason: Reason = Field(description="Kind of failure.")
    message: str = Field(description="What failed, as the command told it.")
    exit_code: int | None = Field(None, description="Exit code of the run (docs/exit-codes.md).")


class Idle(Data):
    """What else was on the card just before the run."""

    waited_s: float = Field(ge=0, description="Time waited for the card to be idle.")
    utilisation_percent: float | None = Field(None, description="Use of the card's processors.")
    used_bytes: int | None = Field(None, description="Device memory in use by anything.")
    processes: int | None = Field(None, description="Processes with device memory.")


class Machine(Data):
    """Where the run was."""

    system: str = Field(description="Operating system and architecture.")
    processor: str = Field(description="The host's processor.")
    cores: int = Field(ge=1, description="Logical cores that the run could use.")
    memory_bytes: int = Field(ge=0, description="The host's memory.")
    card: str | None = Field(None, description="The GPU; null on a CPU.")
    cards: int = Field(0, ge=0, description="GPUs of the machine.")
    card_bytes: int | None = Field(None, description="The GPU's memory.")
    compute_capability: tuple[int, int] | None = Field(None, description="The GPU's, (major, minor).")
    driver: str | None = Field(None, description="Version of the NVIDIA driver.")
    idle: Idle | None = Field(None, description="The state of the card before the run; null on a CPU.")


class Judgement(Data):
    """A backend's verdict on a field of the spec."""

    path: str = Field(description="Dotted path in the spec.")
    value: Any = Field(description="Value in the run's spec.")
    kind: Literal["exact", "approximated", "defaulted", "ignored", "refused"] = Field(
        description="What the backend does."
    )
    reason: str = Field(description="How, or why not.")


class Configuration(Data):
    """What exactly was run. `<bench>` stands for the bench's folder and `<home>` for the user's; of any other absolute
    path, as of a local checkpoint, only the last part is kept: `…/name`."""

    spec: dict[str, Any] = Field(description="The resolved spec.")
    files: dict[str, str] = Field(description="Generated files, by path in the run folder.")
    command: list[str] = Field(description="The trainer's command.")
    env: dict[str, str] = Field(description="Environment variables set for it.")


class Spread(Data):
    """Of the measured steps."""

    count: int = Field(ge=1, description="Steps measured, after the warm-up.")
    median: float = Field(ge=0, description="Median.")
    p10: float = Field(ge=0, description="10th percentile.")
    p90: float = Field(ge=0, description="90th percentile.")
    mean: float = Field(ge=0, description="Mean.")


class Steps(Data):
    """Seconds a step. From one step's end to the next's, as seen from outside; pauses for other phases left out."""

    warm_up: int = Field(ge=0, description="First steps left out.")
    seconds: Spread = Field(description="Of a step.")
    measured: Literal["trainer", "outside"] = Field(
        description="Whose clock: the trainer's own record of each step, or the arrival of its events."
    )
    wall_mean: float | None = Field(
        None, description="Mean from outside, over the measured steps together: the check on the trainer's clock."
    )
    each: list[float] = Field(description="Every measured step, in order; thinned evenly beyond 1000.")


class Trace(Data):
    """Memory over time, sampled from outside over the whole process tree."""

    scope: Literal["processes", "device"] = Field(
        description="`processes`: of the run's own processes. `device`: all that is in use on the card, where the "
        "driver doesn't tell processes apart, without what the driver keeps for itself if it tells that apart; what "
        "was used before the run is subtracted nowhere. Of several cards, their sum."
    )
    interval_s: float = Field(gt=0, description="Mean time between samples, before thinning.")
    longest_gap_s: float = Field(ge=0, description="Longest time between two samples.")
    peak_bytes: int = Field(ge=0, description="Most of any sample.")
    by_phase: dict[PhaseName, int] = Field(description="Most while each phase ran.")
    samples: list[tuple[float, int]] = Field(
        description="(moment, bytes), at most 400: the largest sample of each of equal spans."
    )


class TorchPeaks(Data):
    """What torch's allocator says in the trainer, where it tells. Not comparable with what is seen from outside."""

    allocated_bytes: int = Field(ge=0, description="Most allocated.")
    reserved_bytes: int | None = Field(None, description="Most held, unused parts included.")


class Disk(Data):
    """Disk use. `written_bytes` is what the processes handed to the system to store (Linux)."""

    written_bytes: int | None = Field(None, description="Written by the run's processes; null where not told.")
    read_bytes: int | None = Field(None, description="Read from storage, not from the system's page cache.")
    cache_bytes: int = Field(ge=0, description="Largest size of what the trainer cached of images and captions.")
    run_folder_bytes: int = Field(ge=0, description="The run folder at its end, links not followed.")
    lora_bytes: int | None = Field(None, description="The published LoRA.")


class Range(Data):
    """Of samples."""

    low: float = Field(description="Least.")
    median: float = Field(description="Median.")
    high: float = Field(description="Most.")


class Card(Data):
    """One of the GPUs that the run used, during the measured steps: not the first ones, in which kernels may be
    compiled. What the card does not tell is null."""

    samples: int | None = Field(
        None,
        ge=0,
        description="Looks at the card, one each half second; none where the steps took less. Null in files of earlier "
        "versions, whose ranges are of all of training, first steps included; reports leave those out.",
    )
    clock_mhz: Range | None = Field(None, description="Clock of the multiprocessors.")
    memory_clock_mhz: Range | None = Field(None, description="Clock of the memory.")
    power_w: Range | None = Field(None, description="Power.")
    temperature_c: Range | None = Field(None, description="Temperature.")
    utilisation_percent: Range | None = Field(None, description="Time in which a kernel ran.")
    throttled: list[str] | None = Field(None, description="Reasons for which the driver lowered the clocks.")


class Energy(Data):
    """The energy counters of the GPUs that the run used, summed; everything on them counts."""

    joules: float = Field(ge=0, description="Over the whole run.")
    train_joules: float | None = Field(None, description="While steps were trained, the first ones included.")
    steps_joules: float | None = Field(None, description="During the measured steps.")
    joules_per_image: float | None = Field(
        None,
        description="steps_joules by the images of those steps. In files of earlier versions, without steps_joules, "
        "train_joules by all images; reports leave that out.",
    )


class Work(Data):
    """What was done, counted from the outputs."""

    steps: int = Field(ge=0, description="Optimizer steps told by the trainer.")
    images: int | None = Field(None, description="Images trained: sum over steps of what the trainer told.")
    modules: int | None = Field(None, description="Modules in the published LoRA.")
    parameters: int | None = Field(None, description="Numbers in its factors.")
    expected_steps: int = Field(ge=1, description="Steps that the spec asks for.")
    expected_images: int = Field(ge=1, description="Images that the spec asks for.")
    differs: list[str] = Field(description="How it differs from the spec or from the group's other backends.")


class Loss(Data):
    """A point of the trainer's own loss curve. Shown, never compared: trainers weight losses differently."""

    step: int = Field(ge=1, description="Optimizer steps done.")
    images: int = Field(ge=1, description="Images trained.")
    train_s: float = Field(description="Seconds of training so far.")
    loss: float = Field(description="As the trainer printed it.")


class QualityPoint(Data):
    """A checkpoint's held-out loss."""

    step: int = Field(ge=1, description="Optimizer steps done.")
    images: int = Field(ge=1, description="Images trained.")
    train_s: float = Field(description="Seconds of training so far.")
    loss: float = Field(description="Mean over the triples.")


class Quality(Data):
    """Held-out loss on fixed (image, noise, time) triples, by one evaluator for every backend."""

    evaluator: str = Field(description="Which one, with its version and the numbers it computes in.")
    triples: int = Field(ge=1, description="Triples: images times noise levels.")
    images: int = Field(ge=1, description="Held-out images.")
    without: float = Field(description="Mean loss of the model without a LoRA.")
    loss: float = Field(description="Mean loss with the published LoRA.")
    each: list[float] = Field(description="Loss of each triple with the LoRA, in the order of `without_each`.")
    without_each: list[float] = Field(description="Loss of each triple without.")
    curve: list[QualityPoint] = Field(description="Of the checkpoints that were kept, and the end.")

    @property
    def gain(self) -> float:
        """By how much the LoRA lowers the loss, as a share of that without."""
        return 1 - self.loss / self.without


class Inequality(Data):
    """What is still different between the backends of a matched group."""

    path: str = Field(description="Dotted path in the spec.")
    value: Any = Field(description="Value in the spec.")
    backends: dict[str, str] = Field(description="By backend: `exact`, or the kind and the reason.")


class Overhead(Data):
    """A run through LoraPort against the same generated configuration, started by hand."""

    step_median_s: float = Field(description="Median step of the run started by hand.")
    step_share: float = Field(description="By how much a step through LoraPort is longer, as a share.")
    run_s: float = Field(description="Wall time of the process started by hand.")
    run_extra_s: float = Field(
        description="Wall time that the run through LoraPort takes beyond that, without converting and proving."
    )
    pairs: int = Field(ge=1, description="Pairs run in turn; the medians of their differences are given.")
    step_shares: list[float] = Field([], description="`step_share` of each pair.")
    run_extras_s: list[float] = Field([], description="`run_extra_s` of each pair.")
    phase_extras_s: dict[PhaseName, float] = Field(
        {}, description="Seconds of each phase beyond the same one started by hand; medians of the pairs."
    )


class Run(Data):
    """One row: a training, or why there is none."""

    key: str = Field(description="Unique: tier/profile/backend/seed/repeat, with batch-N after the profile beyond 1.")
    position: int = Field(ge=0, description="Place in the schedule.")
    tier: Tier = Field(description="`matched` or `best-effort`.")
    profile: str = Field(description="The quantisation asked for, or `spec` for the spec's own memory section.")
    batch: int = Field(1, ge=1, description="`train.batch_size`.")
    backend: str = Field(description="Name of the backend.")
    repeat: int = Field(ge=0, description="Which repeat; odd ones go through the backends backwards.")
    seed: int = Field(ge=0, description="`train.seed`.")
    status: Status = Field(description="How it ended.")
    failure: Failure | None = Field(None, description="Why, when it isn't `ok`.")
    images_sha256: str | None = Field(None, description="Of the staged images and captions. Null in early records.")
    started: AwareDatetime = Field(description="UTC.")
    total_s: float = Field(ge=0, description="Wall time of the whole command.")
    machine: Machine | None = Field(None, description="Null for a row that was refused.")
    versions: dict[str, str] = Field(description="LoraPort, Python, and what the backend's environment holds.")
    configuration: Configuration | None = Field(None, description="Null for a row that was refused.")
    verdicts: list[Judgement] = Field(description="One for each field of the spec.")
    phases: dict[PhaseName, float] = Field(default_factory=dict, description="Seconds in each phase.")
    timeline: list[tuple[PhaseName, float, float]] = Field(
        default_factory=list, description="(phase, moment of its beginning, of its end), in order."
    )
    steps: Steps | None = Field(None, description="Null when no step was measured.")
    images_per_second: float | None = Field(None, description="By `steps.wall_mean`, else by the median step.")
    device_memory: Trace | None = Field(None, description="Null without a GPU.")
    host_memory: Trace | None = Field(
        None, description="Resident memory summed over the processes: pages they share count for each."
    )
    torch_peaks: TorchPeaks | None = Field(None, description="Null where the trainer doesn't tell.")
    disk: Disk | None = Field(None, description="Disk use.")
    cards: list[Card] = Field(default_factory=list, description="One for each GPU used; none without a GPU.")
    energy: Energy | None = Field(None, description="Null where one of the cards has no counter.")
    work: Work | None = Field(None, description="Null when nothing was trained.")
    losses: list[Loss] = Field(default_factory=list, description="At most 500 points.")
    quality: Quality | None = Field(None, description="Null when it was not scored; `notes` says why.")
    overhead: Overhead | None = Field(None, description="Only with --overhead, on one run of each backend.")
    notes: list[str] = Field(default_factory=list, description="What a reader must know about this row.")

    @property
    def group(self) -> tuple[str, str, int]:
        """What the row is compared within: (tier, profile, batch)."""
        return self.tier, self.profile, self.batch


class Protocol(Data):
    """How the bench was run."""

    backends: list[str] = Field(description="In the order of the even repeats.")
    profiles: list[str] = Field(description="Quantisations; `spec` for the spec's own memory section.")
    batches: list[int] = Field(description="Values of train.batch_size; each is a group of its own.")
    tiers: list[Tier] = Field(description="Which tiers.")
    repeats: int = Field(ge=1, description="Repeats of each row, in alternating order.")
    seeds: list[int] = Field(description="Seeds; a repeat takes the next.")
    steps: int = Field(ge=1, description="Optimizer steps of a run.")
    warm_up: int = Field(ge=0, description="First steps left out of the times.")
    images: int = Field(ge=1, description="Images trained on, pre-sized.")
    held_out: int = Field(ge=0, description="Images held out for the score.")
    images_sha256: str = Field(description="Of the staged images and captions, in order.")
    sets: int = Field(1, ge=1, description="Sets that the images are of, regularisation included.")
    resolution: int = Field(description="dataset.resolution; of several sets, the largest.")
    images_a_step: list[int] = Field(description="Effective batch, for each of `batches`.")
    text_tokens: str = Field(description="What the captions are.")
    sampling_s: float = Field(gt=0, description="Time between two samples of memory that was asked for.")
    time_limit_s: float = Field(gt=0, description="After which a run is ended.")
    matched_fields: list[str] = Field(description="Fields that the matched tier wants exact in every backend.")
    changed: dict[str, str] = Field(description="Fields of the spec that the bench set, with why.")


class Source(Data):
    """One of the benches that were gathered into one."""

    place: str = Field(description="Name of its folder.")
    command: str = Field(description="The command that measured it, its paths shortened.")
    created: AwareDatetime = Field(description="UTC.")
    updated: AwareDatetime = Field(description="UTC.")
    spec_sha256: str = Field(description="Of its spec.")
    spec: dict[str, Any] = Field(description="Its spec, paths shortened.")
    protocol: Protocol = Field(description="How it was run.")


class Results(Data):
    """`results.json`."""

    version: Literal[1] = Field(1, description="Of this format.")
    name: str = Field(description="The spec's name.")
    command: str = Field(description="The command that measured this, its paths shortened.")
    created: AwareDatetime = Field(description="UTC.")
    updated: AwareDatetime = Field(description="UTC.")
    complete: bool = Field(description="Whether every row of the schedule is there.")
    spec_sha256: str = Field(description="Of the spec as it was given.")
    spec: dict[str, Any] = Field(description="The spec as it was given, paths shortened.")
    protocol: Protocol = Field(description="How it was run.")
    inequalities: dict[str, list[Inequality]] = Field(
        description="By `tier/profile`: the fields that the backends treat differently."
    )
    runs: list[Run] = Field(description="In the order of the schedule.")
    sources: list[Source] = Field(
        default_factory=list,
        description="Of a report on several benches: each of them. `spec` then has what they share, `protocol` what "
        "they did together, and its single numbers are the first one's.",
    )

    @classmethod
    def read(cls, path: Path) -> Self:
        """The results in a file. Raises DataError naming what is wrong."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from error
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise DataError(
                f"{path} does not hold the results of a bench: {place}: {first['msg']}.",
                hint="Give the results.json of `loraport bench`, written by this version or an earlier one.",
            ) from error

    def write(self, path: Path) -> None:
        """Write to a file in one step, a row a line. Raises RunFolderError when it cannot be written."""
        runs = ",\n".join(run.model_dump_json() for run in self.runs)
        head = self.model_dump_json(exclude={"runs"}).removesuffix("}").replace(',"protocol":', ',\n"protocol":')
        write_atomic(path, f'{head},\n"runs":[\n{runs}\n]}}\n')
