"""The tables against diffusers' own conversion of original checkpoints: every row and norm must go where it puts it."""

import importlib

import family_models as models
import pytest
from family_models import layout, modules

from loraport_convert.families import FAMILIES

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

CONVERSIONS = {
    "flux1": "convert_flux_transformer_checkpoint_to_diffusers",
    "flux2": "convert_flux2_transformer_checkpoint_to_diffusers",
    "z-image": "convert_z_image_transformer_checkpoint_to_diffusers",
    "sd3-medium": "convert_sd3_transformer_checkpoint_to_diffusers",
    "sd3-3.5-medium": "convert_sd3_transformer_checkpoint_to_diffusers",
    "sd3-3.5-large": "convert_sd3_transformer_checkpoint_to_diffusers",
    "wan-14b": "convert_wan_transformer_to_diffusers",
    "wan-14b-image": "convert_wan_transformer_to_diffusers",
    "krea2": "convert_krea2_transformer_checkpoint_to_diffusers",
    "sdxl": "convert_ldm_unet_checkpoint",
    "sd15": "convert_ldm_unet_checkpoint",
}
#: What the original models call the weight of a norm, where that is not `weight`.
NORM_ENDINGS = {"flux1": ".scale", "flux2": ".scale", "krea2": ""}


class Checkpoint(dict):
    """Original weights one column wide; what is not asked about is zeros of a length that divides."""

    def pop(self, key, *default):
        return super().pop(key) if key in self else torch.zeros(3072 * 7)


@pytest.mark.parametrize("model", CONVERSIONS)
def test_every_row_goes_where_diffusers_own_conversion_puts_it(model):
    converter = getattr(importlib.import_module("diffusers.loaders.single_file_utils"), CONVERSIONS[model])
    placed = layout(model)
    checkpoint, first, unet = Checkpoint(), 0, CONVERSIONS[model] == "convert_ldm_unet_checkpoint"
    for native, rows in placed.items():
        numbers = torch.arange(first, first + rows[0][5], dtype=torch.float64)
        checkpoint[f"{'model.diffusion_model.' if unet else ''}{native}.weight"] = numbers[:, None]
        if unet:
            checkpoint[f"model.diffusion_model.{native}.bias"] = numbers
        first += len(numbers)
    for place, name in enumerate(models.norms(model)):
        (span,) = FAMILIES[models.family_of(model)].native(name)
        key = span.module + NORM_ENDINGS.get(models.family_of(model), ".weight")
        checkpoint[f"{'model.diffusion_model.' if unet else ''}{key}"] = torch.full((8,), float(place))
        if unet:
            checkpoint[f"model.diffusion_model.{span.module}.bias"] = torch.full((8,), place + 0.5)
    original = {key.removeprefix("model.diffusion_model."): tensor.clone() for key, tensor in checkpoint.items()}
    config = {"config": models.build(model).config} if unet or model == "krea2" else {}
    converted = converter(checkpoint, **config)
    for native, rows in placed.items():
        for start, stop, name, low, high, _ in rows:
            expected = original[f"{native}.weight"][start:stop]
            assert torch.equal(converted[f"{name}.weight"][low:high], expected), (native, name)
    for place, name in enumerate(models.norms(model)):
        assert torch.equal(converted[f"{name}.weight"].float(), torch.full((8,), float(place))), name
        assert not unet or torch.equal(converted[f"{name}.bias"], torch.full((8,), place + 0.5)), name
    assert len(modules(model)) == len({row[2] for rows in placed.values() for row in rows})
