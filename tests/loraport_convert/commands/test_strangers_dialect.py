"""A dialect of somebody else's, brought in by a plugin, takes part in every command like those that are built in."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from loraport.cli.main import build_app
from loraport.hookspecs import hookimpl
from loraport.lora.canonical import LoraFile, LoraModule, LowRank
from loraport.lora.dialect import UnknownScale
from loraport.lora.storage import read_tensors, write_tensors
from loraport.plugins import plugins

MODULE, H = "layers.0.attention.o", 32


class Slashes:
    """`ideogram/<module>/up` and `/down`, the scale in the metadata or nowhere."""

    name = "slashes"

    def detect(self, keys, shapes, metadata):
        return float(all(key.startswith("ideogram/") for key in keys))

    def read(self, path, scale=None):
        tensors = read_tensors(path)
        scale = tensors.metadata.get("slashes.scale", scale)
        if scale is None:
            raise UnknownScale(f"{path} does not tell its scale.")
        names = {key.split("/")[1] for key in tensors}
        pairs = {name: LowRank(tensors[f"ideogram/{name}/down"], tensors[f"ideogram/{name}/up"]) for name in names}
        return LoraFile("ideogram4", {name: LoraModule(name, pair, float(scale)) for name, pair in pairs.items()})

    def read_with_alpha(self, path, alpha):
        return self.read(path, 1.0 if alpha is None else alpha / 2)

    def write(self, lora, path, dtype, metadata):
        tensors = {}
        for name, module in lora.modules.items():
            arrays = module.factors.arrays()
            tensors |= {f"ideogram/{name}/up": arrays["up"], f"ideogram/{name}/down": arrays["down"]}
        write_tensors(path, tensors, {**metadata, "slashes.scale": str(module.scale)})


class Plugin:
    @hookimpl
    def register_dialects(self, register):
        register(Slashes())


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    plugin = Plugin()
    plugins().manager.register(plugin, "slashes")
    app = build_app()

    def call(*arguments):
        done = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
        return done.exit_code, done.stdout, done.stderr

    yield call
    plugins().manager.unregister(plugin)


@pytest.fixture
def strange(tmp_path):
    def make(metadata):
        rng = np.random.default_rng(0)
        tensors = {f"ideogram/{MODULE}/{end}": rng.random(s) for end, s in (("up", (H, 2)), ("down", (2, H)))}
        write_tensors(tmp_path / "strange.safetensors", tensors, metadata)
        return tmp_path / "strange.safetensors"

    return make


def test_it_is_recognised_converted_both_ways_and_verified(run, strange, tmp_path):
    path, comfy, back = strange({"slashes.scale": "0.5"}), tmp_path / "comfy.safetensors", tmp_path / "back.safetensors"
    assert run("convert", path, "-o", comfy)[0] == 0
    assert float(read_tensors(comfy)[f"diffusion_model.{MODULE}.alpha"]) == 1.0
    assert run("convert", comfy, "-o", back, "--to", "slashes")[0] == 0
    assert read_tensors(back).metadata["slashes.scale"] == "0.5"
    assert run("verify", path, back)[0] == 0
    assert json.loads(run("verify", path, comfy, "--json")[1])["a"] == "slashes"


def test_its_missing_scale_is_asked_for_like_any_other(run, strange, tmp_path):
    path, out = strange({}), tmp_path / "out.safetensors"
    assert run("convert", path, "-o", out)[0] == 4
    assert run("convert", path, "-o", out, "--alpha", 4)[0] == 0
    assert float(read_tensors(out)[f"diffusion_model.{MODULE}.alpha"]) == 4.0


def test_a_family_that_it_cannot_be_told_is_an_error_and_not_ignored(run, strange, tmp_path):
    code, _, error = run(
        "convert", strange({"slashes.scale": "1"}), "-o", tmp_path / "o.safetensors", "--family", "wan"
    )
    assert (code, "slashes" in error) == (4, True)
