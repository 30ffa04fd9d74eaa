"""LoRAs on small copies of real models: block 0 of every stack, under diffusers' names, all sizes divided by 64."""

import functools
import re

import family_models as models
import numpy as np

SMALLER = 64
#: One model of each family.
MODELS = ["ideogram4", "flux1", "flux2", "qwen-image", "z-image", "sdxl", "sd15", "sd3-3.5-medium", "wan-14b", "krea2"]


def _small(shape):
    return tuple(max(size // SMALLER, 1) for size in shape)


def _is_first(name):
    """Whether every layer number in a name is the first, and its module one that divides."""
    return not re.search(r"(?:blocks|layers|refiner)\.[1-9]", name)


@functools.cache
def shapes(model):
    """diffusers' modules of the small model → (rows, columns)."""
    found = {name: _small(shape) for name, shape in models.modules(model).items() if _is_first(name)}
    odd = {each for rows in models.layout(model).values() for each in _uneven(rows)}
    return {name: shape for name, shape in found.items() if name not in odd}


def _uneven(rows):
    return [row[2] for row in rows if any(edge % SMALLER for edge in (*row[:2], *row[3:]))]


def native_changes(model, changes):
    """ΔW by native module, from ΔW by diffusers' module: rows put where the model's layout says. Zeros elsewhere."""
    placed = {}
    for native, rows in models.layout(model).items():
        mine = [row for row in rows if row[2] in changes]
        if not mine:
            continue
        columns = changes[mine[0][2]].shape[1]
        whole = placed.setdefault(native, np.zeros((rows[0][5] // SMALLER, columns)))
        for first, stop, name, low, high, _ in mine:
            whole[first // SMALLER : stop // SMALLER] = changes[name][low // SMALLER : high // SMALLER]
    return placed


def dense(module):
    """ΔW of a canonical module, in fp64."""
    return module.scale * module.factors.product()(0, module.factors.shape[0])


def assert_same_changes(lora, expected, tolerance=1e-6):
    """The LoRA changes exactly these modules, by exactly this."""
    assert lora.unread == ()
    assert set(lora.modules) == set(expected)
    for name, change in expected.items():
        found = dense(lora.modules[name])
        assert found.shape == change.shape, name
        assert np.linalg.norm(found - change) <= tolerance * max(np.linalg.norm(change), 1e-12), name
