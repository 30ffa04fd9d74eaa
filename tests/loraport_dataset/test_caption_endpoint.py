from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from stand_ins.vision_service import Asked, Reply, VisionService, failed, said
from typer.testing import CliRunner

from loraport.cli.main import build_app
from loraport_dataset.captioning import pace

KEY = "sk-very-secret-0123456789"
CAPTION = {
    "high_level_description": "A red square.",
    "style_description": {
        "aesthetics": "plain",
        "lighting": "flat",
        "medium": "graphic_design",
        "art_style": "a single colour",
    },
    "compositional_deconstruction": {
        "background": "nothing but red",
        "elements": [{"type": "obj", "desc": "a square"}],
    },
}
COMPACT = json.dumps(CAPTION, separators=(",", ":"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "FIRST_BACKOFF", 0.01)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "set", 3)


def make_dataset(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (300, 200), (10 * number, 0, 0)).save(folder / f"{number}.png")
    return folder


@contextmanager
def service(answer: Callable[[Asked], Reply] | list[Reply]) -> Iterator[VisionService]:
    """A service that answers by a function, or by a list and then with a good caption."""
    if isinstance(answer, list):
        waiting = list(answer)
        with VisionService(lambda asked: waiting.pop(0) if waiting else said(CAPTION)).running() as running:
            yield running
    else:
        with VisionService(answer).running() as running:
            yield running


def run(dataset: Path, url: str, *arguments: object, key: str | None = None) -> tuple[int, str]:
    named = ["--key-env", "MY_KEY"] if key else []
    result = CliRunner().invoke(
        build_app(),
        ["dataset", "caption", str(dataset), "--endpoint", url, "--model", "eye-1", *named, *map(str, arguments)],
        env={"MY_KEY": key},
    )
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def captions(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in sorted(folder.glob("*.json"))}


def picture(asked: Asked) -> Image.Image:
    url = asked.body["messages"][1]["content"][0]["image_url"]["url"]
    kind, _, data = url.partition(";base64,")
    assert kind == "data:image/jpeg"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_every_picture_gets_the_caption_compact_and_beside_it(dataset: Path) -> None:
    with service([]) as running:
        code, told = run(dataset, running.url)
    assert code == 0
    assert captions(dataset) == {"0.json": COMPACT, "1.json": COMPACT, "2.json": COMPACT}
    assert "3 captions written, 0 kept, 0 pictures without one." in told
    assert "Tokens: 300 asked, 30 answered." in told


def test_the_request_asks_for_the_schema_strictly_with_picture_and_model(dataset: Path) -> None:
    with service([]) as running:
        run(dataset, running.url, "--max-side", 120, "--max-tokens", 500)
    asked = running.asked[0]
    assert asked.path == "/v1/chat/completions"
    assert (asked.body["model"], asked.body["max_tokens"]) == ("eye-1", 500)
    assert picture(asked).size == (120, 80)
    wanted = asked.body["response_format"]
    assert (wanted["type"], wanted["json_schema"]["strict"]) == ("json_schema", True)
    schema = wanted["json_schema"]["schema"]
    assert schema["required"] == list(schema["properties"]) == [*CAPTION]
    assert "bbox" not in json.dumps(schema)
    assert "Authorization" not in asked.headers


@pytest.mark.parametrize("structured", ["json_object", "none"])
def test_a_service_without_schemas_is_asked_as_it_can_answer(dataset: Path, structured: str) -> None:
    with service([said(f"<think>{{hm}}</think>\n```json\n{json.dumps(CAPTION, indent=1)}\n```")]) as running:
        assert run(dataset, running.url, "--structured", structured, "--parallel", 1)[0] == 0
    format = {"type": "json_object"} if structured == "json_object" else None
    assert running.asked[0].body.get("response_format") == format
    assert captions(dataset)["0.json"] == COMPACT


def test_the_trigger_word_and_own_instructions_are_used(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "how.txt").write_text("Say what the square feels.")
    with service([]) as running:
        run(dataset, running.url, "--trigger-word", "mp_square", "--instructions", tmp_path / "how.txt")
    assert "Say what the square feels." in running.asked[0].user_texts()[0]
    assert json.loads(captions(dataset)["0.json"])["high_level_description"] == "mp_square, A red square."


@pytest.mark.parametrize(("order", "written"), [("yx", [100, 200, 300, 400]), ("xy", [200, 100, 400, 300])])
def test_boxes_are_asked_for_in_the_models_order_and_written_in_the_familys(
    dataset: Path, order: str, written: list[int]
) -> None:
    composition = {"background": "red", "elements": [{"type": "obj", "bbox": [100, 200, 300, 400], "desc": "a square"}]}
    with service(lambda asked: said(CAPTION | {"compositional_deconstruction": composition})) as running:
        assert run(dataset, running.url, "--boxes", order)[0] == 0
    asked = json.dumps(running.asked[0].body["response_format"])
    assert ("[xmin, ymin, xmax, ymax]" in asked) == (order == "xy")
    elements = json.loads(captions(dataset)["0.json"])["compositional_deconstruction"]["elements"]
    assert elements[0]["bbox"] == written


def test_captions_that_are_there_are_kept_unless_told(dataset: Path) -> None:
    (dataset / "1.json").write_text("mine")
    (dataset / "2.json").write_text(" \n")
    with service([]) as running:
        code, told = run(dataset, running.url)
        assert (code, len(running.asked)) == (0, 2)
        assert captions(dataset) == {"0.json": COMPACT, "1.json": "mine", "2.json": COMPACT}
        assert "2 captions written, 1 kept" in told
        assert run(dataset, running.url, "--again")[0] == 0
        assert len(running.asked) == 5
    assert captions(dataset)["1.json"] == COMPACT


def test_with_a_folder_for_captions_nothing_is_written_to_the_dataset(dataset: Path, tmp_path: Path) -> None:
    (dataset / "sub").mkdir()
    Image.new("RGB", (64, 64)).save(dataset / "sub/a.png")
    before = sorted(dataset.rglob("*"))
    with service([]) as running:
        assert run(dataset, running.url, "-o", tmp_path / "out")[0] == 0
        assert run(dataset, running.url, "-o", tmp_path / "out")[0] == 0
    assert len(running.asked) == 4
    assert sorted(dataset.rglob("*")) == before
    assert (tmp_path / "out/sub/a.json").read_text() == COMPACT


@pytest.mark.parametrize(
    "bad",
    [
        failed(429, retry_after="0"),
        failed(500),
        failed(503),
        Reply(200, b"<html>busy</html>"),
        Reply(200, b'{"choices":[]}'),
        Reply(hang_up=True),
        Reply(delay=2, body=b"{}"),
        Reply(drip=0.05, body=b"{" + b" " * 100),
    ],
    ids=["429", "500", "503", "html", "no choices", "hung up", "slow", "drip by drip"],
)
def test_what_passes_is_tried_again(dataset: Path, bad: Reply) -> None:
    with service([bad]) as running:
        code, told = run(dataset, running.url, "--timeout", 1, "--parallel", 1)
    assert (code, len(captions(dataset)), len(running.asked)) == (0, 3, 4), told


def test_attempts_are_bounded_and_the_run_ends_when_nothing_is_answered(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", 8)
    with service(lambda asked: failed(500, "on fire")) as running:
        code, told = run(dataset, running.url, "--attempts", 2, "--parallel", 1)
    assert (code, len(running.asked), captions(dataset)) == (5, 6, {})
    assert "HTTP 500: on fire, 2 times" in told


def test_a_service_that_breaks_down_midway_ends_the_run_and_the_next_one_goes_on(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", 8)
    with service([said(CAPTION), said(CAPTION), *[failed(502)] * 3]) as running:
        code, told = run(dataset, running.url, "--attempts", 1, "--parallel", 1)
        assert (code, len(captions(dataset))) == (5, 2)
        assert "captions that are written are kept" in told
        code, told = run(dataset, running.url)
    assert (code, len(captions(dataset))) == (0, 8)
    assert "6 captions written, 2 kept" in told


@pytest.mark.parametrize(
    ("status", "hint"), [(401, "--key-env"), (403, "--key-env"), (404, "/v1"), (307, "final address")]
)
def test_what_fails_for_every_picture_ends_the_run_at_once(dataset: Path, status: int, hint: str) -> None:
    with service(lambda asked: failed(status, f"bad key {KEY}", location="http://elsewhere.test/")) as running:
        code, told = run(dataset, running.url, "--parallel", 1, key=KEY)
    assert (code, len(running.asked), captions(dataset)) == (5, 1, {})
    assert hint in told
    assert KEY not in told


def test_a_service_that_is_not_there_is_told_at_once(dataset: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        code, told = run(dataset, url)
    assert code == 5
    assert f"{url}/chat/completions cannot be reached" in told


def test_a_long_retry_after_ends_the_run_instead_of_waiting(dataset: Path) -> None:
    with service([failed(429, retry_after="86400")]) as running:
        code, told = run(dataset, running.url, "--parallel", 1)
    assert (code, len(running.asked)) == (5, 1)
    assert "no request within 86400 s" in told


def test_retry_after_holds_back_every_worker(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", 4)
    with service([failed(429, retry_after="1")]) as running:
        assert run(dataset, running.url, "--parallel", 1)[0] == 0
    first, *others = [asked.moment for asked in running.asked]
    assert min(others) - first >= 1


def test_requests_keep_to_the_rate(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", 5)
    with service([]) as running:
        assert run(dataset, running.url, "--per-minute", 600)[0] == 0
    moments = sorted(asked.moment for asked in running.asked)
    assert moments[-1] - moments[0] >= 0.39


def test_no_more_requests_than_allowed_are_on_their_way(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", 9)
    with service(lambda asked: Reply(body=said(CAPTION).body, delay=0.1)) as running:
        assert run(dataset, running.url, "--parallel", 3)[0] == 0
    assert running.most_at_once == 3


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (said("A red square."), "plain text, not JSON. Write"),
        (said({"high_level_description": "A red square."} | {"title": "x"}), "title: This key does not belong here."),
        (
            said({key: value for key, value in CAPTION.items() if key != "compositional_deconstruction"} | {"a": 1}),
            "a:",
        ),
        (said(COMPACT, finish="length"), "cut off"),
        (said(COMPACT.replace('"plain"', "5")), "aesthetics: This is a number"),
        (said(COMPACT.replace('"aesthetics":"plain",', "")), "aesthetics: Required and missing."),
    ],
)
def test_a_wrong_answer_is_sent_back_with_what_is_wrong(dataset: Path, wrong: Reply, told: str) -> None:
    with service([wrong]) as running:
        assert run(dataset, running.url, "--parallel", 1)[0] == 0
    assert told in running.asked[1].user_texts()[-1]
    assert len(running.asked) == 4
    assert set(captions(dataset).values()) == {COMPACT}


def test_key_order_and_colours_are_put_right_without_asking_again(dataset: Path) -> None:
    mixed = {key: CAPTION[key] for key in reversed(CAPTION)}
    with service(lambda asked: said(mixed)) as running:
        assert run(dataset, running.url)[0] == 0
    assert (len(running.asked), set(captions(dataset).values())) == (3, {COMPACT})


def test_a_model_that_never_gets_it_right_ends_with_four_and_writes_no_caption(dataset: Path) -> None:
    good = iter([True, False, False, False, True])
    with service(lambda asked: said(CAPTION) if next(good) else said("no")) as running:
        code, told = run(dataset, running.url, "--parallel", 1)
    assert (code, sorted(captions(dataset)), len(running.asked)) == (4, ["0.json", "2.json"], 5)
    assert "1.png: 3 answers without a caption that keeps the rules" in told


def test_a_caption_with_a_warning_alone_is_written_and_named(dataset: Path) -> None:
    doubtful = CAPTION | {"high_level_description": 'A sign that says "OPEN".'}
    with service(lambda asked: said(doubtful)) as running:
        code, told = run(dataset, running.url, "--json", "--corrections", 1)
    report = json.loads(told)
    assert (code, report["written"], len(report["doubtful"]), len(running.asked)) == (0, 3, 3, 6)
    assert "'OPEN' is quoted here" in report["doubtful"][0]["doubt"]


def test_what_is_declined_or_filtered_is_that_pictures_failure(dataset: Path) -> None:
    replies = [said(CAPTION), said(None, refusal="I will not."), said("", finish="content_filter")]
    with service(replies) as running:
        code, told = run(dataset, running.url, "--parallel", 1)
    assert (code, sorted(captions(dataset))) == (4, ["0.json"])
    assert "1.png: the model declined: I will not." in told
    assert "content filter" in told


def test_a_picture_that_does_not_open_is_named_and_the_others_go_on(dataset: Path) -> None:
    (dataset / "1.png").write_bytes(b"no picture")
    with service([]) as running:
        code, told = run(dataset, running.url)
    assert (code, sorted(captions(dataset))) == (4, ["0.json", "2.json"])
    assert "1.png: this is not an image" in told


def test_a_service_that_knows_no_schemas_is_told_with_the_way_out(dataset: Path) -> None:
    with service(lambda asked: failed(400, "response_format is not supported")) as running:
        code, told = run(dataset, running.url, "--parallel", 1)
    assert (code, len(running.asked)) == (5, 3)
    assert "--structured json_object or none" in told


@pytest.mark.parametrize(
    ("arguments", "said_back"),
    [
        (["--endpoint", "http://user:secretpass@127.0.0.1/v1"], "user name or password"),
        (["--endpoint", "localhost:8000"], "not a URL"),
        (["--endpoint", "http://127.0.0.1:99999/v1"], "not a URL"),
        (["--endpoint", "http://ü..de/v1"], "not a URL"),
        (["--model", ""], "--model is not a name"),
        (["--key-env", KEY], "names no environment variable"),
        (["--key-env", "NOT_SET"], "(NOT_SET)"),
        (["--local"], "either --endpoint URL, or --local"),
        (["--device", "cpu"], "--device does nothing with --endpoint"),
        (["--trigger-word", ""], "--trigger-word is empty"),
        (["--family", "ideogram5"], "Did you mean 'ideogram4'?"),
    ],
)
def test_a_wrong_option_is_refused_and_no_secret_is_shown(dataset: Path, arguments: list[str], said_back: str) -> None:
    code, told = run(dataset, "http://127.0.0.1:9/v1", *arguments)
    assert (code, captions(dataset)) == (3, {})
    assert said_back in told
    assert KEY not in told
    assert "secretpass" not in told


def test_a_proxy_of_the_environment_is_not_used_for_this_machine(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with service([]) as running:
        assert run(dataset, running.url)[0] == 0


def test_a_key_over_plain_http_to_another_machine_is_warned_of(dataset: Path) -> None:
    code, told = run(dataset, "http://service.invalid/v1", key=KEY)
    assert code == 5
    assert "warning: the key travels unencrypted" in told
    assert KEY not in told


def test_an_answer_in_parts_is_put_together_and_an_empty_one_sent_back(dataset: Path) -> None:
    parts = [{"type": "text", "text": COMPACT[:40]}, {"type": "text", "text": COMPACT[40:]}]
    with service([said("", content=None), said("", content=parts)]) as running:
        assert run(dataset, running.url, "--parallel", 1)[0] == 0
    assert "The answer is empty." in running.asked[1].user_texts()[-1]
    assert set(captions(dataset).values()) == {COMPACT}


def test_what_a_service_says_cannot_move_the_cursor_nor_break_a_file(dataset: Path) -> None:
    half = json.dumps(CAPTION | {"high_level_description": "A red square. X"}).replace("X", "\ud83d")
    with service([failed(400, "no \x1b[2J!"), said(half)]) as running:
        code, told = run(dataset, running.url, "--parallel", 1)
    assert (code, len(captions(dataset))) == (4, 2)
    assert "0.png: HTTP 400: no \\x1b[2J!" in told
    assert json.loads(captions(dataset)["1.json"])["high_level_description"] == "A red square. ?"


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_has_the_name_of_a_caption_and_is_none_is_let_be(dataset: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(dataset / "1.json")
    else:
        (dataset / "1.json").mkdir()
    with service([]) as running:
        assert run(dataset, running.url)[0] == 0
    assert len(running.asked) == 2
    assert not (dataset / "1.json").is_file()


def test_a_folder_for_captions_that_cannot_be_made_is_told(dataset: Path, tmp_path: Path) -> None:
    (dataset / "sub").mkdir()
    Image.new("RGB", (64, 64)).save(dataset / "sub/a.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/sub").touch()
    with service([]) as running:
        code, told = run(dataset, running.url, "-o", tmp_path / "out")
    assert code == 7
    assert "out/sub cannot be made" in told


def test_a_picture_that_claims_too_many_pixels_is_not_decoded(dataset: Path) -> None:
    content = (dataset / "1.png").read_bytes()
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + content[24:29]
    (dataset / "1.png").write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
    with service([]) as running:
        code, told = run(dataset, running.url)
    assert (code, sorted(captions(dataset))) == (4, ["0.json", "2.json"])
    assert "1.png: the image has 3,600,000,000 pixels" in told


def test_two_pictures_that_would_share_a_caption_are_refused(dataset: Path) -> None:
    Image.new("RGB", (64, 64)).save(dataset / "1.jpg")
    code, told = run(dataset, "http://127.0.0.1:9/v1")
    assert (code, captions(dataset)) == (4, {})
    assert "1.jpg and 1.png would share 1.json" in told


def process(dataset: Path, url: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "loraport.cli.main", "dataset", "caption", str(dataset), "--endpoint", url]
    return subprocess.Popen(
        [*command, "--model", "eye-1", "--key-env", "MY_KEY", *arguments],
        env={**os.environ, "MY_KEY": KEY},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="lists processes through /proc")
def test_the_key_is_in_the_header_alone(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", 3)
    seen: list[str] = []

    def answer(asked: Asked) -> Reply:
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                seen.append(file.read_text(errors="replace"))
            except OSError:  # it has ended
                continue
        return failed(400, f"Incorrect key {KEY}") if len(service_at.asked) == 1 else said(CAPTION)

    with service(answer) as service_at:
        running = process(dataset, service_at.url, "--parallel", "1")
        told = running.communicate(timeout=60)[0]
    assert running.returncode == 4, told
    assert "Incorrect key [key]" in told
    assert {asked.headers["Authorization"] for asked in service_at.asked} == {f"Bearer {KEY}"}
    assert any("loraport" in line for line in seen)
    everything = [told, *seen, *(json.dumps(asked.body) for asked in service_at.asked)]
    everything += [file.read_text(errors="replace") for file in tmp_path.rglob("*") if file.is_file()]
    assert not [text for text in everything if KEY in text]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_a_stop_at_any_time_leaves_whole_captions_and_the_next_run_goes_on(
    tmp_path: Path, number: int, code: int
) -> None:
    dataset = make_dataset(tmp_path / "set", 12)
    with service(lambda asked: Reply(body=said(CAPTION).body, delay=0.2)) as slow:
        running = process(dataset, slow.url, "--parallel", "2")
        while len(captions(dataset)) < 3:
            assert running.poll() is None, running.communicate()[0]
            time.sleep(0.01)
        running.send_signal(number)
        told = running.communicate(timeout=30)[0]
        assert running.returncode == code, told
        written = captions(dataset)
        assert 3 <= len(written) < 12
        assert set(written.values()) == {COMPACT}
        if code == 130:
            assert re.search(r"Stopped: \d+ captions written, \d+ pictures left\.", told)
        before = len(slow.asked)
        assert run(dataset, slow.url, "--parallel", 8)[0] == 0
        assert len(slow.asked) - before == 12 - len(written)
    assert set(captions(dataset).values()) == {COMPACT}
    assert len(captions(dataset)) == 12


def test_errors_are_one_message_without_a_traceback(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", 1)
    running = process(dataset, "http://127.0.0.1:9/v1")
    told: Any = running.communicate(timeout=60)[0]
    assert running.returncode == 5
    assert told.startswith("error: http://127.0.0.1:9/v1/chat/completions cannot be reached")
    assert "Traceback" not in told
