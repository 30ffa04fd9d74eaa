from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_fakes import write_lora

from loraport.errors import BackendError, DataError, RunFolderError
from loraport.ideogram4 import IDEOGRAM4
from loraport.lora.canonical import LoraFile, LoraModule, LowRank
from loraport.lora.dialect import detect_dialect
from loraport.lora.storage import read_tensors, write_tensors
from loraport.planning import Plan
from loraport.run import events
from loraport.run.events import Event
from loraport.run.finish import finish
from loraport.run.folder import RunFolder
from loraport.run.record import Record
from loraport_convert.comfyui import ComfyUI

NewRun = Callable[..., tuple[Plan, RunFolder]]


class Stranger:
    """A dialect of one trainer: `A.<module>` and `B.<module>`, scale 2."""

    name = "stranger"

    def detect(self, keys: Any, shapes: Any, metadata: Mapping[str, str]) -> float:
        return 0.9 if all(key.startswith(("A.", "B.")) for key in keys) else 0.0

    def read(self, path: Path) -> LoraFile:
        tensors = read_tensors(path)
        names = [key[2:] for key in tensors if key.startswith("A.")]
        modules = [LoraModule(name, LowRank(tensors["A." + name], tensors["B." + name]), 2.0) for name in names]
        return LoraFile("ideogram4", {module.name: module for module in modules})


class Forgetful(ComfyUI):
    """Writes every scale as 1."""

    def write(self, lora: LoraFile, path: Path, dtype: str, metadata: Mapping[str, str]) -> None:
        modules = {name: LoraModule(name, module.factors, 1.0) for name, module in lora.modules.items()}
        super().write(LoraFile(lora.family, modules), path, dtype, metadata)


@pytest.fixture
def strange_file(tmp_path: Path) -> Path:
    random = np.random.default_rng(1)
    path = tmp_path / "strange.safetensors"
    write_tensors(
        path,
        {
            "A.layers.1.attention.o": random.normal(size=(2, 8)).astype(np.float32),
            "B.layers.1.attention.o": random.normal(size=(8, 2)).astype(np.float32),
        },
        {},
    )
    return path


def run_finish(new_run: NewRun, source: Path, *dialects: Any, heard: list[Event] | None = None) -> RunFolder:
    plan, folder = new_run()
    with Record(folder, on_event=None if heard is None else heard.append) as record:
        finish(plan, source, folder, record, {dialect.name: dialect for dialect in dialects}, IDEOGRAM4)
    return folder


def test_the_trainers_lora_is_published_for_comfyui_with_its_proof(new_run: NewRun, strange_file: Path) -> None:
    heard: list[Event] = []
    folder = run_finish(new_run, strange_file, ComfyUI(), Stranger(), heard=heard)
    published = ComfyUI().read(folder.path / "demo.safetensors")
    assert published.modules["layers.1.attention.o"].scale == 2.0
    proof = json.loads(folder.proof_file.read_text())
    assert proof["ok"] is True
    assert [event.type for event in heard] == ["phase", "finished"]
    end = heard[-1]
    assert isinstance(end, events.Finished)
    assert (end.lora, end.proof, end.step) == ("demo.safetensors", "proof.json", 4)
    assert 0 < end.worst_difference == proof["modules"][0]["difference"] < 8e-3
    assert folder.read_state().status == "finished"


def test_the_header_says_what_the_lora_is(new_run: NewRun, strange_file: Path) -> None:
    folder = run_finish(new_run, strange_file, ComfyUI(), Stranger())
    metadata = read_tensors(folder.path / "demo.safetensors").metadata
    assert metadata["modelspec.architecture"] == "ideogram-4/lora"
    assert metadata["modelspec.trigger_phrase"] == "demoword"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"], metadata["ss_steps"]) == ("16", "16.0", "4")
    assert metadata["ss_sd_model_name"] == "tiny"
    assert metadata["loraport.spec_sha256"] == folder.read_spec().hash()
    assert json.loads(metadata["loraport.versions"])["fake"] == "1.0"


def test_the_same_lora_gives_the_same_file(new_run: NewRun, strange_file: Path) -> None:
    folder = run_finish(new_run, strange_file, ComfyUI(), Stranger())
    plan, first = folder.read_spec(), (folder.path / "demo.safetensors").read_bytes()
    again = folder.read_state()
    with Record(folder) as record:
        finish(
            Plan("fake", "1.0", plan, folder.path, [], {}, [], {}),
            strange_file,
            folder,
            record,
            {"comfyui": ComfyUI(), "stranger": Stranger()},
            IDEOGRAM4,
        )
    assert again.status == "finished"
    assert (folder.path / "demo.safetensors").read_bytes() == first


def test_a_file_that_means_something_else_is_not_published(new_run: NewRun, strange_file: Path) -> None:
    plan, folder = new_run()
    with (
        Record(folder) as record,
        pytest.raises(BackendError, match=r"layers.1.attention.o differs by (4.99|5.0.)e-01"),
    ):
        finish(plan, strange_file, folder, record, {"comfyui": Forgetful(), "stranger": Stranger()}, IDEOGRAM4)
    assert sorted(path.suffix for path in folder.path.iterdir() if path.name[0] != ".") == [
        ".json",
        ".json",
        ".jsonl",
        ".yaml",
    ]
    assert not [path for path in folder.path.iterdir() if path.name.endswith(".tmp")]


def test_keys_that_the_dialect_did_not_understand_stop_the_run(new_run: NewRun, tmp_path: Path) -> None:
    source = tmp_path / "extra.safetensors"
    write_lora(source)
    tensors = dict(read_tensors(source))
    write_tensors(source, {**tensors, "text_model.secret": np.zeros((2, 2), np.float32)}, {})
    with pytest.raises(BackendError, match=r"keys not understood in the source: text_model.secret"):
        run_finish(new_run, source, ComfyUI())


def test_a_file_in_no_known_dialect_names_keys_and_dialects(new_run: NewRun, strange_file: Path) -> None:
    with pytest.raises(DataError, match=r"no LoRA dialect knows these keys: A\.layers.*Dialects: comfyui"):
        run_finish(new_run, strange_file, ComfyUI())


def test_a_damaged_file_is_named(new_run: NewRun, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(DataError, match=r"cut.safetensors cannot be read"):
        run_finish(new_run, tmp_path / "cut.safetensors", ComfyUI())


def test_without_the_writing_dialect_the_reason_is_told(new_run: NewRun, strange_file: Path) -> None:
    with pytest.raises(BackendError, match="'comfyui', which the result is written in, is not installed"):
        run_finish(new_run, strange_file, Stranger())


def test_the_surest_dialect_reads_the_file(strange_file: Path) -> None:
    class Guessing(Stranger):
        name = "guessing"

        def detect(self, keys: Any, shapes: Any, metadata: Mapping[str, str]) -> float:
            return 0.2

    dialects = {"guessing": Guessing(), "stranger": Stranger()}
    assert detect_dialect(strange_file, dialects).name == "stranger"


def test_a_full_disk_publishes_nothing(new_run: NewRun, strange_file: Path) -> None:
    class Full(ComfyUI):
        def write(self, lora: LoraFile, path: Path, dtype: str, metadata: Mapping[str, str]) -> None:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    plan, folder = new_run()
    with Record(folder) as record, pytest.raises(RunFolderError, match=r"demo.safetensors cannot be written: No space"):
        finish(plan, strange_file, folder, record, {"comfyui": Full(), "stranger": Stranger()}, IDEOGRAM4)
    assert not (folder.path / "demo.safetensors").exists()
