"""The page: one file that a real browser shows without a script, a request or a word that is not escaped."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from chromium import chromium
from PIL import Image
from small_datasets import write_image, write_pair
from typer.testing import CliRunner

from loraport.cli.main import build_app
from loraport.ideogram4 import IDEOGRAM4
from loraport.pages import text_of
from loraport.pages.svg import WARN
from loraport.rules import ScannedImage, Setting
from loraport_dataset.report import charts, contact
from loraport_dataset.report.contact import ContactSheet, dominant_colours
from loraport_dataset.scanning import scan
from loraport_dataset.sources import Source
from loraport_dataset.stats import GRID, Evenly, Stats

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart" / "images"
EVIL = '"><script>document.title="owned"</script><img src=x onerror=alert(1)>{{ 7*7 }}'


class Parsed(HTMLParser):
    """Start tags with attributes, and what a page would load from elsewhere."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append((tag, dict(attributes)))

    def addresses(self) -> list[str]:
        loads = [attributes.get(name) for _, attributes in self.tags for name in ("src", "href", "data", "poster")]
        return [address for address in loads if address is not None]


def made(target: Path, output: Path, *options: object) -> str:
    result = CliRunner().invoke(
        build_app(), ["dataset", "stats", str(target), "-o", str(output), *map(str, options)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return output.read_text(encoding="utf-8")


def failed(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(build_app(), ["dataset", "stats", *map(str, arguments)])
    assert isinstance(result.exception, SystemExit)
    return result.exit_code, result.stderr


def evil_dataset(folder: Path) -> Path:
    """Names, captions, keys, media, texts and colours that would all like to be markup."""
    elements = [
        {"type": "obj", "bbox": [0, 0, 500, 500], "desc": EVIL, "color_palette": ["#FF0000;}</style>", "#12AB34"]},
        {"type": "text", "bbox": [10, 10, 900, 900], "text": EVIL, "desc": EVIL},
    ]
    style = {"aesthetics": EVIL, "lighting": "x", "photo": "y", "medium": EVIL, "color_palette": [EVIL]}
    caption = {
        "high_level_description": EVIL,
        "style_description": style,
        "compositional_deconstruction": {"background": EVIL, "elements": elements},
        EVIL: 1,
    }
    write_pair(folder, "<b>&'\"name.png", caption, (64, 48))
    write_image(folder / "line\nbreak\udc80.png", (48, 64), seed=2)
    (folder / "<i>broken.png").write_bytes(b"no image")
    return folder


def test_the_page_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    text = made(QUICKSTART, tmp_path / "report.html", "--resolution", 512)
    page = Parsed(text)
    tags = Counter(tag for tag, _ in page.tags)
    assert tags["script"] == tags["iframe"] == tags["object"] == 0
    assert tags["img"] == 10
    assert all(address.startswith(("data:", "#")) for address in page.addresses())
    assert "url(" not in text
    assert "@import" not in text
    assert len(text) < 1_000_000
    for wanted in ("astronaut.jpg", "416 × 624", "COLLINS ASHBY", "#A07A5F", "60 to 120 an image"):
        assert wanted in text


def test_the_page_names_its_parts_for_those_who_do_not_see_it(tmp_path: Path) -> None:
    page = Parsed(made(QUICKSTART, tmp_path / "report.html"))
    assert ("html", {"lang": "en"}) in page.tags
    for tag, attributes in page.tags:
        if tag == "img":
            assert attributes["alt"]
        if tag == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"
        if tag == "th":
            assert attributes["scope"] in ("col", "row")
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(headings))


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    if len(colour) == 4:
        colour = "#" + "".join(2 * digit for digit in colour[1:])
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_text_stands_out_from_what_is_behind_it() -> None:
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]+);", text_of("loraport.pages", "base.css")))
    for name in ("ink", "muted", "accent", "error", "warning", "good"):
        assert contrast(colours[name], colours["paper"]) >= 4.5
        assert contrast(colours[name], colours["ground"]) >= 4.5
    assert all(contrast(colour, "#ffffff") >= 4.5 for colour in contact.COLOURS)


def test_what_people_wrote_is_text_and_never_markup(tmp_path: Path) -> None:
    text = made(evil_dataset(tmp_path / "set"), tmp_path / "report.html")
    page = Parsed(text)
    assert not any(tag == "script" for tag, _ in page.tags)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert [attributes["src"][:10] for tag, attributes in page.tags if tag == "img" and attributes["src"]] == [
        "data:image"
    ] * 2
    assert "<b>&'" not in text
    assert "{{ 7*7 }}" in text
    assert text.count("</style>") == 1
    assert "#12AB34" in text
    assert not any("</style" in (attributes.get("style") or "") for _, attributes in page.tags)


@pytest.mark.parametrize("dataset", ["quickstart", "evil"])
def test_a_real_browser_shows_it_quietly_and_it_fits_a_phone(tmp_path: Path, dataset: str) -> None:
    output = tmp_path / "report.html"
    made(QUICKSTART if dataset == "quickstart" else evil_dataset(tmp_path / "set"), output)
    images = "[...document.images].every(i => i.complete && i.naturalWidth > 0)"
    spilling = (
        "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, svg, details:not([open])') && "
        "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.className)"
    )
    with chromium(tmp_path / "profile") as browser:
        for width in (1280, 390, 360):
            page = browser.open(output, width, ask=(images, spilling, "document.title"))
            assert page.messages == []
            assert page.requests == []
            assert page.width == width
            whole, spilled, title = page.values
            assert whole
            assert spilled == []
            assert title.endswith(": dataset report")
        assert "Findings" in page.text


def test_a_dataset_of_hostile_captions_has_its_page(tmp_path: Path) -> None:
    texts = ['{"a":' * depth + "1" + "}" * depth for depth in (300, 900, 950, 980, 990, 1000)]
    texts += [
        '{"high_level_description":"\\ud800"}',
        "[1,[]]",
        "null",
        "x" * 2_000_000,
        '{"style_description":{"medium":"\\u0000"}}',
    ]
    for number, text in enumerate(texts):
        image = write_image(tmp_path / "set" / f"{number}.png", seed=number)
        image.with_suffix(".json").write_text(text)
    from loraport_native.tiny import write_tiny

    tokenizer = write_tiny(tmp_path / "tiny", "official")
    page = Parsed(made(tmp_path / "set", tmp_path / "report.html", "--checkpoint", tokenizer, "--trigger-word", "mp_x"))
    assert sum(tag == "img" for tag, _ in page.tags) == len(texts)


def test_several_sets_have_a_chapter_each(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_pair(tmp_path / name, "x.png", size=(256, 256), seed=ord(name))
    spec = tmp_path / "spec.yaml"
    spec.write_text("name: two\nmodel: {checkpoint: a/b}\ndataset: {sets: [{path: a}, {path: b, resolution: 256}]}\n")
    text = made(spec, tmp_path / "report.html")
    assert "<h1>two</h1>" in text
    for title in ("dataset.sets[0]", "dataset.sets[1]"):
        assert f'<h2 class="chapter">{title}</h2>' in text
    assert "cache" in text  # the disk line of the advice


def sampled(folder: Path, count: int = 48) -> Stats:
    stats = Stats(Source(folder, "dataset", Setting(IDEOGRAM4, resolution=64)), Evenly(count))
    for record in scan(folder, stats.setting):
        if isinstance(record, ScannedImage):
            stats.see(record)
    return stats


def test_pictures_are_small_and_bounded_in_number_and_size(tmp_path: Path) -> None:
    for number in range(6):
        write_image(tmp_path / f"{number}.jpg", (1200, 900), seed=number)
    stats = sampled(tmp_path)
    pictures = list(ContactSheet().pictures(stats))
    assert [thumbnail.size for thumbnail, _ in pictures] == [(320, 240)] * 6
    one = len(pictures[0][0].image)
    small = ContactSheet(most_bytes=one)
    assert 1 <= len(list(small.pictures(stats))) < 6
    assert small.left_out == 6 - len(list(ContactSheet(most_bytes=one).pictures(stats)))
    assert len(list(ContactSheet().pictures(sampled(tmp_path, 2)))) == 2


def test_an_image_that_cannot_be_shown_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "a.png", (100, 100))
    write_image(tmp_path / "d.jpg", (100, 100))
    write_image(tmp_path / "e.jpg", (100, 100), progressive=True)
    cut = write_image(tmp_path / "b.png", (64, 64), seed=1)
    cut.write_bytes(cut.read_bytes()[:-60])
    (tmp_path / "c.png").write_bytes(b"x")
    monkeypatch.setattr(contact, "MOST_PIXELS", 90 * 90)
    problems = [thumbnail.problem for thumbnail, _ in ContactSheet().pictures(sampled(tmp_path))]
    assert problems[0].startswith("Too large to be drawn here: 100 × 100 px")
    assert "damaged or cut short" in problems[1]
    assert "not an image" in problems[2]
    assert problems[3] == ""  # a JPEG is decoded small
    assert problems[4] == problems[0]  # but for one that must be whole in memory


def test_boxes_lie_where_captions_say_and_what_the_bucket_cuts_off_is_shaded(tmp_path: Path) -> None:
    element = {"type": "text", "bbox": [500, 250, 1000, 750], "text": "HI", "desc": "a sign"}
    caption = {"compositional_deconstruction": {"background": "x", "elements": [element]}}
    write_pair(tmp_path, "a.png", caption, (320, 60))
    ((thumbnail, _),) = ContactSheet().pictures(sampled(tmp_path))
    assert 'x="80.0" y="30.0" width="160.0" height="30.0"' in thumbnail.overlay
    assert "stroke-dasharray" in thumbnail.overlay
    assert "text “HI”" in thumbnail.overlay
    assert "cut off: " in thumbnail.overlay
    write_pair(tmp_path / "whole", "a.png", caption, (64, 64))
    ((whole, _),) = ContactSheet().pictures(sampled(tmp_path / "whole"))
    assert "cut off" not in whole.overlay


def test_dominant_colours_are_those_of_the_pictures_by_their_share() -> None:
    red, blue = Image.new("RGB", (10, 10), "#C00000"), Image.new("RGB", (40, 20), "#0000C0")
    found = dominant_colours([red, blue, blue, blue])
    assert [(colour, round(share, 2)) for colour, share in found[:2]] == [("#0000C0", 0.75), ("#C00000", 0.25)]
    assert dominant_colours([]) == []


def test_plots_hold_for_one_image_and_for_extremes() -> None:
    for sizes in ({(1, 1): 1}, {(20_000, 16): 3, (16, 20_000): 1, (512, 512): 9000}):
        plot = charts.sizes_plot(sizes, 1024)
        assert "nan" not in plot
        assert plot.count("<circle") == len(sizes)
    assert charts.histogram([5], "tokens", 2048).count("<rect") == 1
    spread = charts.histogram([1, 100_000], "tokens", 2048)
    assert spread.count("<rect") == 2
    assert WARN in spread  # what is beyond the limit stands out
    one = [[0] * GRID for _ in range(GRID)]
    one[GRID - 1][0] = 1
    assert "most of them cover the bottom left" in charts.heat_map(one, "boxes")


def test_a_file_that_is_no_such_page_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    output.write_text("mine")
    code, told = failed(QUICKSTART, "-o", output)
    assert code == 3
    assert "no page of loraport dataset stats" in told
    assert output.read_text() == "mine"
    made(QUICKSTART, output, "--force")
    made(QUICKSTART, output)  # and a page is replaced


@pytest.mark.parametrize(("place", "code"), [("gone/report.html", 7), ("folder", 7), ("set/report.html", 7)])
def test_a_place_that_cannot_be_written_is_told(tmp_path: Path, place: str, code: int) -> None:
    write_pair(tmp_path / "set", "a.png")
    (tmp_path / "folder").mkdir()
    found, told = failed(tmp_path / "set", "-o", tmp_path / place)
    assert found == code
    assert "Traceback" not in told
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["a.json", "a.png"]
