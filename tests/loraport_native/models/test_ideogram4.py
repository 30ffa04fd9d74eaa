"""The fused model against diffusers' own, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from diffusers import Ideogram4Transformer2DModel
from diffusers.models.transformers.transformer_ideogram4 import Ideogram4MRoPE
from diffusers.pipelines.ideogram4.pipeline_ideogram4 import Ideogram4Pipeline

from loraport_native.models.ideogram4 import Ideogram4
from loraport_native.models.layout import fuse, split, split_names
from loraport_native.recompute import recompute

SMALL = dict(
    in_channels=128,
    num_layers=2,
    attention_head_dim=32,
    num_attention_heads=2,
    intermediate_size=96,
    adaln_dim=32,
    llm_features_dim=104,
    mrope_section=(6, 5, 5),
)
GRID = (3, 4)
N = 12
CLOSE = dict(rtol=1e-5, atol=1e-6)


@pytest.fixture
def pair() -> tuple[Ideogram4Transformer2DModel, Ideogram4]:
    torch.manual_seed(0)
    reference = Ideogram4Transformer2DModel(**SMALL)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    ours = Ideogram4(**SMALL)
    ours.load_state_dict(fuse(reference.state_dict()))
    return reference, ours


def batch(lengths: list[int], longest: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = Ideogram4Pipeline._prepare_ids(lengths, *GRID, longest, torch.device("cpu"))
    positions, segments, indicator = ids
    features = torch.randn(len(lengths), longest, SMALL["llm_features_dim"])
    for row, length in enumerate(lengths):
        features[row, : longest - length] = 0
    return dict(
        latents=torch.randn(len(lengths), N, 128),
        features=features,
        time=torch.rand(len(lengths)),
        positions=positions,
        segments=segments,
        indicator=indicator,
    )


def packed(model, b: dict[str, torch.Tensor], text: torch.Tensor | None = None) -> torch.Tensor:
    text = b["features"] if text is None else text
    longest = text.shape[1]
    pad = torch.zeros(len(text), longest, 128)
    out = model(
        hidden_states=torch.cat((pad, b["latents"]), 1),
        timestep=b["time"],
        encoder_hidden_states=torch.cat((text, torch.zeros(len(text), N, text.shape[-1])), 1),
        position_ids=b["positions"],
        segment_ids=b["segments"],
        indicator=b["indicator"],
        return_dict=False,
    )[0]
    return out[:, longest:]


BATCHES = {"unpadded": ([7, 7], 7), "padded": ([7, 3], 7), "dropped": ([7, 0], 7), "image only": ([0, 0], 0)}


@pytest.mark.parametrize("case", BATCHES)
def test_the_fused_forward_equals_diffusers(pair, case):
    reference, ours = pair
    b = batch(*BATCHES[case])
    torch.testing.assert_close(packed(ours, b), packed(reference, b), **CLOSE)


@pytest.mark.parametrize("case", BATCHES)
def test_velocity_and_its_gradients_equal_diffusers(pair, case):
    reference, ours = pair
    lengths, longest = BATCHES[case]
    b = batch(lengths, longest)
    target = torch.randn(len(lengths), N, 128)

    expected = packed(reference, b)
    torch.nn.functional.mse_loss(expected, target).backward()
    got = ours.velocity(b["latents"], ours.project_text(b["features"]), lengths, b["time"], GRID)
    torch.nn.functional.mse_loss(got, target).backward()

    torch.testing.assert_close(got, expected, **CLOSE)
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in reference.named_parameters()}
    wanted = fuse(gradients)
    assert set(wanted) == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_forward_takes_text_that_is_already_projected_even_after_the_projection_is_dropped(pair):
    _, ours = pair
    b = batch([7, 3], 7)
    with torch.no_grad():
        expected = packed(ours, b)
        text = ours.project_text(b["features"])
        size = sum(p.numel() for p in ours.parameters())
        ours.drop_text_projection()
        torch.testing.assert_close(packed(ours, b, text), expected, **CLOSE)
    assert size - sum(p.numel() for p in ours.parameters()) == 104 + 104 * 64 + 64


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_packed_samples_give_what_each_gives_alone(pair, mode: str, compiled: bool):
    """The modulation of the blocks is trained too: its gradient is summed over the tokens of each sample."""
    _, ours = pair
    ours.drop_text_projection()
    lengths = [7, 3, 0]
    b = batch(lengths, 7)
    text = torch.randn(3, 7, 64)
    target = torch.randn(3, N, 128)
    alone = []
    for one, length in enumerate(lengths):
        i = slice(one, one + 1)
        alone.append(ours.velocity(b["latents"][i], text[i, 7 - length :], None, b["time"][i], GRID))
        torch.nn.functional.mse_loss(alone[-1], target[i], reduction="sum").backward()
    wanted = {name: parameter.grad for name, parameter in ours.named_parameters()}
    ours.zero_grad()

    recompute(ours, mode)
    if compiled:
        torch._dynamo.reset()
        for block in ours.layers:
            block.compile(backend="aot_eager", fullgraph=True)
    got = ours.velocity(b["latents"], text, lengths, b["time"], GRID)
    torch.nn.functional.mse_loss(got, target, reduction="sum").backward()
    torch.testing.assert_close(got, torch.cat(alone), **CLOSE)
    assert {"layers.0.adaln_modulation.weight", "adaln_proj.weight"} <= wanted.keys()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, wanted[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_no_layer_sees_padding(pair):
    _, ours = pair
    seen = []
    for name, module in ours.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.startswith("llm"):
            module.register_forward_hook(
                lambda module, given, result, n=name: seen.append((n, tuple(result.shape[:2])))
            )
    b = batch([7, 3], 7)
    text = ours.project_text(b["features"])

    def tokens(lengths: list[int] | None) -> dict[str, tuple[int, int]]:
        seen.clear()
        ours.velocity(b["latents"], text, lengths, b["time"], GRID)
        return {name.removeprefix("layers.0."): shape for name, shape in seen}

    packed = tokens([7, 3])
    assert {packed[name] for name in ("attention.qkv", "attention.o", "feed_forward.w2")} == {(1, 7 + 3 + 2 * N)}
    assert packed["adaln_modulation"] == (2, 1), "once a sample, not once a token"
    assert packed["final_layer.linear"] == (2, N), "of the image alone"
    assert tokens([3, 3])["attention.qkv"] == (2, 3 + N), "equal lengths need no packing"


def test_velocity_never_makes_a_mask_and_padding_never_reaches_attention(pair, monkeypatch):
    _, ours = pair
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask=None, **kwargs):
        seen.append((attn_mask, args[0].shape))
        return attend(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    b = batch([7, 7], 7)
    text = ours.project_text(b["features"])
    first = ours.velocity(b["latents"], text, None, b["time"], GRID)
    second = ours.velocity(b["latents"], text, [7, 7], b["time"], GRID)
    assert torch.equal(first, second)
    ours.velocity(b["latents"], text, [7, 3], b["time"], GRID)
    assert all(mask is None for mask, _ in seen)
    assert [shape[2] for _, shape in seen[-2:]] == [7 + N, 3 + N]


def test_what_stands_in_the_padding_changes_nothing(pair):
    _, ours = pair
    b = batch([7, 3], 7)
    with torch.no_grad():
        text = ours.project_text(b["features"])
        expected = ours.velocity(b["latents"], text, [7, 3], b["time"], GRID)
        text[1, :4] = 100.0
        got = ours.velocity(b["latents"], text, [7, 3], b["time"], GRID)
    torch.testing.assert_close(got, expected, **CLOSE)


def test_gradient_checkpointing_gives_the_same_gradients(pair):
    _, ours = pair
    b = batch([7, 3], 7)
    text = ours.project_text(b["features"]).detach()
    ours.velocity(b["latents"], text, [7, 3], b["time"], GRID).sum().backward()
    plain = ours.layers[0].attention.qkv.weight.grad.clone()
    ours.zero_grad()
    recompute(ours, "full")
    ours.velocity(b["latents"], text, [7, 3], b["time"], GRID).sum().backward()
    torch.testing.assert_close(ours.layers[0].attention.qkv.weight.grad, plain)


def test_rotary_angles_equal_diffusers_bit_for_bit_and_survive_half_precision_and_autocast():
    reference = Ideogram4MRoPE(32, 5_000_000, (6, 5, 5))
    with torch.device("meta"):
        model = Ideogram4(**SMALL)
    rope = model.to(torch.bfloat16).rotary_emb
    positions = torch.tensor([[[65536, 65536 + h, 65536 + w] for h in range(40) for w in range(40)]])
    with torch.autocast("cpu", torch.bfloat16):
        got = rope(positions)
    cos, sin = reference(positions)
    sin[..., :16] *= -1
    for mine, theirs in zip(got, (cos, sin), strict=True):
        assert torch.equal(mine, theirs)
    assert len({tuple(row) for row in torch.cat(got, -1)[0].tolist()}) == 1600


def test_half_precision_weights_keep_a_float32_time_exact(pair):
    _, ours = pair
    expected = ours.t_embedding(torch.tensor([0.7001, 0.7002]))
    got = ours.to(torch.bfloat16).t_embedding(torch.tensor([0.7001, 0.7002]))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.01)


def test_half_precision_output_is_near_the_float32_one(pair):
    _, ours = pair
    b = batch([7, 3], 7)
    with torch.no_grad():
        expected = ours.velocity(b["latents"], ours.project_text(b["features"]), [7, 3], b["time"], GRID)
        ours.to(torch.bfloat16)
        got = ours.velocity(b["latents"], ours.project_text(b["features"]), [7, 3], b["time"], GRID)
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() / expected.norm() < 0.03


def test_the_model_is_built_from_a_config_and_the_full_size_one_has_the_official_shapes():
    with torch.device("meta"):
        model = Ideogram4.from_config(Ideogram4().config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert model.config.num_layers == 34
    assert shapes["layers.33.attention.qkv.weight"] == (13824, 4608)
    assert shapes["layers.0.attention.o.weight"] == (4608, 4608)
    assert shapes["layers.0.adaln_modulation.weight"] == (18432, 512)
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 3) == 9.279


def test_names_and_rows_convert_both_ways(pair):
    reference, ours = pair
    there = {}
    for name, tensor in ours.state_dict().items():
        there.update(split(name, tensor))
    original = reference.state_dict()
    assert there.keys() == original.keys()
    assert all(torch.equal(there[name], original[name]) for name in there)
    assert split_names("layers.3.attention.qkv.weight") == tuple(
        f"layers.3.attention.to_{part}.weight" for part in "qkv"
    )
