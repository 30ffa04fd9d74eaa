"""Names people bring from other trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loraport.errors import SpecError
from loraport.spec.aliases import ALIASES
from loraport.spec.load import LoadedSpec, build_spec
from loraport.spec.models import TrainSpec, leaf_fields, value_at

#: A value that is not the default, for each field an alias points to.
VALUES: dict[str, Any] = {
    "model.checkpoint": "org/other",
    "model.family": "another",
    "model.dtype": "fp16",
    "dataset.path": "/pictures",
    "dataset.caption_ext": "txt",
    "dataset.caption_dropout": 0.25,
    "dataset.trigger_word": "word",
    "dataset.repeats": 3,
    "dataset.flip": True,
    "dataset.aspect_buckets": False,
    "dataset.max_text_tokens": 512,
    "lora.rank": 5,
    "lora.alpha": 2.5,
    "lora.dropout": 0.5,
    "lora.rslora": True,
    "lora.dora": True,
    "lora.targets": ["layers.*"],
    "train.learning_rate": 3e-3,
    "train.steps": 17,
    "train.batch_size": 3,
    "train.gpus": 2,
    "train.gradient_accumulation": 6,
    "train.optimizer": "lion",
    "train.warmup_steps": 9,
    "train.lr_cycles": 4,
    "train.lr_scheduler": "cosine",
    "train.max_grad_norm": 0.5,
    "train.seed": 99,
    "memory.quantize": "nf4",
    "memory.gradient_checkpointing": "selective",
    "save.every": 11,
    "save.keep": 2,
    "save.dtype": "fp32",
    "sample.every": 12,
    "sample.guidance": 3.5,
    "sample.steps": 8,
}


def build(target: str, extra: dict[str, Any]) -> LoadedSpec:
    """A spec without `target`, and with `extra` merged in, one section deep."""
    content: dict[str, Any] = {
        "name": "a",
        "model": {"checkpoint": "tiny"},
        "dataset": {"path": "/a"},
        "sample": {"prompts": ["a"]},
    }
    section, name = target.split(".")
    content.get(section, {}).pop(name, None)
    for key, value in extra.items():
        content[key] = {**content.get(key, {}), **value} if isinstance(value, dict) else value
    return build_spec(content, base=Path("/"), origin="spec.yaml")


@pytest.mark.parametrize("alias", ALIASES)
def test_every_alias_is_accepted_at_the_top_and_in_its_section_with_a_notice(alias: str) -> None:
    target = ALIASES[alias]
    section = target.split(".")[0]
    for written, extra in (
        (alias, {alias: VALUES[target]}),
        (f"{section}.{alias}", {section: {alias: VALUES[target]}}),
    ):
        loaded = build(target, extra)
        found = value_at(loaded.spec, target)
        assert (str(found) if isinstance(found, Path) else found) == VALUES[target]
        assert loaded.notices == [f"spec.yaml: read {written} as {target}"]


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_beside_the_field_itself_is_refused(alias: str) -> None:
    target = ALIASES[alias]
    section, name = target.split(".")
    with pytest.raises(SpecError, match=rf"{alias} and {target} are the same field; keep one"):
        build(target, {section: {alias: VALUES[target], name: VALUES[target]}})


def test_two_aliases_of_one_field_are_refused() -> None:
    with pytest.raises(SpecError, match="are the same field"):
        build("lora.rank", {"network_dim": 4, "lora_rank": 8})


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_names_a_field_that_is_there_and_hides_none(alias: str) -> None:
    target = ALIASES[alias]
    assert target in leaf_fields()
    assert alias not in TrainSpec.model_fields
    assert f"{target.split('.')[0]}.{alias}" not in leaf_fields()


def test_an_alias_in_a_foreign_section_is_an_unknown_key_that_names_its_home() -> None:
    with pytest.raises(SpecError, match=r"save\.lr: no such field\. Did you mean train\.learning_rate\?"):
        build("save.every", {"save": {"lr": 1e-3}})


def test_backend_options_keep_their_own_names() -> None:
    loaded = build("lora.rank", {"backend": {"options": {"lr": 1, "network_dim": 2}}})
    assert loaded.spec.backend.options == {"lr": 1, "network_dim": 2}
    assert loaded.notices == []
