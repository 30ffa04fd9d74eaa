from __future__ import annotations

import asyncio
import io
import json
import shutil
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import torch
from PIL import Image
from tiny_vision_model import ALPHABET, write_tiny_vision_model
from typer.testing import CliRunner

from loraport.cli.main import build_app
from loraport.ideogram4 import IDEOGRAM4
from loraport.rules import Setting
from loraport_dataset.captioning.form import BoxOrder, Form
from loraport_dataset.captioning.local import LocalModel, SchemaMask

SETTING = Setting(IDEOGRAM4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_vision_model(folder)
    return folder


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("a", "b"):
        Image.effect_noise((64, 48), 40).convert("RGB").save(folder / f"{name}.png")
    torch.manual_seed(1)
    return folder


def run(dataset: Path, model: object, *arguments: object) -> tuple[int, str]:
    command = ["dataset", "caption", str(dataset), "--local", "--model", str(model), *map(str, arguments)]
    result = CliRunner().invoke(build_app(), command)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(("boxes", "palettes"), [("none", False), ("yx", True)])
def test_even_a_random_model_writes_captions_of_the_familys_schema(
    checkpoint: Path, dataset: Path, boxes: BoxOrder, palettes: bool
) -> None:
    options = ["--boxes", boxes, *(["--palettes"] if palettes else [])]
    code, told = run(dataset, checkpoint, "--max-tokens", 4000, "--device", "cpu", *options)
    assert code == 0, told
    schema = Form(SETTING, boxes, palettes).schema
    assert schema is not None
    for name in ("a", "b"):
        text = (dataset / f"{name}.json").read_text()
        caption = json.loads(text)
        jsonschema.validate(caption, schema)
        assert text == json.dumps(caption, ensure_ascii=False, separators=(",", ":"))
    result = CliRunner().invoke(build_app(), ["dataset", "check", str(dataset), "--json"])
    assert not {"json", "root", "style", "composition", "element", "bbox", "palette"} & set(
        json.loads(result.output)["rules"]
    )


def test_only_tokens_that_lead_to_the_schema_are_left(checkpoint: Path) -> None:
    model = LocalModel(str(checkpoint), 16, "cpu")
    mask = SchemaMask(model._matcher({"type": "object", "properties": {}, "additionalProperties": False}), 2)
    size = len(ALPHABET) + 8  # more than the tokenizer has, as models often do
    for prompt, allowed in (([7, 7], "{"), ([7, 7, ALPHABET.index("{")], "}")):
        scores = mask(torch.tensor([prompt]), torch.zeros(1, size))
        assert torch.isfinite(scores).nonzero()[:, 1].tolist() == [ALPHABET.index(allowed)]


def test_an_answer_that_meets_the_limit_is_no_caption(checkpoint: Path, dataset: Path) -> None:
    code, told = run(dataset, checkpoint, "--max-tokens", 16, "--corrections", 0)
    assert code == 4
    assert "a.png: the answer without a caption that keeps the rules: The answer was cut off" in told
    assert sorted(file.name for file in dataset.iterdir()) == ["a.png", "b.png"]


def test_a_run_that_is_stopped_stops_the_model_with_its_next_token(checkpoint: Path) -> None:
    async def stopped() -> None:
        model = LocalModel(str(checkpoint), 1_000_000, "cpu")
        answer = asyncio.create_task(
            model.answer(Form(SETTING).question(jpeg()), {"type": "string", "minLength": 10**5})
        )
        await asyncio.sleep(0.5)
        answer.cancel()
        await asyncio.gather(answer, return_exceptions=True)

    start = time.process_time()
    asyncio.run(stopped())  # which waits for the model's thread
    assert time.process_time() - start < 10


@pytest.mark.parametrize("what", ["missing", "empty", "text"])
def test_what_is_no_vision_model_is_told_with_what_to_do(dataset: Path, tmp_path: Path, what: str) -> None:
    folder = tmp_path / what
    if what != "missing":
        folder.mkdir()
    if what == "text":
        (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    code, told = run(dataset, folder)
    assert code == 5
    assert f"{folder} cannot be used as a vision model: " in told
    assert ("Nothing is downloaded here" in told) == (what == "missing")


def test_a_model_that_fails_over_a_picture_is_told_without_a_traceback(checkpoint: Path, dataset: Path) -> None:
    broken = dataset.parent / "broken"
    shutil.copytree(checkpoint, broken)
    (broken / "chat_template.jinja").write_text("{{ raise_exception('no pictures, please') }}")
    code, told = run(dataset, broken)
    assert code == 5
    assert "cannot describe a picture: no pictures, please" in told


def test_a_missing_package_is_named_with_the_command_that_brings_it(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.delitem(sys.modules, "loraport_dataset.captioning.local")
    code, told = run(dataset, "anything")
    assert code == 5
    assert "llguidance" in told
    assert "pip install 'loraport[caption-local]'" in told


@pytest.mark.parametrize("option", ["--parallel", "--per-minute", "--attempts", "--timeout"])
def test_options_of_services_are_refused(checkpoint: Path, dataset: Path, option: str) -> None:
    code, told = run(dataset, checkpoint, option, "2")
    assert (code, f"{option} does nothing with --local" in told) == (3, True)
