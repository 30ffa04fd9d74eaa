import contextlib
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraport.errors import DataError
from loraport.lora.canonical import ColumnScale, LoHa, LoKr, LoraFile, LoraModule, LowRank, RowScale, Tucker
from loraport.lora.dialect import WritableDialect
from loraport.lora.proof import prove
from loraport.lora.storage import read_tensors, write_tensors
from loraport_convert.comfyui import ComfyUI

COMFY = ComfyUI()
# Large enough that the terms of a product do not cancel by chance: rounding would then weigh more than its tolerance.
OUT, IN = 144, 120
NUMPY = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": np.float32}
FACTORED = ["lora", "conv", "tucker", "loha", "loha-tucker", "lokr-w1", "lokr-w2", "lokr-both", "lokr-tucker"]
KINDS = [*FACTORED, "lokr"]


def factors_of(kind, rng, rank=2, dtype=np.float32):
    def random(*shape):
        return (0.1 * rng.standard_normal(shape)).astype(dtype)

    w1, w1_pair = {"w1": random(12, 12)}, {"w1_a": random(12, rank), "w1_b": random(rank, 12)}
    w2, w2_pair = {"w2": random(12, 10)}, {"w2_a": random(12, rank), "w2_b": random(rank, 10)}
    tucker = {"w2_a": random(rank, 12), "w2_b": random(rank, 10), "t2": random(rank, rank, 3, 3)}
    made = {
        "lora": lambda: LowRank(down=random(rank, IN), up=random(OUT, rank)),
        "conv": lambda: LowRank(down=random(rank, IN, 3, 3), up=random(OUT, rank, 1, 1)),
        "tucker": lambda: Tucker(random(rank, IN, 1, 1), random(rank, rank, 3, 3), random(OUT, rank, 1, 1)),
        "loha-tucker": lambda: LoHa(
            *(random(rank, side) for _ in range(2) for side in (OUT, IN)),
            *(random(rank, rank, 3, 3) for _ in range(2)),
        ),
        "loha": lambda: LoHa(random(OUT, rank), random(rank, IN), random(OUT, rank), random(rank, IN)),
        "lokr": lambda: LoKr(**w1, **w2),
        "lokr-w1": lambda: LoKr(**w1, **w2_pair),
        "lokr-w2": lambda: LoKr(**w1_pair, **w2),
        "lokr-both": lambda: LoKr(**w1_pair, **w2_pair),
        "lokr-tucker": lambda: LoKr(**w1, **tucker),
    }
    return made[kind]()


def with_dora(module, rng):
    weight = rng.standard_normal(module.factors.shape)
    merged = weight + module.scale * module.factors.product()(0, OUT)
    base_norm, merged_norm = (np.linalg.norm(each, axis=1).astype(np.float32) for each in (weight, merged))
    trained = (base_norm * (1 + 0.05 * rng.standard_normal(OUT))).astype(np.float32)
    return replace(module, dora=RowScale(trained, base_norm, merged_norm))


def lora(*modules, family="ideogram4", unread=()):
    return LoraFile(family, {module.name: module for module in modules}, unread=unread)


@st.composite
def loras(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    stored = draw(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]))
    modules = []
    for index in range(draw(st.integers(1, 4))):
        kind, rank = draw(st.sampled_from(KINDS)), draw(st.integers(1, 6))
        module = LoraModule(
            f"layers.{index}.attention.qkv", factors_of(kind, rng, rank, stored), draw(st.floats(0.01, 50))
        )
        modules.append(with_dora(module, rng) if draw(st.booleans()) else module)
    return lora(*modules)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("lora") / "x.safetensors"


@given(loras(), st.sampled_from(["bf16", "fp16", "fp32"]))
@settings(max_examples=150, deadline=None)
def test_what_is_written_reads_back_as_the_same_change(path, source, dtype):
    COMFY.write(source, path, dtype, {})
    back = COMFY.read(path)
    proof = prove(source, back)
    assert proof.ok, proof.to_json()
    assert back.family == "ideogram4"


@given(loras(), st.sampled_from(["bf16", "fp16", "fp32"]), st.data())
@settings(max_examples=100, deadline=None)
def test_a_file_changed_after_writing_is_caught(path, source, dtype, data):
    COMFY.write(source, path, dtype, {})
    back = COMFY.read(path)
    name = data.draw(st.sampled_from(sorted(back.modules)))
    module = back.modules[name]
    fault = data.draw(st.sampled_from(["scale", "missing", "factor"]))
    if fault == "missing":
        rest = [each for each in back.modules.values() if each.name != name]
        changed = [*rest, replace(module, name="elsewhere")]
    elif fault == "scale":
        # Twice the tolerance, since the rounding already in the file may point the other way.
        changed = [
            replace(each, scale=each.scale * 1.02) if each.name == name else each for each in back.modules.values()
        ]
    else:
        field = data.draw(st.sampled_from(sorted(module.factors.arrays())))
        array = module.factors.arrays()[field].copy()
        array.flat[0] += array.dtype.type(1)
        changed = [
            replace(each, factors=replace(each.factors, **{field: array})) if each.name == name else each
            for each in back.modules.values()
        ]
    assert not prove(source, lora(*changed)).ok


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_factors_have_the_asked_dtype_and_alpha_is_scale_times_rank_in_fp32(path, dtype):
    factors = factors_of("lora", np.random.default_rng(0), rank=3)
    COMFY.write(lora(LoraModule("layers.0.attention.o", factors, 0.7)), path, dtype, {"title": "x"})
    tensors = read_tensors(path)
    prefix = "diffusion_model.layers.0.attention.o"
    assert set(tensors) == {f"{prefix}.lora_up.weight", f"{prefix}.lora_down.weight", f"{prefix}.alpha"}
    assert tensors[f"{prefix}.lora_up.weight"].dtype == NUMPY[dtype]
    assert tensors[f"{prefix}.alpha"].dtype == np.float32
    assert tensors[f"{prefix}.alpha"].shape == ()
    assert float(tensors[f"{prefix}.alpha"]) == np.float32(0.7 * 3)
    assert tensors.metadata == {"title": "x", "format": "pt", "loraport.family": "ideogram4"}


@pytest.mark.parametrize("kind", [kind for kind in FACTORED if kind != "lokr-tucker"])
def test_factors_in_the_source_dtype_are_written_untouched(path, kind):
    factors = factors_of(kind, np.random.default_rng(1), dtype=ml_dtypes.bfloat16)
    COMFY.write(lora(LoraModule("m", factors, 0.3)), path, "bf16", {})
    back = COMFY.read(path).modules["m"].factors.arrays()
    assert {name: array.tobytes() for name, array in factors.arrays().items()} == {
        name: array.tobytes() for name, array in back.items()
    }


def test_the_core_of_a_lokr_is_multiplied_out_since_comfyui_fails_on_it(path):
    factors = factors_of("lokr-tucker", np.random.default_rng(21))
    source = lora(LoraModule("m", factors, 0.3))
    COMFY.write(source, path, None, {})
    assert set(read_tensors(path)) == {"diffusion_model.m.lokr_w1", "diffusion_model.m.lokr_w2"}
    assert read_tensors(path).shapes["diffusion_model.m.lokr_w2"] == (12, 10, 3, 3)
    assert prove(source, COMFY.read(path)).worst.difference < 1e-6


def test_a_lokr_with_both_factors_direct_has_its_scale_folded_in_fp32(path):
    rng = np.random.default_rng(2)
    w1, w2 = (rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for shape in [(2, 3), (4, 5)])
    factors = LoKr(w1=w1, w2=w2)
    source = lora(LoraModule("m", factors, 0.3))
    COMFY.write(source, path, "bf16", {})
    tensors = read_tensors(path)
    assert "diffusion_model.m.alpha" not in tensors
    assert tensors["diffusion_model.m.lokr_w1"].dtype == np.float32
    assert tensors["diffusion_model.m.lokr_w2"].dtype == ml_dtypes.bfloat16
    assert prove(source, COMFY.read(path)).worst.difference < 1e-7


def test_the_alpha_of_a_direct_lokr_is_not_looked_at(path):
    factors = factors_of("lokr", np.random.default_rng(3))
    stored = {f"diffusion_model.m.lokr_{name}": array for name, array in factors.arrays().items()}
    write_tensors(path, {**stored, "diffusion_model.m.alpha": np.array(9999999999, np.float32)}, {})
    back = COMFY.read(path)
    assert back.modules["m"].scale == 1.0
    assert back.unread == ()


def test_the_rank_of_a_twice_factored_lokr_is_that_of_w2(path):
    rng = np.random.default_rng(4)
    w1 = {"w1_a": rng.random((3, 1)), "w1_b": rng.random((1, 2))}
    factors = LoKr(**w1, w2_a=rng.random((4, 2)), w2_b=rng.random((2, 4)))
    COMFY.write(lora(LoraModule("m", factors, 3.0)), path, "fp32", {})
    assert float(read_tensors(path)["diffusion_model.m.alpha"]) == 6.0


def test_a_number_too_large_for_fp16_says_to_use_bf16(path):
    factors = LowRank(down=np.full((1, 2), 1e5, np.float32), up=np.ones((2, 1), np.float32))
    source = lora(LoraModule("layers.1.attention.o", factors, 1.0))
    with pytest.raises(DataError, match=r"layers\.1\.attention\.o: down holds 1e\+05.*\n.*bf16"):
        COMFY.write(source, path, "fp16", {})
    COMFY.write(source, path, "bf16", {})
    assert prove(source, COMFY.read(path)).ok


def test_an_unknown_dtype_offers_the_nearest(path):
    source = lora(LoraModule("m", factors_of("lora", np.random.default_rng(5)), 1.0))
    with pytest.raises(DataError, match="Did you mean 'fp16'"):
        COMFY.write(source, path, "pf16", {})


def test_a_dora_magnitude_is_rescaled_to_the_norm_that_comfyui_divides_by(path):
    rng = np.random.default_rng(6)
    module = with_dora(LoraModule("m", factors_of("lora", rng), 2.0), rng)
    COMFY.write(lora(module), path, "bf16", {})
    stored = read_tensors(path)["diffusion_model.m.dora_scale"]
    assert (stored.shape, stored.dtype) == ((OUT, 1), np.float32)
    expected = module.dora.trained * (module.dora.base_norm / module.dora.merged_norm)
    np.testing.assert_allclose(stored[:, 0], expected, rtol=1e-6)


def test_a_dora_without_norms_cannot_be_written_but_one_from_comfyui_can(path):
    module = LoraModule("m", factors_of("lora", np.random.default_rng(7)), 1.0, RowScale(np.ones(OUT)))
    with pytest.raises(DataError, match="base model"):
        COMFY.write(lora(module), path, "bf16", {})
    COMFY.write(lora(replace(module, dora=RowScale(np.full(OUT, 1.5), divisor="base"))), path, "bf16", {})
    np.testing.assert_array_equal(COMFY.read(path).modules["m"].dora.trained, np.full(OUT, 1.5))


@pytest.mark.parametrize("shape", [(OUT,), (IN,), (1, OUT), (IN, 1)])
def test_a_dora_scale_that_comfyui_would_apply_wrongly_is_refused(path, shape):
    factors = factors_of("lora", np.random.default_rng(8))
    stored = {"lora_up.weight": factors.up, "lora_down.weight": factors.down, "dora_scale": np.ones(shape)}
    write_tensors(path, {f"diffusion_model.m.{suffix}": array for suffix, array in stored.items()}, {})
    with pytest.raises(DataError, match="dora_scale has shape"):
        COMFY.read(path)


@pytest.mark.parametrize(
    ("up", "down"),
    [
        (".lora_up.weight", ".lora_down.weight"),
        (".lora_B.weight", ".lora_A.weight"),
        (".lora_B.default.weight", ".lora_A.default.weight"),
        (".lora.up.weight", ".lora.down.weight"),
        ("_lora.up.weight", "_lora.down.weight"),
        (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
        (".lora_B", ".lora_A"),
    ],
)
def test_every_suffix_that_comfyui_takes_is_read_with_scale_one_where_alpha_is_absent(path, up, down):
    factors = factors_of("lora", np.random.default_rng(9))
    write_tensors(path, {f"diffusion_model.m{up}": factors.up, f"diffusion_model.m{down}": factors.down}, {})
    back = COMFY.read(path)
    assert back.modules["m"].scale == 1.0
    assert back.unread == ()
    assert prove(lora(LoraModule("m", factors, 1.0)), back).ok


def test_keys_that_comfyui_does_not_apply_are_reported(path):
    factors = factors_of("lora", np.random.default_rng(10))
    COMFY.write(lora(LoraModule("m", factors, 1.0)), path, "fp32", {})
    odd = {
        "transformer.m.lora_A.weight": factors.down,
        "diffusion_model.m.lora_magnitude_vector": np.ones(OUT),
        "diffusion_model.alone.alpha": np.ones(()),
    }
    write_tensors(path, {**read_tensors(path), **odd}, {})
    assert set(COMFY.read(path).unread) == set(odd)


def test_of_two_pairs_under_one_name_only_the_one_comfyui_takes_is_read(path):
    first, second = (factors_of("lora", np.random.default_rng(seed)) for seed in (11, 12))
    stored = {"lora_A.weight": second.down, "lora_B.weight": second.up}
    stored |= {"lora_up.weight": first.up, "lora_down.weight": first.down}
    write_tensors(path, {f"diffusion_model.m.{suffix}": array for suffix, array in stored.items()}, {})
    back = COMFY.read(path)
    np.testing.assert_array_equal(back.modules["m"].factors.up, first.up)
    assert set(back.unread) == {"diffusion_model.m.lora_A.weight", "diffusion_model.m.lora_B.weight"}


@pytest.mark.parametrize("lost", ["lora_up.weight", "lora_down.weight"])
def test_a_missing_half_is_named(path, lost):
    COMFY.write(lora(LoraModule("m", factors_of("lora", np.random.default_rng(13)), 1.0)), path, "fp32", {})
    kept = {name: array for name, array in read_tensors(path).items() if not name.endswith(lost)}
    write_tensors(path, kept, {})
    with pytest.raises(DataError, match=rf"m\.{lost} is missing"):
        COMFY.read(path)


@pytest.mark.parametrize(
    "stored",
    [
        {"lokr_w1": np.ones((3, 2)), "dora_scale": np.ones((12, 1))},
        {"lokr_w1_a": np.ones((3, 2)), "lokr_w2": np.ones((4, 4)), "alpha": np.ones(())},
        {"lora_up.weight": np.ones((4, 0)), "lora_down.weight": np.ones((0, 4)), "alpha": np.ones(())},
        {"lora_up.weight": np.ones(()), "lora_down.weight": np.ones(()), "alpha": np.ones(())},
        {"hada_w1_a": np.ones((4, 2)), "hada_w1_b": np.ones((2, 4))},
    ],
)
def test_a_module_that_is_not_whole_is_named(path, stored):
    write_tensors(path, {f"diffusion_model.layers.7.m.{suffix}": array for suffix, array in stored.items()}, {})
    with pytest.raises(DataError, match=r"layers\.7\.m"):
        COMFY.read(path)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_file_is_refused_or_read_but_never_crashes(path, data):
    COMFY.write(lora(LoraModule("m", factors_of("lora", np.random.default_rng(0)), 1.0)), path, "fp32", {"k": "v"})
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))])
    with contextlib.suppress(DataError):
        COMFY.read(path)


def test_numbers_that_vanish_in_fp16_fail_the_proof(path):
    factors = factors_of("lora", np.random.default_rng(16))
    source = lora(LoraModule("m", replace(factors, up=factors.up * 1e-6), 1.0))
    COMFY.write(source, path, "fp16", {})
    assert not prove(source, COMFY.read(path)).ok
    COMFY.write(source, path, "bf16", {})
    assert prove(source, COMFY.read(path)).ok


def test_an_alpha_of_several_numbers_is_refused(path):
    factors = factors_of("lora", np.random.default_rng(14))
    stored = {"lora_up.weight": factors.up, "lora_down.weight": factors.down, "alpha": np.ones(2)}
    write_tensors(path, {f"diffusion_model.m.{suffix}": array for suffix, array in stored.items()}, {})
    with pytest.raises(DataError, match="alpha must be one number"):
        COMFY.read(path)


def test_a_core_that_does_not_fit_is_named(path):
    factors = factors_of("tucker", np.random.default_rng(15))
    stored = {"lora_up.weight": factors.up, "lora_down.weight": factors.down, "lora_mid.weight": factors.mid[:1]}
    write_tensors(path, {f"diffusion_model.m.{suffix}": array for suffix, array in stored.items()}, {})
    with pytest.raises(DataError, match="core"):
        COMFY.read(path)


@pytest.mark.parametrize("shape", [(1, IN), (1, IN, 1, 1)])
def test_a_dora_by_column_is_kept_as_it_is(path, shape):
    rng = np.random.default_rng(18)
    factors = factors_of("lora" if len(shape) == 2 else "tucker", rng)
    source = lora(LoraModule("m", factors, 0.5, ColumnScale(rng.random(IN).astype(np.float32), len(shape))))
    COMFY.write(source, path, None, {})
    assert read_tensors(path)["diffusion_model.m.dora_scale"].shape == shape
    assert prove(source, COMFY.read(path)).ok
    other = ColumnScale(source.modules["m"].dora.trained * 1.1, len(shape))
    assert not prove(source, lora(replace(source.modules["m"], dora=other))).ok
    assert not prove(source, lora(replace(source.modules["m"], dora=None))).ok


@pytest.mark.parametrize("kind", ["conv", "tucker", "lokr-tucker"])
def test_the_dora_of_a_convolution_has_the_axes_of_its_weight(path, kind):
    rng = np.random.default_rng(19)
    module = with_dora(LoraModule("m", factors_of(kind, rng), 2.0), rng)
    COMFY.write(lora(replace(module, dora=replace(module.dora, axes=4))), path, None, {})
    assert read_tensors(path)["diffusion_model.m.dora_scale"].shape == (OUT, 1, 1, 1)


def kept_as_they_are():
    rng = np.random.default_rng(20)
    return {
        "OFT": {".oft_blocks": rng.random((12, 12, 12)), ".alpha": np.zeros(())},
        "BOFT": {".oft_blocks": rng.random((2, 12, 12, 12)), ".rescale": rng.random((OUT, 1)), ".alpha": np.zeros(())},
        "GLoRA": {
            ".a1.weight": rng.random((IN, 2)),
            ".a2.weight": rng.random((2, IN)),
            ".b1.weight": rng.random((OUT, 2)),
            ".b2.weight": rng.random((2, IN)),
            ".alpha": np.ones(()),
        },
    }


@pytest.mark.parametrize("kind", ["OFT", "BOFT", "GLoRA"])
def test_what_only_the_base_weights_complete_is_kept_bit_for_bit(tmp_path, kind):
    first, path = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    stored = {f"diffusion_model.m{ending}": array for ending, array in kept_as_they_are()[kind].items()}
    write_tensors(first, stored, {})
    source = COMFY.read(first)
    COMFY.write(source, path, "bf16", {})
    assert {key: array.tobytes() for key, array in read_tensors(path).items()} == {
        key: array.tobytes() for key, array in stored.items()
    }
    assert prove(source, COMFY.read(path)).ok
    name = next(iter(stored))
    write_tensors(path, {**stored, name: stored[name] + 1e-9}, {})
    assert not prove(source, COMFY.read(path)).ok


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("OFT", {".rescale": np.ones((OUT, 1))}, "rescale"),
        ("OFT", {".alpha": np.ones(())}, "constraint"),
        ("BOFT", {".alpha": None}, "without alpha"),
        ("OFT", {".oft_blocks": np.ones((12, 12))}, "square blocks"),
        ("OFT", {".oft_blocks": np.ones((0, 4, 4))}, "empty"),
        ("GLoRA", {".b1.weight": np.ones(OUT)}, "fewer than two axes"),
        ("GLoRA", {".b2.weight": None}, "missing"),
    ],
)
def test_what_is_damaged_or_comfyui_would_compute_otherwise_is_refused_with_the_reason(path, kind, change, reason):
    tensors = {**kept_as_they_are()[kind], **change}
    stored = {f"diffusion_model.m{ending}": array for ending, array in tensors.items() if array is not None}
    write_tensors(path, stored, {})
    with pytest.raises(DataError, match=reason):
        COMFY.read(path).modules["m"]


def test_detection_counts_the_keys_it_would_read():
    native = ["diffusion_model.m.lora_A.weight", "diffusion_model.m.lora_B.weight"]
    assert COMFY.detect(native, {}, {}) == 1.0
    assert COMFY.detect([*native, "transformer.m.lora_A.weight", "diffusion_model.m.odd"], {}, {}) == 0.5
    assert COMFY.detect(["layers.0.attention.qkv.lora_A.default.weight"], {}, {}) == 0.0
    assert COMFY.detect([], {}, {}) == 0.0


def test_it_is_a_dialect_that_can_be_written():
    assert isinstance(COMFY, WritableDialect)
