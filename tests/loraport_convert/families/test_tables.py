"""Every Linear and convolution of every family has one place in the native model, and the way back is the same."""

import family_models as models
import pytest
from family_models import layout, modules, natives

from loraport.errors import DataError
from loraport_convert.families import FAMILIES
from loraport_convert.families.detect import detect_family
from loraport_convert.families.rules import cuts

pytest.importorskip("diffusers")


@pytest.mark.parametrize("model", models.CONFIGS)
def test_every_module_fills_its_own_rows_of_a_native_one_without_gap_or_overlap(model):
    for native, rows in layout(model).items():
        assert rows[0][0] == 0, native
        assert [row[1] for row in rows] == [row[0] for row in rows[1:]] + [rows[0][5]], native
        assert len({row[5] for row in rows}) == 1, native


@pytest.mark.parametrize("model", models.CONFIGS)
def test_the_way_back_to_diffusers_is_the_inverse(model):
    family, shapes = FAMILIES[models.family_of(model)], modules(model)
    for native, rows in layout(model).items():
        size = (rows[0][5], shapes[rows[0][2]][1])
        spans = family.diffusers(native, size)
        back = []
        for span, (start, stop) in zip(spans, cuts(spans, size[0]), strict=True):
            first = (stop - start) // span.count * span.first
            back.append((start, stop, span.module, first, first + stop - start, size[0]))
        assert back == rows


@pytest.mark.parametrize("model", models.CONFIGS)
def test_names_with_underscores_for_dots_mean_the_same_modules(model):
    family, shapes = FAMILIES[models.family_of(model)], modules(model)
    for name, shape in {**shapes, **natives(model)}.items():
        assert family.native(name.replace(".", "_"), shape, flat=True) == family.native(name, shape)


@pytest.mark.parametrize("model", models.CONFIGS)
def test_the_family_is_recognised_by_all_modules_by_attention_alone_and_by_native_names(model):
    family, shapes = models.family_of(model), modules(model)
    attention = {name: shape for name, shape in shapes.items() if "to_q" in name or "to_out" in name}
    for names in (shapes, attention, natives(model)):
        for flat in (False, True):
            named = {(name.replace(".", "_") if flat else name, flat): shape for name, shape in names.items()}
            assert detect_family(named).name == family


@pytest.mark.parametrize("model", models.CONFIGS)
def test_every_norm_has_one_native_name_and_the_way_back_is_the_same(model):
    family = FAMILIES[models.family_of(model)]
    found = {}
    for name in models.norms(model):
        (span,) = family.native(name)
        assert family.native(name.replace(".", "_"), None, flat=True) == (span,)
        (back,) = family.diffusers(span.module)
        assert (back.module, span.whole, back.whole) == (name, True, True)
        assert not family.is_matrix(span.module)
        found[span.module] = name
    assert len(found) == len(models.norms(model))


@pytest.mark.parametrize("model", models.CONFIGS)
def test_the_modules_said_to_have_a_bias_are_those_that_have_one(model):
    family, named = FAMILIES[models.family_of(model)], dict(models.build(model).named_modules())
    for native, rows in layout(model).items():
        assert family.has_bias(native) == (named[rows[0][2]].bias is not None), native
        assert family.is_matrix(native)
    for name, has_bias in models.norms(model).items():
        (span,) = family.native(name)
        assert family.has_bias(span.module) == has_bias, span.module


@pytest.mark.parametrize("model", models.CONFIGS)
def test_the_widths_that_tell_families_apart_are_those_of_the_models(model):
    known = FAMILIES[models.family_of(model)].columns
    assert {columns for _, columns in modules(model).values()} <= known


def test_names_of_no_family_are_of_none():
    assert detect_family({("some.module", False): (8, 8)}) is None
    assert detect_family({}) is None


def test_a_family_is_not_guessed_where_the_names_mean_different_modules():
    ambiguous = {("layers.0.attention.to_out.0", False): (32, 32)}
    with pytest.raises(DataError, match="ideogram4 or z-image"):
        detect_family(ambiguous)
