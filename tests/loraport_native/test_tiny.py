"""The tiny checkpoint: whole, small, the same in both layouts, and worth training on."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from diffusers import Ideogram4Pipeline
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import Qwen3VLConfig, Qwen3VLModel

from loraport.errors import DataError
from loraport_native.models.checkpoint import (
    find_checkpoint,
    load_scheduler,
    load_text_encoder,
    load_tokenizer,
    load_transformer,
    load_vae,
)
from loraport_native.models.ideogram4 import Ideogram4
from loraport_native.models.latents import encode_image
from loraport_native.models.text import LAYERS, TAPS, encode
from loraport_native.models.tokens import tokenize
from loraport_native.sizes import FULL, TINY, Size
from loraport_native.tiny import write_checkpoint, write_tiny

CAPTION = json.dumps(
    {
        "high_level_description": "A rusty buggy with six wheels drives over red sand dunes under two moons.",
        "style_description": {
            "aesthetics": "gritty, cinematic",
            "lighting": "low sun, long shadows",
            "photo": "35mm wide angle",
            "medium": "photograph",
        },
        "compositional_deconstruction": {
            "background": "dunes and a dusty orange sky",
            "elements": [{"type": "obj", "bbox": [400, 200, 900, 800], "desc": "a six-wheeled buggy"}],
        },
    },
    separators=(",", ":"),
)


def smooth_image(side: int) -> torch.Tensor:
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(-1, 1)


def size(folder) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_diffusers_own_pipeline_loads_the_diffusers_layout_and_draws(tiny_diffusers):
    pipeline = Ideogram4Pipeline.from_pretrained(tiny_diffusers)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        CAPTION,
        height=64,
        width=64,
        num_inference_steps=2,
        guidance_scale=3.0,
        guidance_schedule=None,
        max_sequence_length=256,
        output_type="pt",
    ).images
    assert images.shape == (1, 3, 64, 64)
    assert images.isfinite().all()


def test_the_pipeline_draws_the_same_with_our_transformers(tiny_diffusers):
    checkpoint = find_checkpoint(str(tiny_diffusers))
    parts = {
        "text_encoder": Qwen3VLModel.from_pretrained(checkpoint.text_encoder, dtype=torch.float32),
        "tokenizer": load_tokenizer(checkpoint),
        "vae": load_vae(checkpoint, torch.float32, "cpu"),
        "scheduler": load_scheduler(checkpoint),
    }
    ours = Ideogram4Pipeline(
        transformer=load_transformer(checkpoint, torch.float32, "cpu"),
        unconditional_transformer=load_transformer(checkpoint, torch.float32, "cpu", part="unconditional_transformer"),
        **parts,
    )
    theirs = Ideogram4Pipeline.from_pretrained(tiny_diffusers, torch_dtype=torch.float32)
    drawn = []
    for pipeline in (ours, theirs):
        pipeline.set_progress_bar_config(disable=True)
        drawn.append(
            pipeline(
                CAPTION,
                height=64,
                width=48,
                num_inference_steps=2,
                guidance_scale=3.0,
                guidance_schedule=None,
                max_sequence_length=256,
                output_type="pt",
                generator=torch.Generator().manual_seed(0),
            ).images
        )
    torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-4, atol=1e-4)


def test_both_layouts_of_a_seed_load_to_the_same_model_bit_for_bit(tiny_diffusers, tiny_official):
    for part in ("transformer", "unconditional_transformer"):
        first, second = (
            load_transformer(find_checkpoint(str(folder)), torch.bfloat16, "cpu", part).state_dict()
            for folder in (tiny_diffusers, tiny_official)
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    for file in ("text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        assert (tiny_diffusers / file).read_bytes() == (tiny_official / file).read_bytes()


def test_the_conditional_and_unconditional_transformers_differ(tiny_official):
    checkpoint = find_checkpoint(str(tiny_official))
    first = load_transformer(checkpoint, torch.float32, "cpu")
    second = load_transformer(checkpoint, torch.float32, "cpu", "unconditional_transformer")
    assert not torch.equal(first.layers[0].attention.qkv.weight, second.layers[0].attention.qkv.weight)


def test_fp8_rows_come_within_their_rounding_of_the_same_weights(tiny_official, tiny_fp8):
    for part in (
        lambda checkpoint: load_transformer(checkpoint, torch.float32, "cpu"),
        lambda checkpoint: load_text_encoder(checkpoint, torch.float32, "cpu").block(0),
    ):
        exact, rounded = (part(find_checkpoint(str(folder))).state_dict() for folder in (tiny_official, tiny_fp8))
        assert exact.keys() == rounded.keys()
        errors = {n: ((exact[n] - rounded[n]).norm() / exact[n].norm()).item() for n in exact}
        assert max(errors.values()) < 0.04
        assert any(error > 0.01 for error in errors.values())


def test_every_linear_has_sides_that_every_quantisation_takes(tiny_official):
    checkpoint = find_checkpoint(str(tiny_official))
    for model in (
        load_transformer(checkpoint, torch.float32, "cpu"),
        load_text_encoder(checkpoint, torch.float32, "cpu").block(0),
    ):
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                assert module.in_features % 64 == module.out_features % 64 == 0, name


def test_it_is_small_and_captions_stay_short(tiny_diffusers, tiny_official, tiny_fp8):
    assert max(size(folder) for folder in (tiny_diffusers, tiny_official, tiny_fp8)) < 15e6
    tokenizer = load_tokenizer(find_checkpoint(str(tiny_official)))
    ids = tokenize(tokenizer, CAPTION, 2048)
    assert len(ids) < 300
    assert CAPTION in tokenizer.decode(ids)
    text = "Ünïcödé 龍 #FF00AA"
    assert text in tokenizer.decode(tokenize(tokenizer, text, 2048))


def test_another_seed_gives_other_weights_and_another_identity(tmp_path, tiny_official):
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    other = write_tiny(tmp_path / "other", "official", seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    same = write_tiny(tmp_path / "same", "official", seed=0)
    identity = find_checkpoint(str(tiny_official)).identity
    assert find_checkpoint(str(same)).identity == identity
    assert find_checkpoint(str(other)).identity != identity


def test_normalised_latents_of_an_image_have_about_unit_variance(tiny_official):
    vae = load_vae(find_checkpoint(str(tiny_official)), torch.float32, "cpu")
    tokens = encode_image(vae, smooth_image(128))
    assert 0.5 < tokens.std() < 1.5
    assert tokens.mean().abs() < 0.2


def test_a_lora_trained_on_one_sample_lowers_the_loss(tiny_official):
    checkpoint = find_checkpoint(str(tiny_official))
    model = load_transformer(checkpoint, torch.float32, "cpu")
    (features,) = encode(
        load_text_encoder(checkpoint, torch.float32, "cpu"), load_tokenizer(checkpoint), ["a red ball"], 256
    )
    text = model.project_text(features[None])
    data = encode_image(load_vae(checkpoint, torch.float32, "cpu"), smooth_image(64))
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(0))
    time = torch.tensor([0.5])
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["qkv", "o", "w1", "w2", "w3"])
    inject_adapter_in_model(config, model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 3 * 5 * 2
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for _ in range(100):
        velocity = model.velocity(0.5 * (data + noise), text, None, time, (4, 4))
        loss = nn.functional.mse_loss(velocity, data - noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0], (losses[0], losses[-1])


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="already holds something"):
        write_tiny(tmp_path, "official")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(DataError, match="already holds something"):
        write_tiny(tmp_path / "notes.txt", "official")


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    write_tiny(tmp_path / "empty", "official")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert (tmp_path / "empty" / "model_index.json").is_file()


def test_an_unknown_layout_names_the_choices(tmp_path):
    with pytest.raises(DataError, match="Did you mean 'official'"):
        write_tiny(tmp_path / "x", "offical")
    with pytest.raises(DataError, match="official layout only"):
        write_tiny(tmp_path / "x", "diffusers", fp8=True)


def test_importing_the_package_does_not_import_torch():
    code = "import sys, loraport_native; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


SMALL = Size(
    transformer={**TINY.transformer, "num_layers": 4, "num_attention_heads": 4, "llm_features_dim": 128 * len(TAPS)},
    text={**TINY.text, "hidden_size": 128, "num_attention_heads": 2},
    vae=TINY.vae,
)


def test_any_size_is_written_shard_by_shard_and_holds_the_same_weights_however_it_is_cut(tmp_path):
    whole = write_checkpoint(tmp_path / "whole", "official", SMALL, unconditional=False)
    cut = write_checkpoint(tmp_path / "cut", "official", SMALL, unconditional=False, shard_bytes=500_000)
    assert find_checkpoint(str(whole)).unconditional_transformer is None
    shards = sorted((cut / "transformer").glob("*.safetensors"))
    assert len(shards) > 3
    assert max(path.stat().st_size for path in shards) < 1_000_000
    assert len(list((cut / "text_encoder").glob("*.safetensors"))) > 3
    for part in (
        lambda checkpoint: load_transformer(checkpoint, torch.bfloat16, "cpu"),
        lambda checkpoint: load_text_encoder(checkpoint, torch.bfloat16, "cpu").block(LAYERS - 1),
    ):
        first, second = (part(find_checkpoint(str(folder))).state_dict() for folder in (whole, cut))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_shards_are_read_by_diffusers_and_transformers_themselves(tmp_path):
    folder = write_checkpoint(tmp_path / "cut", "diffusers", SMALL, shard_bytes=500_000)
    pipeline = Ideogram4Pipeline.from_pretrained(folder)
    assert pipeline.transformer.config.num_layers == 4
    assert pipeline.text_encoder.config.text_config.hidden_size == 128


def test_the_full_size_has_the_dimensions_of_the_released_model():
    with torch.device("meta"):
        assert {name: tensor.shape for name, tensor in Ideogram4(**FULL.transformer).state_dict().items()} == {
            name: tensor.shape for name, tensor in Ideogram4().state_dict().items()
        }
        encoder = Qwen3VLModel(Qwen3VLConfig.from_dict(FULL.text_encoder())).language_model
    blocks = sum(weight.numel() for weight in encoder.layers.parameters())
    assert blocks == 36 * (4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 12288 + 2 * 4096 + 2 * 128)
