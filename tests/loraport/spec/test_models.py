"""The spec's models: every field explained and bounded, every spec the same after writing and reading."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from loraport.spec.load import build_spec
from loraport.spec.models import ImageSetSection, Section, TrainSpec, leaf_fields, set_fields, value_at
from loraport.spec.yaml_text import parse_yaml

MINIMAL: dict[str, Any] = {"name": "a", "model": {"checkpoint": "tiny"}, "dataset": {"path": "/a"}}


def sections(section: type[Section] = TrainSpec) -> list[type[Section]]:
    found = [section, *([ImageSetSection] if section is TrainSpec else [])]
    for info in section.model_fields.values():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            found += sections(info.annotation)
    return found


@pytest.mark.parametrize("section", sections())
def test_every_section_and_field_is_described(section: type[Section]) -> None:
    assert section.__doc__
    assert section.__doc__ != Section.__doc__
    for name, info in section.model_fields.items():
        assert info.description, f"{section.__name__}.{name}"
        assert info.description.endswith("."), f"{section.__name__}.{name}"


def _numeric(annotation: Any) -> bool:
    parts = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return int in parts or float in parts


@pytest.mark.parametrize("path", [path for path, info in leaf_fields().items() if _numeric(info.annotation)])
def test_every_number_has_a_lower_bound_and_refuses_what_is_under_it(path: str) -> None:
    lower = [
        (getattr(constraint, "ge", None), getattr(constraint, "gt", None))
        for constraint in leaf_fields()[path].metadata
    ]
    bounds = [bound for pair in lower for bound in pair if bound is not None]
    assert bounds, path
    with pytest.raises(ValidationError):
        TrainSpec.model_validate(_with(path, bounds[0] - 16))


def _with(path: str, value: Any) -> dict[str, Any]:
    content: dict[str, Any] = {key: dict(part) if isinstance(part, dict) else part for key, part in MINIMAL.items()}
    *parents, last = path.split(".")
    mapping = content
    for part in parents:
        mapping = mapping.setdefault(part, {})
    mapping[last] = value
    return content


def test_a_spec_cannot_be_changed_in_place() -> None:
    spec = TrainSpec.model_validate(MINIMAL)
    with pytest.raises(ValidationError):
        spec.train.steps = 5  # type: ignore[misc]


def test_leaf_fields_are_all_values_and_no_sections() -> None:
    spec = TrainSpec.model_validate(MINIMAL)
    paths = list(leaf_fields())
    assert len(paths) == len(set(paths))
    assert "dataset.regularization.path" in paths
    assert not any(isinstance(value_at(spec, path), Section) for path in paths)


_word = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12) | st.sampled_from(
    ["1e-4", "12e4567", "1_000", "on", "16:9", "~", "tiny", "0x1", " a ", "a\nb", "\ufeffx", "\x85"]
)
_name = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,30}", fullmatch=True) | st.sampled_from(["1e5", "007", "true"])
_path = _word.map(lambda word: "/data/" + word)
_options = st.dictionaries(
    _word,
    st.recursive(_word | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans(), st.lists),
    max_size=3,
)
_set = st.fixed_dictionaries(
    {"path": _path},
    optional={
        "repeats": st.integers(1, 99),
        "resolution": st.integers(4, 256).map(lambda n: 16 * n),
        "caption_field": _word,
        "flip": st.booleans(),
        "loss_weight": st.floats(0.001, 100),
    },
)
_specs = st.fixed_dictionaries(
    {
        "name": _name,
        "model": st.fixed_dictionaries(
            {"checkpoint": st.sampled_from(["tiny", "org/name", "/models/a"])},
            optional={"revision": _word, "dtype": st.sampled_from(["bf16", "fp32"])},
        ),
        "dataset": st.fixed_dictionaries(
            {"sets": st.lists(_set, min_size=1, max_size=3, unique_by=lambda one: one["path"])},
            optional={"caption_dropout": st.floats(0, 1), "trigger_word": _word},
        )
        | st.fixed_dictionaries(
            {"path": _path},
            optional={
                "trigger_word": _word,
                "default_caption": _word,
                "resolution": st.integers(4, 256).map(lambda n: 16 * n),
                "caption_dropout": st.floats(0, 1),
                "regularization": st.fixed_dictionaries({"path": _path, "weight": st.floats(0, 100)}),
            },
        ),
        "lora": st.fixed_dictionaries(
            {},
            optional={
                "rank": st.integers(1, 1024),
                "alpha": st.floats(1e-6, 1e6),
                "targets": _word | st.lists(st.sampled_from([r"layers\.\d+", "a|b", "[0-9]+"]), min_size=1),
            },
        ),
        "train": st.fixed_dictionaries(
            {}, optional={"learning_rate": st.floats(1e-12, 10), "steps": st.integers(1, 10**7)}
        ),
        "sample": st.fixed_dictionaries({}, optional={"prompts": st.lists(_word, max_size=3)}),
        "backend": st.fixed_dictionaries({}, optional={"name": _word, "options": _options}),
    }
)


@settings(deadline=None, max_examples=60)
@given(_specs)
def test_a_spec_is_the_same_after_writing_and_reading(content: dict[str, Any]) -> None:
    spec = build_spec(content, base=Path("/base"), origin="generated").spec
    read = build_spec(parse_yaml(spec.to_yaml(), "written"), base=Path("/elsewhere"), origin="written").spec
    assert read == spec
    assert read.hash() == spec.hash()


def test_the_hash_looks_at_content_and_not_at_how_it_is_written() -> None:
    one = TrainSpec.model_validate({**MINIMAL, "train": {"steps": 5, "seed": 1}, "save": {"every": 250}})
    other = TrainSpec.model_validate(
        {"train": {"seed": 1, "steps": 5.0}, "dataset": {"path": "/a"}, "model": {"checkpoint": "tiny"}, "name": "a"}
    )
    assert one.hash() == other.hash()
    assert len(one.hash()) == 64
    assert one.hash() != TrainSpec.model_validate({**MINIMAL, "train": {"steps": 6, "seed": 1}}).hash()


def test_the_order_of_backend_options_does_not_change_the_hash() -> None:
    first = TrainSpec.model_validate({**MINIMAL, "backend": {"options": {"b": 1, "a": {"d": 1, "c": 2}}}})
    second = TrainSpec.model_validate({**MINIMAL, "backend": {"options": {"a": {"c": 2, "d": 1}, "b": 1}}})
    assert first.hash() == second.hash()


def test_the_json_schema_accepts_a_good_spec_and_refuses_bad_ones() -> None:
    validator = jsonschema.Draft202012Validator(TrainSpec.model_json_schema())
    validator.validate({"version": 1, **MINIMAL, "train": {"learning_rate": 1e-4}, "lora": {"targets": ["a"]}})
    validator.validate({**MINIMAL, "sample": {"every": 5, "prompts": "one"}})
    for bad in (
        {**MINIMAL, "trian": {}},
        {**MINIMAL, "train": {"steps": 0}},
        {**MINIMAL, "train": {"stpes": 5}},
        {**MINIMAL, "train": {"optimizer": "adam"}},
        {**MINIMAL, "dataset": {}},
        {**MINIMAL, "dataset": {"sets": [{"resolution": 512}]}},
        {**MINIMAL, "dataset": {"path": "/a", "resolution": 1000}},
        {**MINIMAL, "version": 2},
    ):
        with pytest.raises(jsonschema.ValidationError):
            validator.validate(bad)


@pytest.mark.parametrize(("written", "read"), [(True, "full"), (False, "none"), ("auto", "auto"), (None, None)])
def test_checkpointing_takes_other_trainers_switch_too(written: bool | str | None, read: str | None) -> None:
    content = {**MINIMAL, "memory": {"gradient_checkpointing": written}}
    spec = TrainSpec.model_validate(content)
    assert spec.memory.gradient_checkpointing == read
    jsonschema.Draft202012Validator(TrainSpec.model_json_schema()).validate(content)
    assert TrainSpec.model_validate(spec.model_dump(mode="json")) == spec


def test_one_prompt_may_stand_without_a_list() -> None:
    assert TrainSpec.model_validate({**MINIMAL, "sample": {"prompts": "one"}}).sample.prompts == ["one"]


def test_the_fields_of_sets_are_those_that_they_say_themselves() -> None:
    sets = [{"path": "/a", "resolution": 512}, {"path": "/b", "repeats": 1, "regularization": True}]
    spec = TrainSpec.model_validate({**MINIMAL, "dataset": {"sets": sets}})
    assert set_fields(spec) == [
        "dataset.sets[0].path",
        "dataset.sets[0].resolution",
        "dataset.sets[1].path",
        "dataset.sets[1].repeats",
        "dataset.sets[1].regularization",
    ]
    assert [value_at(spec, path) for path in set_fields(spec)] == [Path("/a"), 512, Path("/b"), 1, True]
    assert set_fields(TrainSpec.model_validate(MINIMAL)) == []
