"""Checkpoints that are not right: each gives one error that names the path and the tensor."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from loraport.errors import DataError
from loraport_native.models.checkpoint import (
    find_checkpoint,
    load_scheduler,
    load_text_encoder,
    load_tokenizer,
    load_transformer,
    load_vae,
)

FILE = "transformer/diffusion_pytorch_model.safetensors"
QKV = "layers.1.attention.qkv.weight"


@pytest.fixture
def copy(tiny_official, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_official, tmp_path / "checkpoint"))


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def load(folder: Path, dtype: torch.dtype = torch.float32):
    return load_transformer(find_checkpoint(str(folder)), dtype, "cpu")


BROKEN = {
    "missing": (lambda t: t.pop(QKV), f"tensor {QKV} is missing"),
    "unexpected": (lambda t: t.update(extra=torch.zeros(2)), "unexpected tensor extra"),
    "shape": (
        lambda t: t.update({QKV: torch.zeros(2, 128)}),
        f"tensor {QKV} has shape \\(2, 128\\), the model needs \\(384, 128\\)",
    ),
    "nan": (lambda t: t[QKV][3, 4].fill_(float("nan")), f"tensor {QKV} holds NaN or infinity"),
    "infinity": (lambda t: t[QKV][3, 4].fill_(float("-inf")), f"tensor {QKV} holds NaN or infinity"),
    "another model": (
        lambda t: [t.pop(n) for n in list(t) if n.startswith("layers.0.")],
        "does not hold an Ideogram 4 transformer",
    ),
    "fp8 without scale": (
        lambda t: t.update({QKV: t[QKV].to(torch.float8_e4m3fn)}),
        f"tensor {QKV}_scale is missing",
    ),
    "scale of another shape": (
        lambda t: t.update({QKV: t[QKV].to(torch.float8_e4m3fn), f"{QKV}_scale": torch.ones(5)}),
        f"{QKV}_scale has shape \\(5,\\)",
    ),
    "nf4": (
        lambda t: t.update({f"{QKV}.quant_state.bitsandbytes__nf4": torch.zeros(2)}),
        "already quantised to 4 bit",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_tensor_is_named_with_its_folder(copy, case):
    change, message = BROKEN[case]
    edit(copy / FILE, change)
    with pytest.raises(DataError, match=message) as caught:
        load(copy)
    assert str(copy / "transformer") in str(caught.value)


def test_a_part_of_a_split_qkv_that_is_missing_is_named(tiny_diffusers, tmp_path):
    folder = Path(shutil.copytree(tiny_diffusers, tmp_path / "checkpoint"))
    edit(folder / FILE, lambda t: t.pop("layers.1.attention.to_k.weight"))
    with pytest.raises(DataError, match=r"tensor layers\.1\.attention\.to_k\.weight is missing"):
        load(folder)


def test_weights_too_large_for_fp16_say_so_and_load_in_bf16(copy):
    edit(copy / FILE, lambda t: t[QKV][0, 0].fill_(1e6))
    with pytest.raises(DataError, match=r"cannot hold(.|\n)*bf16"):
        load(copy, torch.float16)
    load(copy, torch.bfloat16)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def lie(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes((10**12).to_bytes(8, "little") + data[8:])


DAMAGED = {
    "truncated": (truncate, "is damaged: its header promises"),
    "lying header": (lie, "its header is cut off"),
    "empty": (lambda path: path.write_bytes(b""), "its header is cut off"),
    "not safetensors": (lambda path: path.write_bytes(b"\x04\0\0\0\0\0\0\0oops"), "header is not valid"),
    "a Git LFS pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "Git LFS pointer",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("file", [FILE, "text_encoder/model.safetensors"])
def test_a_damaged_file_is_named(copy, case, file):
    damage, message = DAMAGED[case]
    damage(copy / file)
    with pytest.raises(DataError, match=message) as caught:
        find_checkpoint(str(copy))
    assert str(copy / file) in str(caught.value)


def test_offsets_that_do_not_fit_their_shape_are_an_error_and_not_a_crash(copy):
    path = copy / FILE
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[QKV]["shape"] = [384, 999]
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])
    with pytest.raises(DataError, match=QKV):
        load(copy)


def test_shards_with_an_index_load_and_a_missing_shard_is_named(copy):
    tensors = load_file(copy / FILE)
    expected = load(copy).state_dict()
    names = sorted(tensors)
    shards = {"a.safetensors": names[:10], "b.safetensors": names[10:]}
    for shard, mine in shards.items():
        save_file({name: tensors[name] for name in mine}, copy / "transformer" / shard)
    (copy / FILE).unlink()
    with pytest.raises(DataError, match="2 safetensors files and no index"):
        load(copy)
    index = {"weight_map": {name: shard for shard, mine in shards.items() for name in mine}}
    (copy / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    got = load(copy).state_dict()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    (copy / "transformer/b.safetensors").unlink()
    with pytest.raises(DataError, match=r"1 of 2 shards are missing, first b\.safetensors"):
        load(copy)


@pytest.mark.parametrize("shape", [(384,), (384, 1), ()])
def test_fp8_rows_that_are_kept_come_with_a_scale_a_row(copy, shape):
    rows = torch.arange(384 * 128).remainder(120).to(torch.uint8).reshape(384, 128)
    scale = torch.rand(shape) + 0.5
    edit(copy / FILE, lambda t: t.update({QKV: rows.view(torch.float8_e4m3fn), f"{QKV}_scale": scale}))
    seen = []

    def prepare(block):
        linear = block.attention.qkv
        seen.append(linear.weight.dtype)
        if linear.weight.dtype == torch.float8_e4m3fn:
            assert torch.equal(linear.weight.view(torch.uint8), rows)
            assert not linear.weight.requires_grad
            assert linear.weight_scale.shape == (384, 1)
            assert torch.equal(linear.weight_scale, scale.reshape(-1, 1).expand(384, 1))

    load_transformer(find_checkpoint(str(copy)), torch.float32, "cpu", prepare_block=prepare, keep_fp8=True)
    assert seen == [torch.float32, torch.float8_e4m3fn, torch.float32]


def test_fp8_rows_of_a_split_qkv_are_joined(tiny_diffusers, tiny_official, tmp_path):
    folder = Path(shutil.copytree(tiny_diffusers, tmp_path / "checkpoint"))
    fused = {name: tensor for name, tensor in load_file(tiny_official / FILE).items() if name == QKV}[QKV].float()
    scale = fused.abs().amax(1) / 448
    rows = (fused / scale[:, None]).to(torch.float8_e4m3fn)

    def change(tensors):
        for number, letter in enumerate("qkv"):
            part = slice(128 * number, 128 * (number + 1))
            name = f"layers.1.attention.to_{letter}.weight"
            tensors |= {name: rows[part].clone(), f"{name}_scale": scale[part].clone()}

    edit(folder / FILE, change)
    kept = load_transformer(find_checkpoint(str(folder)), torch.float32, "cpu", keep_fp8=True).layers[1].attention.qkv
    assert torch.equal(kept.weight.view(torch.uint8), rows.view(torch.uint8))
    assert torch.equal(kept.weight_scale[:, 0], scale)


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_nan_among_fp8_rows_is_named(copy, byte):
    def change(tensors):
        rows = torch.zeros(384, 128, dtype=torch.uint8)
        rows[7, 5] = byte
        tensors.update({QKV: rows.view(torch.float8_e4m3fn), f"{QKV}_scale": torch.ones(384)})

    edit(copy / FILE, change)
    with pytest.raises(DataError, match=f"tensor {QKV} holds NaN"):
        load_transformer(find_checkpoint(str(copy)), torch.float32, "cpu", keep_fp8=True)


@pytest.mark.parametrize("shape", [(384,), (384, 1), ()])
def test_fp8_scales_of_rows_columns_and_one_number_are_applied(copy, shape):
    def change(tensors):
        tensors[QKV] = torch.ones(384, 128).to(torch.float8_e4m3fn)
        tensors[f"{QKV}_scale"] = torch.full(shape, 0.25)

    edit(copy / FILE, change)
    assert (load(copy).layers[1].attention.qkv.weight == 0.25).all()


def test_without_a_config_the_dimensions_come_from_the_tensors(copy):
    expected = load(copy).config
    (copy / "transformer/config.json").unlink()
    got = load(copy).config
    different = {name for name in expected if not name.startswith("_") and expected[name] != got[name]}
    assert different == {"mrope_section"}


def test_a_config_of_another_size_is_a_wrong_shape(copy):
    path = copy / "transformer/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 128}))
    with pytest.raises(DataError, match=r"feed_forward\.w1\.weight has shape \(256, 128\)"):
        load(copy)


def test_a_missing_part_lists_the_files_expected(copy):
    shutil.rmtree(copy / "vae")
    with pytest.raises(DataError, match=r"vae is missing(.|\n)*text_encoder/config\.json"):
        find_checkpoint(str(copy))


def test_a_part_without_weights_is_named(copy):
    (copy / FILE).unlink()
    with pytest.raises(DataError, match=r"transformer holds no \*\.safetensors"):
        find_checkpoint(str(copy))


def test_a_checkpoint_without_the_unconditional_transformer_or_scheduler_still_trains(copy):
    shutil.rmtree(copy / "unconditional_transformer")
    shutil.rmtree(copy / "scheduler")
    checkpoint = find_checkpoint(str(copy))
    load_transformer(checkpoint, torch.float32, "cpu")
    assert load_scheduler(checkpoint).config.shift == 1.0
    with pytest.raises(DataError, match="has no unconditional_transformer"):
        load_transformer(checkpoint, torch.float32, "cpu", "unconditional_transformer")


def test_a_text_encoder_of_another_depth_or_width_is_refused(copy):
    path = copy / "text_encoder/config.json"
    config = json.loads(path.read_text())
    config["text_config"]["num_hidden_layers"] = 28
    path.write_text(json.dumps(config))
    with pytest.raises(DataError, match="has 28 layers"):
        load_text_encoder(find_checkpoint(str(copy)), torch.float32, "cpu")
    config["text_config"] |= {"num_hidden_layers": 36, "hidden_size": 128}
    path.write_text(json.dumps(config))
    with pytest.raises(DataError, match="1664 features a token; the transformer beside it takes 832"):
        load_text_encoder(find_checkpoint(str(copy)), torch.float32, "cpu")


def test_a_text_encoder_saved_with_its_language_head_loads(copy):
    path = copy / "text_encoder/model.safetensors"
    expected = load_text_encoder(find_checkpoint(str(copy)), torch.float32, "cpu")
    block, embedded = expected.block(5).state_dict(), expected.embed([3, 1, 3])
    tensors = {f"model.{name}": tensor for name, tensor in load_file(path).items()}
    save_file(tensors | {"lm_head.weight": torch.zeros(4, 4)}, path)
    got = load_text_encoder(find_checkpoint(str(copy)), torch.float32, "cpu")
    assert all(torch.equal(tensor, block[name]) for name, tensor in got.block(5).state_dict().items())
    assert torch.equal(got.embed([3, 1, 3]), embedded)


def test_a_tokenizer_that_cannot_be_read_is_named(copy):
    (copy / "tokenizer/tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="tokenizer cannot be read"):
        load_tokenizer(find_checkpoint(str(copy)))


def test_the_vae_keeps_its_statistics_in_float32_whatever_the_dtype(copy):
    vae = load_vae(find_checkpoint(str(copy)), torch.bfloat16, "cpu")
    assert vae.dtype == torch.float32
    assert vae.bn.running_var.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in vae.parameters())


def test_loaded_weights_do_not_hang_on_the_file(copy):
    model = load(copy, torch.bfloat16)
    before = model.layers[1].attention.qkv.weight.clone()
    with open(copy / FILE, "r+b") as file:
        file.seek(-(10**6), os.SEEK_END)
        file.write(b"\0" * 10**6)
    assert torch.equal(model.layers[1].attention.qkv.weight, before)


def test_one_changed_weight_changes_the_identity(copy):
    before = find_checkpoint(str(copy)).identity
    assert find_checkpoint(str(copy)).identity == before
    edit(copy / "vae/diffusion_pytorch_model.safetensors", lambda t: t["bn.running_mean"][0].add_(1))
    assert find_checkpoint(str(copy)).identity != before


RESPONSE = SimpleNamespace(headers={}, request=None)  # all that the hub's errors look at

HUB = {
    "gated": (lambda: GatedRepoError("no", response=RESPONSE), r"is gated(.|\n)*Accept its licence at"),
    "absent": (lambda: RepositoryNotFoundError("no", response=RESPONSE), "The hub has no model me/model"),
    "offline": (lambda: LocalEntryNotFoundError("no"), "hub cannot be reached"),
}


@pytest.mark.parametrize("case", HUB)
def test_what_the_hub_refuses_is_said_plainly(monkeypatch, case):
    make, message = HUB[case]

    def refuse(*args, **kwargs):
        raise make()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(DataError, match=message):
        find_checkpoint("me/model")


def test_a_hub_snapshot_is_identified_by_its_commit_and_skips_what_is_not_needed(monkeypatch, tiny_official):
    asked = {}

    def snapshot(repo, revision, allow_patterns):
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        return str(tiny_official)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    checkpoint = find_checkpoint("me/model", revision="main", unconditional=False)
    assert checkpoint.identity == f"me/model@{tiny_official.name}"
    assert asked["revision"] == "main"
    assert "vae/*.safetensors" in asked["patterns"]
    assert not any("unconditional" in pattern for pattern in asked["patterns"])


def test_a_folder_that_is_not_there_says_what_a_checkpoint_is(tmp_path):
    for wrong in (str(tmp_path / "nothing"), "./nothing", "nothing"):
        with pytest.raises(DataError, match=r"no checkpoint folder(.|\n)*hub id"):
            find_checkpoint(wrong)
    with pytest.raises(DataError, match="is not an Ideogram 4 checkpoint"):
        find_checkpoint(str(tmp_path))


def test_a_revision_of_a_folder_is_refused(copy):
    with pytest.raises(DataError, match="is a folder"):
        find_checkpoint(str(copy), revision="main")
