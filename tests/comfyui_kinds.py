"""Every kind of adapter on real-size modules of a model, and what each does to ComfyUI's test weights, in fp64."""

import family_models as models
import numpy as np

from loraport.lora.canonical import ColumnScale, LoHa, LoKr, LoraModule, LowRank, RowScale, Tucker
from loraport.lora.stacked import Full, Verbatim

LARGEST = 40_000_000  # numbers in a weight, for the test's time
SCALE = 0.5


def weight_shapes(model):
    """Native module → the shape of its weight, kernel and all."""
    import torch

    shapes = {}
    named = dict(models.build(model).named_modules())
    for native, rows in models.layout(model).items():
        module = named[rows[0][2]]
        kernel = tuple(module.weight.shape[2:]) if not isinstance(module, torch.nn.Linear) else ()
        inner = models.modules(model)[rows[0][2]][1] // int(np.prod(kernel))
        shapes[native] = (rows[0][5], inner, *kernel)
    return shapes


def weight(shape):
    """As the child has it, rounded to fp32."""
    rows, columns = np.arange(shape[0])[:, None], np.arange(int(np.prod(shape[1:])))[None, :]
    return np.sin(1 + 0.7 * rows + 0.3 * columns).astype(np.float32).astype(np.float64)


def _random(rng, *shape):
    return (0.5 * rng.standard_normal(shape)).astype(np.float32)


def _low_rank(rng, shape):
    return LowRank(down=_random(rng, 2, *shape[1:]), up=_random(rng, shape[0], 2, *(1 for _ in shape[2:])))


def _tucker(rng, shape):
    return Tucker(_random(rng, 2, shape[1], 1, 1), _random(rng, 2, 2, *shape[2:]), _random(rng, shape[0], 2, 1, 1))


def _loha(rng, shape):
    columns = int(np.prod(shape[1:]))
    return LoHa(*(_random(rng, *size) for _ in range(2) for size in ((shape[0], 2), (2, columns))))


def _loha_tucker(rng, shape):
    pairs = (_random(rng, 2, side) for _ in range(2) for side in shape[:2])
    return LoHa(*pairs, *(_random(rng, 2, 2, *shape[2:]) for _ in range(2)))


def _lokr(rng, shape, factored=False):
    a, b = (next(each for each in (4, 3, 2, 1) if side % each == 0) for side in shape[:2])
    c, d = shape[0] // a, shape[1] // b
    if factored and len(shape) == 4:
        return LoKr(
            w1=_random(rng, a, b), w2_a=_random(rng, 2, c), w2_b=_random(rng, 2, d), t2=_random(rng, 2, 2, *shape[2:])
        )
    if factored:
        return LoKr(w1=_random(rng, a, b), w2_a=_random(rng, c, 2), w2_b=_random(rng, 2, d))
    return LoKr(w1=_random(rng, a, b), w2=_random(rng, c, d, *shape[2:]))


def _full(rng, shape):
    return Full(_random(rng, *shape))


def _turned(rng, shape):
    size = 4 if shape[0] % 4 == 0 else 2
    numbers = 0.1 * rng.standard_normal((shape[0] // size, size, size))
    return Verbatim({".oft_blocks": numbers.astype(np.float32), ".alpha": np.zeros((), np.float32)})


KINDS = {
    "lora": _low_rank,
    "loha": _loha,
    "lokr": _lokr,
    "lokr factored": lambda rng, shape: _lokr(rng, shape, factored=True),
    "full": _full,
    "dora": _low_rank,
    "dora by column": _low_rank,
    "loha dora": _loha,
    "lokr dora by column": _lokr,
    "oft": _turned,
}
CONVOLUTIONS = {
    "tucker": _tucker,
    "loha tucker": _loha_tucker,
    "tucker dora": _tucker,
    "loha tucker dora by column": _loha_tucker,
}


def modules_for(model):
    """[(kind, native module, shape)]: each kind on a module of its own, and on convolutions too where the model has
    them."""
    shapes = {name: shape for name, shape in weight_shapes(model).items() if np.prod(shape) <= LARGEST}
    plain = sorted((name for name, shape in shapes.items() if len(shape) == 2), key=_spread)
    conv = sorted((name for name, shape in shapes.items() if len(shape) == 4 and shape[2] == 3), key=_spread)
    chosen = [(kind, name, shapes[name]) for kind, name in zip(KINDS, plain, strict=False)]
    if len(conv) > 1:
        kinds = [*KINDS, *CONVOLUTIONS]
        chosen += [(kind, name, shapes[name]) for kind, name in zip(kinds, conv, strict=False)]
    return chosen


def _spread(name):
    """An order that mixes attention, feed-forward and the rest, the same every time."""
    return sum(ord(letter) * (place + 1) for place, letter in enumerate(name)) % 1009, name


def adapter(kind, name, shape):
    """A module of the kind, and ΔW as a matrix."""
    rng = np.random.default_rng(sum(map(ord, kind + name)))
    factors = (KINDS | CONVOLUTIONS)[kind](rng, shape)
    before = weight(shape)
    if isinstance(factors, Verbatim):
        return LoraModule(name, factors, 1.0), _after_turning(factors, before) - before
    scale = 1.0 if kind == "full" else SCALE
    merged = before + scale * factors.product()(0, shape[0])
    if kind.endswith("dora by column"):
        trained = (1 + rng.random(shape[1])).astype(np.float32)
        by_input = merged.reshape(shape[0], shape[1], -1)
        gain = trained / np.sqrt((by_input**2).sum(axis=(0, 2)))
        after = (by_input * gain[None, :, None]).reshape(merged.shape)
        return LoraModule(name, factors, scale, ColumnScale(trained, len(shape))), after - before
    if kind.endswith("dora"):
        base, changed = (np.linalg.norm(each, axis=1) for each in (before, merged))
        trained = base * (1 + 0.1 * rng.standard_normal(len(base)))
        dora = RowScale(trained, base, changed, axes=len(shape))
        return LoraModule(name, factors, scale, dora), (trained / changed)[:, None] * merged - before
    return LoraModule(name, factors, scale), merged - before


def _after_turning(factors, before):
    """The rows of each block of W turned by the Cayley transform of the block, arXiv 2306.07280."""
    blocks = factors.tensors[".oft_blocks"].astype(np.float64)
    skew = blocks - blocks.transpose(0, 2, 1)
    one = np.eye(blocks.shape[1])
    turns = (one + skew) @ np.linalg.inv(one - skew)
    rows = before.reshape(*blocks.shape[:2], -1)
    return np.einsum("knm,knc->kmc", turns, rows).reshape(before.shape)
