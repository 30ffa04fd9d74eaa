"""All rules over all datasets of a spec or a folder, in one pass that holds no more than one image at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import TypeVar

from loraport.images import load_pixels
from loraport.rules import (
    Caption,
    CaptionRule,
    Finding,
    ImageRule,
    Problem,
    Rule,
    ScannedImage,
    SetRule,
    Setting,
    StrayFile,
    StrayRule,
)
from loraport_dataset.findings import Checked, Report, Sink, tellable
from loraport_dataset.scanning import scan
from loraport_dataset.sources import Source

#: Hears how many images are done, of how many, in which dataset.
Progress = Callable[[int, int, str], None]
#: Pixels a side that rules are shown at least; JPEGs are decoded smaller than they are, which is much faster.
_SIDE = 256
R = TypeVar("R", bound=Rule)


def check(
    sources: Iterable[Source],
    pixels: bool = False,
    progress: Progress | None = None,
    sink: Sink | None = None,
    rules: Iterable[type[Rule]] | None = None,
) -> Report:
    """Check each dataset by the rules of its family and those for all; nothing is written and no file raises.

    pixels: also decode every image. sink: hears every finding, where the report keeps a few of each rule. rules: those
    of the plugins when left out. A rule that raises an exception is left out from there on and named in the report.
    """
    from loraport.plugins import plugins

    chosen = list(plugins().rules().values() if rules is None else rules)
    report = Report()
    for plugin, reason in plugins().failures().items():
        if reason.startswith("register_rules"):  # else nobody would miss its rules
            report.broken_rules[f"of the plugin {plugin}"] = reason
    for source in sources:
        _Check(source, chosen, pixels, report, sink).run(progress)
    return report


def caption_findings(caption: Caption, setting: Setting, rules: Iterable[type[Rule]] | None = None) -> list[Finding]:
    """What the caption rules of the setting's family, and those for all, find in one caption."""
    from loraport.plugins import plugins

    chosen = plugins().rules().values() if rules is None else rules
    return [
        _finding(rule, problem, caption.name)
        for rule in _of(CaptionRule, chosen, setting)
        for problem in rule.check(caption, setting)
    ]


class _Check:
    """One dataset on its way through the rules."""

    def __init__(self, source: Source, rules: list[type[Rule]], pixels: bool, report: Report, sink: Sink | None):
        self._source, self._setting, self._pixels = source, source.setting, pixels
        self._report, self._sink = report, sink
        rules = [rule for rule in rules if pixels or not getattr(rule, "needs_pixels", False)]
        self._images = _of(ImageRule, rules, self._setting)
        self._sets = _of(SetRule, rules, self._setting)
        self._strays = _of(StrayRule, rules, self._setting)
        self._captions = _of(CaptionRule, rules, self._setting)
        self._folder = ""
        self._told: set[str] = set()  #: captions of the folder that were checked; several images may share one

    def run(self, progress: Progress | None) -> None:
        setting, source = self._setting, self._source
        checked = Checked(
            source.title,
            tellable(str(source.folder)),
            setting.family.title,
            setting.resolution,
            setting.caption_ext,
            tokens=source.tokens,
        )
        self._report.datasets.append(checked)
        default = setting.default_caption is not None
        for record in scan(source.folder, setting, source.texts):
            if isinstance(record, StrayFile):
                self._stray(record)
                continue
            checked.images += 1
            checked.captions += record.caption is not None and bool(record.caption.name)
            if record.caption is not None and not record.caption.name and default:
                self._caption(record.caption, f"{source.title}.default_caption")
                default = False  # it is the same for all of them
            self._image(record)
            if progress is not None:
                progress(checked.images, source.images, source.title)
        for whole in self._sets:
            self._tell(whole, partial(whole.problems, setting), "")

    def _stray(self, stray: StrayFile) -> None:
        for rule in self._strays:
            self._tell(rule, partial(rule.check, stray, self._setting), stray.name)

    def _image(self, image: ScannedImage) -> None:
        setting = self._setting
        if self._pixels and image.unreadable is None:
            try:
                image = replace(image, pixels=load_pixels(image.path, at_least=_SIDE))
            except Exception as problem:  # decoders raise many types, and MemoryError without a word
                why = str(problem) or "its pixels take more memory than there is"
                image = replace(image, damage=f"{why[0].upper()}{why[1:]}.")
        for rule in self._images:
            self._tell(rule, partial(rule.check, image, setting), image.name)
        caption = image.caption
        folder = image.name.rpartition("/")[0]
        if folder != self._folder:
            self._folder, self._told = folder, set()
        if caption is not None and caption.name and caption.name not in self._told:
            self._caption(caption, caption.name)
            self._told.add(caption.name)
        for whole in self._sets:
            self._tell(whole, partial(_see, whole, image, setting), image.name)

    def _caption(self, caption: Caption, name: str) -> None:
        if caption.unreadable is None:
            for rule in self._captions:
                self._tell(rule, partial(rule.check, caption, self._setting), name)

    def _tell(self, rule: Rule, problems: Callable[[], Iterable[Problem]], file: str) -> None:
        if rule.id in self._report.broken_rules:
            return
        coming: Iterator[Problem] | None = None
        while True:
            try:
                coming = iter(problems()) if coming is None else coming
                finding = _finding(rule, next(coming), file)
            except StopIteration:
                return
            except Exception as error:  # a defect, most likely of a stranger's rule; the others go on
                self._report.broken_rules[rule.id] = f"{type(error).__name__}: {' '.join(str(error).split())}"
                return
            self._report.add(self._source.title, finding, type(rule))
            if self._sink is not None:
                self._sink(self._source.title, finding)


def _see(rule: SetRule, image: ScannedImage, setting: Setting) -> Iterable[Problem]:
    rule.see(image, setting)
    return ()


def _of(kind: type[R], rules: Iterable[type[Rule]], setting: Setting) -> list[R]:
    """New rules of a kind that hold for the setting's family."""
    return [rule() for rule in rules if issubclass(rule, kind) and rule.family in (None, setting.family.name)]


def _finding(rule: Rule, problem: Problem, file: str) -> Finding:
    return Finding(
        tellable(problem.file or file),
        tellable(problem.json_path),
        rule.id,
        rule.severity,
        tellable(problem.message),
        tellable(problem.fix),
    )
