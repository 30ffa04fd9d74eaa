"""Every rule of images, names, captions, tokens and triggers, broken once by a real file."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_datasets import CAPTION, compact, write_image, write_pair

from loraport.caption_json import make_caption
from loraport.ideogram4 import IDEOGRAM4
from loraport.plugins import plugins
from loraport.rules import CaptionRule, Finding, ImageRule, Problem, Rule, Setting
from loraport_dataset.checking import caption_findings, check
from loraport_dataset.sources import Source


@dataclass
class Case:
    """Files that break a rule, and what is found: of which file, and a part of the message."""

    rule: str
    make: Callable[[Path], object]
    file: str
    says: str
    setting: dict[str, Any] = field(default_factory=dict)
    pixels: bool = False


def found(folder: Path, pixels: bool = False, **setting: Any) -> list[Finding]:
    given = Setting(IDEOGRAM4, **{"resolution": 64, **setting})
    told: list[Finding] = []
    check([Source(folder, "dataset", given)], pixels, sink=lambda _, finding: told.append(finding))
    return told


def turned(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    write_pair(folder, "a.jpg")
    write_image(folder / "a.jpg", exif=exif)


def animated(folder: Path) -> None:
    write_pair(folder, "a.png")
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "a.png", save_all=True, append_images=frames[1:])


def cut_short(folder: Path) -> None:
    write_pair(folder, "a.jpg", size=(256, 256))
    data = (folder / "a.jpg").read_bytes()
    (folder / "a.jpg").write_bytes(data[: len(data) // 2])


def named(name: str, data: bytes) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        write_image(folder / "a.png")
        (folder / name).write_bytes(data)

    return make


def caption(text: str) -> Callable[[Path], object]:
    return named("a.json", text.encode())


def twice(folder: Path) -> None:
    write_pair(folder, "a.png", size=(128, 128))
    write_pair(folder, "b.png", size=(96, 96))


def mostly(word: str, captions: int, without: int) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        for number in range(captions):
            said = f"A {word} in the rain {number}." if number >= without else f"A buggy in the rain {number}."
            write_pair(folder, f"{number}.png", {**CAPTION, "high_level_description": said}, seed=number)

    return make


CASES = [
    Case(
        "image-unreadable", lambda d: (write_pair(d, "a.png"), (d / "a.png").write_bytes(b"x")), "a.png", "not an image"
    ),
    Case("image-tiny", lambda d: write_pair(d, "a.png", size=(64, 15)), "a.png", "64 x 15 px"),
    Case("image-small", lambda d: write_pair(d, "a.png"), "a.png", "25% of the resolution 256", {"resolution": 256}),
    Case(
        "image-small",
        lambda d: write_pair(d, "a.png"),
        "a.png",
        "enlarged 4.0 times",
        {"resolution": 256, "upscale": True},
    ),
    Case("image-below-resolution", lambda d: write_pair(d, "a.png"), "a.png", "80%", {"resolution": 80}),
    Case("image-aspect", lambda d: write_pair(d, "a.png", size=(256, 64)), "a.png", "4.0 to 1"),
    Case(
        "image-cropped",
        lambda d: write_pair(d, "a.png", size=(128, 64)),
        "a.png",
        "50% is lost",
        {"aspect_buckets": False},
    ),
    Case("image-rotated", turned, "a.jpg", "on its side (EXIF orientation 6)"),
    Case(
        "image-transparent",
        lambda d: (write_pair(d, "a.png"), write_image(d / "a.png", mode="RGBA")),
        "a.png",
        "(RGBA)",
    ),
    Case("image-mode", lambda d: (write_pair(d, "a.jpg"), write_image(d / "a.jpg", mode="CMYK")), "a.jpg", "CMYK"),
    Case("image-mode", lambda d: (write_pair(d, "a.png"), write_image(d / "a.png", mode="I;16")), "a.png", "16 bits"),
    Case(
        "image-grey", lambda d: (write_pair(d, "a.png"), write_image(d / "a.png", mode="L")), "a.png", "without colour"
    ),
    Case("image-animated", animated, "a.png", "first frame"),
    Case(
        "image-extension",
        lambda d: (write_pair(d, "a.png"), write_image(d / "a.png", format="JPEG")),
        "a.png",
        "is named .png and is JPEG",
    ),
    Case("image-damaged", cut_short, "a.jpg", "cut short", pixels=True),
    Case(
        "image-blank",
        lambda d: (write_pair(d, "a.png"), Image.new("RGB", (64, 64), "#102030").save(d / "a.png")),
        "a.png",
        "#102030",
        pixels=True,
    ),
    Case("image-duplicate", lambda d: [write_pair(d, name) for name in ("a.png", "b.png")], "b.png", "file as a.png"),
    Case("image-near-duplicate", twice, "b.png", "Looks like a.png", pixels=True),
    Case("caption-missing", lambda d: write_image(d / "sub" / "a.png"), "sub/a.png", "no a.json"),
    Case("caption-name", named("A.json", b"{}"), "a.png", "A.json in other letter case"),
    Case("caption-name", named("a.txt", b"a dog"), "a.png", "a.txt with another extension"),
    Case(
        "caption-name",
        lambda d: (write_image(d / "caf\u00e9.png"), (d / "cafe\u0301.json").write_text("{}")),
        "caf\u00e9.png",
        "another Unicode form",
    ),
    Case("caption-default", lambda d: write_image(d / "a.png"), "a.png", "default", {"default_caption": "a dog"}),
    Case("caption-orphaned", named("b.json", b"{}"), "b.json", "no image"),
    Case("caption-shared", lambda d: (write_pair(d, "a.jpg"), write_image(d / "a.png")), "a.png", "with a.jpg"),
    Case(
        "caption-repeated",
        lambda d: [write_pair(d, f"{n}.png", CAPTION, seed=n) for n in (1, 2)],
        "2.json",
        "same caption as 1.json",
    ),
    Case("image-format", named("b.heic", b"x"), "b.heic", "HEIC is not read"),
    Case("file-name", lambda d: write_pair(d, "a\nb.png"), "a\nb.png", "control characters"),
    Case(
        "place-unreadable",
        lambda d: (write_pair(d, "a.png"), (d / "loop").symlink_to(d / "loop")),
        "loop",
        "symbolic links",
    ),
    Case("caption-unreadable", named("a.json", b"\xff\xfe{\x00}\x00"), "a.json", "UTF-16"),
    Case("caption-unreadable", named("a.json", "é".encode("latin-1")), "a.json", "not UTF-8: byte 1"),
    Case("caption-unreadable", named("a.json", b"x" * 1_000_001), "a.json", "1,000,001 bytes"),
    Case("byte-order-mark", caption("\ufeff" + compact(CAPTION)), "a.json", "byte order mark"),
    Case("caption-empty", caption(" \n"), "a.json", "nothing in it"),
    Case(
        "text-before-json",
        caption("mp_dog, " + compact(CAPTION)),
        "a.json",
        "The trigger word stands before the JSON",
        {"trigger_word": "mp_dog"},
    ),
    Case("json", caption('{"high_level_description": "A dog."'), "a.json", "Not valid JSON at line 1, column 36"),
    Case("half-character", caption(compact(CAPTION).replace("dog", "\\ud83d")), "a.json", "half of a surrogate"),
    Case("caption-tags", named("a.txt", b"1dog, solo, beach, smile"), "a.txt", "list of tags", {"caption_ext": "txt"}),
    Case("caption-plain", named("a.txt", b"A dog on a beach."), "a.txt", "Plain text", {"caption_ext": "txt"}),
    Case(
        "caption-too-long",
        caption(compact({**CAPTION, "high_level_description": "A dog. " * 30})),
        "a.json",
        "60 tokens; the limit is 16",
        {"max_text_tokens": 16, "count_tokens": lambda text: 60},
    ),
    Case(
        "caption-perhaps-too-long",
        caption(compact({**CAPTION, "high_level_description": "A dog. " * 30})),
        "a.json",
        "estimated",
        {"max_text_tokens": 16},
    ),
    Case(
        "trigger-spelling",
        caption(compact({**CAPTION, "high_level_description": "A MP Dog runs."})),
        "a.json",
        "'MP Dog'",
        {"trigger_word": "mp_dog"},
    ),
    Case("trigger-inconsistent", mostly("mp_buggy", 4, 1), "0.json", "3 of 4 captions", {"trigger_word": "mp_buggy"}),
    Case("trigger-missing", mostly("car", 2, 0), "", "No caption has", {"trigger_word": "mp_buggy"}),
    Case("trigger-forgotten", mostly("mp_buggy", 6, 1), "", "'mp_buggy' is in 5 of 6"),
    Case(
        "trigger-in-regularization",
        caption(compact({**CAPTION, "high_level_description": "A car like mp_buggy."})),
        "a.json",
        "'mp_buggy', in a regularisation set",
        {"foreign_words": ("mp_buggy",)},
    ),
    Case(
        "trigger-place",
        caption(
            compact({"compositional_deconstruction": {"background": "mp_dog's beach", "elements": []}}),
        ),
        "a.json",
        "none of the two places",
        {"trigger_word": "mp_dog"},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.rule}:{case.says[:12]}")
def test_a_broken_rule_is_told_with_its_file_and_what_is_there(case: Case, tmp_path: Path) -> None:
    case.make(tmp_path)
    told = [one for one in found(tmp_path, case.pixels, **case.setting) if one.rule == case.rule]
    assert [one.file for one in told] == [case.file], found(tmp_path, case.pixels, **case.setting)
    assert case.says in told[0].message
    assert told[0].fix
    assert told[0].severity == plugins().rules()[case.rule].severity


def test_every_rule_has_a_case() -> None:
    general = {rule.id for rule in plugins().rules().values() if rule.family is None}
    assert general <= {case.rule for case in CASES}


def test_rules_say_what_they_are_and_what_to_do() -> None:
    for rule in plugins().rules().values():
        assert rule.explanation.endswith(".")
        assert rule.fix.endswith(".")
        assert rule.severity in ("error", "warning", "advice")


def test_a_sound_dataset_has_no_findings(tmp_path: Path) -> None:
    for number in range(4):
        write_pair(tmp_path, f"sub {number % 2}/{number}.jpg", seed=number)
    assert found(tmp_path, pixels=True) == []


def test_only_rules_of_the_datasets_family_hold(tmp_path: Path) -> None:
    class Other(CaptionRule):
        id, severity, family, explanation, fix = "other", "error", "another-model", "None.", "None."

        def check(self, caption: Any, setting: Setting) -> list[Problem]:
            return [Problem("Never.", "Never.")]

    write_pair(tmp_path, "a.png")
    assert rules_found(tmp_path, Other) == []
    Other.family = "ideogram4"
    assert rules_found(tmp_path, Other) == ["other"]


def test_a_rule_that_raises_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    class Broken(ImageRule):
        id, severity, explanation, fix = "broken", "error", "None.", "None."

        def check(self, image: Any, setting: Setting) -> list[Problem]:
            raise KeyError("size")

    for name in ("a.png", "b.png"):
        write_pair(tmp_path, name)
    rules = [Broken, *plugins().rules().values()]
    report = check([Source(tmp_path, "dataset", Setting(IDEOGRAM4, resolution=64))], rules=rules)
    assert report.broken_rules == {"broken": "KeyError: 'size'"}
    assert list(report.rules) == ["image-duplicate"]
    assert report.fails(strict=False)


def test_near_duplicates_survive_another_encoding_and_other_pictures_are_not_among_them(tmp_path: Path) -> None:
    for seed in range(30):
        write_pair(tmp_path, f"{seed:02}.png", size=(96, 96), seed=seed)
    with Image.open(tmp_path / "07.png") as image:
        image.resize((80, 80)).save(tmp_path / "copy.jpg", quality=60)
    (tmp_path / "copy.json").write_text(compact({**CAPTION, "high_level_description": "A copy."}))
    told = [one for one in found(tmp_path, pixels=True) if one.rule == "image-near-duplicate"]
    assert [(one.file, "07.png" in one.message) for one in told] == [("copy.jpg", True)]


def test_without_pixels_no_image_is_decoded(tmp_path: Path) -> None:
    cut_short(tmp_path)
    assert found(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("mp_dog", []),
        ("MP_DOG", ["high_level_description"]),
        ("mp-dog", ["high_level_description"]),
        ("mpdog", ["high_level_description"]),
        ("camp dogs", []),
        ("mp_dogs", []),
    ],
)
def test_only_other_spellings_of_the_whole_trigger_word_are_told(text: str, places: list[str], tmp_path: Path) -> None:
    caption(compact({**CAPTION, "high_level_description": f"A {text} runs."}))(tmp_path)
    told = found(tmp_path, trigger_word="mp_dog")
    assert [one.json_path for one in told if one.rule == "trigger-spelling"] == places


def test_a_trigger_word_in_the_lettering_alone_would_be_drawn(tmp_path: Path) -> None:
    element = {"type": "text", "text": "mp_dog", "desc": "letters on a wall"}
    caption(compact({"compositional_deconstruction": {"background": "a wall", "elements": [element]}}))(tmp_path)
    (told,) = [one for one in found(tmp_path, trigger_word="mp_dog") if one.rule == "trigger-place"]
    assert "as writing that is seen" in told.message
    assert told.json_path == "compositional_deconstruction.elements[0].text"


def test_the_limit_is_held_against_what_is_trained_compact_and_with_the_trigger_word(tmp_path: Path) -> None:
    counted: list[str] = []
    write_image(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(compact(CAPTION).replace(":", ":   ") + " " * 200)
    found(tmp_path, trigger_word="mp_dog", max_text_tokens=16, count_tokens=lambda text: counted.append(text) or 1)
    assert counted == [compact({**CAPTION, "high_level_description": "mp_dog, A dog on a beach."})]


def test_duplicates_are_told_by_content_among_files_of_one_size(tmp_path: Path) -> None:
    for name in ("a.bmp", "b.bmp", "c.bmp", "d.bmp"):
        write_pair(tmp_path, name, seed=ord(name[0]) % 2)
    sizes = {path.stat().st_size for path in tmp_path.glob("*.bmp")}
    assert len(sizes) == 1
    told = {one.file: one.message for one in found(tmp_path) if one.rule == "image-duplicate"}
    assert set(told) == {"c.bmp", "d.bmp"}
    assert "a.bmp" in told["c.bmp"]
    assert "b.bmp" in told["d.bmp"]


def test_the_same_file_by_a_link_is_a_duplicate_too(tmp_path: Path) -> None:
    write_pair(tmp_path, "a.png")
    os.symlink(tmp_path / "a.png", tmp_path / "b.png")
    assert "image-duplicate" in [one.rule for one in found(tmp_path)]


def rules_found(folder: Path, *rules: type[Rule]) -> list[str]:
    report = check([Source(folder, "dataset", Setting(IDEOGRAM4, resolution=64))], rules=rules)
    return list(report.rules)


def test_a_caption_that_spells_the_trigger_word_otherwise_is_told_once(tmp_path: Path) -> None:
    for number, word in enumerate(("mp_dog", "mp_dog", "MP_Dog")):
        write_pair(tmp_path, f"{number}.png", {**CAPTION, "high_level_description": f"A {word} {number}."}, seed=number)
    assert [one.rule for one in found(tmp_path, trigger_word="mp_dog")] == ["trigger-spelling"]


def test_images_share_a_caption_also_when_others_stand_between_their_names(tmp_path: Path) -> None:
    write_pair(tmp_path, "a.jpg", {"background": "a wall"})
    write_pair(tmp_path, "a.k.jpg", seed=1)
    write_image(tmp_path / "a.png", seed=2)
    write_image(tmp_path / "sub" / "a.png", seed=3)
    told = [(one.rule, one.file) for one in found(tmp_path)]
    assert told.count(("caption-shared", "a.png")) == 1
    assert [file for rule, file in told if rule == "root"] == ["a.json", "a.json"]  # once, not once an image


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(["a.json", "a.txt", ""]),
    st.text(st.characters() | st.sampled_from('{}[]",:\\`u\n'))
    | st.builds(compact, st.fixed_dictionaries({"a": st.text()})),
    st.text(max_size=8),
    st.sampled_from([None, len]),
)
def test_no_text_and_no_trigger_word_crashes_a_rule(name: str, text: str, word: str, count: Any) -> None:
    setting = Setting(IDEOGRAM4, trigger_word=word, max_text_tokens=16, count_tokens=count)
    for finding in caption_findings(make_caption(name, text, "json"), setting):
        (finding.message + finding.fix + finding.json_path).encode("utf-8")
        assert finding.message.endswith(".")
