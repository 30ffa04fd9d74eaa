"""What the adapter says SimpleTuner does with each field."""

from __future__ import annotations

from typing import Any

import pytest

from loraport.planning import Kind, Verdict
from loraport.spec.models import leaf_fields
from loraport_simpletuner.capabilities import verdicts

OLD = {"backend": {"options": {"version": "4.8.0"}}}


def by_path(spec: Any) -> dict[str, Verdict]:
    return {verdict.path: verdict for verdict in verdicts(spec)}


def test_every_field_is_judged_in_order_and_a_plain_spec_is_done_exactly(make_spec) -> None:
    found = verdicts(make_spec(dataset={"upscale": True}, memory={"quantize": "fp8", "text_encoder": "fp8"}))
    assert [verdict.path for verdict in found] == list(leaf_fields())
    assert [verdict for verdict in found if verdict.kind is not Kind.EXACT] == []


@pytest.mark.parametrize(
    ("changes", "path", "kind", "reason"),
    [
        ({"model": {"checkpoint": "tiny"}}, "model.checkpoint", Kind.REFUSED, "its sizes in its code"),
        ({"memory": {"quantize": "nf4"}}, "model.checkpoint", Kind.APPROXIMATED, "ideogram-4-nf4"),
        ({"model": {"revision": "v2"}}, "model.revision", Kind.REFUSED, "main branch"),
        ({"model": {"dtype": "fp16"}}, "model.dtype", Kind.REFUSED, "bf16"),
        ({"model": {"checkpoint": "/m"}, "memory": {"quantize": "nf4"}}, "memory.storage", Kind.REFUSED, "nf4"),
        (
            {"model": {"checkpoint": "/m"}, "memory": {"quantize": "fp8"}},
            "memory.storage",
            Kind.APPROXIMATED,
            "fp8wo-t",
        ),
        ({"memory": {"quantize": "none"}}, "memory.storage", Kind.EXACT, "unpacked"),
        ({"memory": {"quantize": "int8"}}, "memory.storage", Kind.APPROXIMATED, "int8-torchao"),
        ({"memory": {"offload": "group"}, **OLD}, "memory.offload", Kind.APPROXIMATED, "diffusers' group offloading"),
        ({"memory": {"quantize": "fp8-dynamic"}}, "memory.compute", Kind.APPROXIMATED, "backward in model.dtype"),
        ({"memory": {"quantize": "nf4"}}, "memory.text_encoder", Kind.DEFAULTED, "nf4"),
        ({"memory": {"gradient_checkpointing": "auto"}}, "memory.gradient_checkpointing", Kind.APPROXIMATED, "full"),
        ({"dataset": {"upscale": False}}, "dataset.upscale", Kind.APPROXIMATED, "enlarged"),
        ({"dataset": {"resolution": 720}}, "dataset.resolution", Kind.APPROXIMATED, "768"),
        ({"dataset": {"resolution": 720, "aspect_buckets": False}}, "dataset.resolution", Kind.EXACT, ""),
        ({"dataset": {"max_text_tokens": 512}}, "dataset.max_text_tokens", Kind.DEFAULTED, "2048"),
        ({"train": {"batch_size": 2, "gradient_accumulation": 3}}, "dataset.repeats", Kind.APPROXIMATED, "6 times"),
        ({"train": {"batch_size": 2}, "dataset": {"repeats": 2}}, "dataset.repeats", Kind.EXACT, ""),
        ({"dataset": {"regularization": {"path": "/r"}}}, "dataset.regularization.path", Kind.APPROXIMATED, "size"),
        (
            {"dataset": {"regularization": {"path": "/r", "weight": 0.5}}},
            "dataset.regularization.weight",
            Kind.REFUSED,
            "set it to 1",
        ),
        ({"lora": {"rslora": True}}, "lora.rslora", Kind.APPROXIMATED, "same scale"),
        ({"lora": {"dora": True}}, "lora.dora", Kind.REFUSED, "native"),
        ({"lora": {"type": "lokr", "alpha": 0.5}}, "lora.alpha", Kind.REFUSED, "whole numbers"),
        ({"lora": {"type": "loha", "dropout": 0.1}}, "lora.dropout", Kind.REFUSED, "set it to 0"),
        ({"lora": {"targets": ["nothing"]}}, "lora.targets", Kind.REFUSED, "no module"),
        ({"lora": {"factor": 4}}, "lora.factor", Kind.IGNORED, "lokr"),
        ({"train": {"seed": 0}}, "train.seed", Kind.APPROXIMATED, "clock"),
        ({"train": {"seed": 2**40 + 5}}, "train.seed", Kind.APPROXIMATED, "5 instead"),
        ({"train": {"ema_decay": 0.9}}, "train.ema_decay", Kind.REFUSED, "plain weights"),
        (
            {"train": {"lr_scheduler": "cosine", "warmup_steps": 5}},
            "train.warmup_steps",
            Kind.IGNORED,
            "lr_warmup_steps",
        ),
        ({"train": {"lr_scheduler": "cosine_with_restarts"}}, "train.lr_scheduler", Kind.APPROXIMATED, "restarts"),
        ({"train": {"optimizer": "prodigy"}}, "train.optimizer", Kind.APPROXIMATED, "schedule-free"),
        ({"sample": {"every": 5, "prompts": ["x"]}}, "sample.every", Kind.APPROXIMATED, "17 GB"),
        ({"sample": {"every": 5, "prompts": ["x", "y"]}}, "sample.prompts", Kind.APPROXIMATED, "only the first"),
        ({"sample": {"every": 5, "prompts": ["x"]}}, "sample.guidance", Kind.APPROXIMATED, "unconditional"),
        ({"sample": {"every": 5, "prompts": ["x"], "seed": 2**40}}, "sample.seed", Kind.APPROXIMATED, "32 bits"),
        ({"validation": {"every": 5}}, "validation.every", Kind.APPROXIMATED, "own evaluation"),
        ({"backend": {"options": {"verison": "4.9"}}}, "backend.options", Kind.REFUSED, "verison"),
        ({"backend": {"options": {"version": "3.1"}}}, "backend.options", Kind.REFUSED, "4.8"),
        ({"backend": {"options": {"version": "latest"}}}, "backend.options", Kind.REFUSED, "4.8"),
        (
            {"backend": {"options": {"config": {"vae_batch_size": 1}}}},
            "backend.options",
            Kind.APPROXIMATED,
            "vae_batch_size",
        ),
        ({"backend": {"options": {"version": "4.9.0"}}}, "backend.options", Kind.EXACT, "portable"),
    ],
)
def test_what_it_does_otherwise_it_says(make_spec, changes: dict[str, Any], path: str, kind: Kind, reason: str) -> None:
    verdict = by_path(make_spec(**changes))[path]
    assert verdict.kind is kind, verdict.reason
    assert reason in verdict.reason


SETS = [
    {"path": "/a", "weight": 2, "caption_dropout": 0.1},
    {"path": "hub:me/b", "weight": 1, "resolution": 720, "trigger_word": "x", "caption_dropout": 0.1},
    {"path": "/c", "weight": 1, "regularization": True, "caption_dropout": 0.1},
]


@pytest.mark.parametrize(
    ("changed", "path", "kind", "reason"),
    [
        ({}, "dataset.sets", Kind.APPROXIMATED, "no step mixes sets"),
        ({}, "dataset.sets[0].path", Kind.EXACT, "staged"),
        ({}, "dataset.sets[1].trigger_word", Kind.EXACT, "staged"),
        ({}, "dataset.sets[0].weight", Kind.APPROXIMATED, "probability"),
        ({}, "dataset.sets[1].resolution", Kind.APPROXIMATED, "768"),
        ({}, "dataset.sets[2].regularization", Kind.EXACT, "not is_regularisation_data"),
        ({}, "dataset.sets[2].caption_dropout", Kind.EXACT, "caption_dropout_probability"),
        ({"caption_dropout": 0.5}, "dataset.sets[2].caption_dropout", Kind.DEFAULTED, "0: SimpleTuner has one share"),
        ({"loss_weight": 0.5}, "dataset.sets[2].loss_weight", Kind.REFUSED, "set it to 1"),
    ],
)
def test_what_each_set_says_is_judged(make_spec, changed: dict[str, Any], path: str, kind: Kind, reason: str) -> None:
    spec = make_spec(dataset={"path": None, "sets": [*SETS[:2], SETS[2] | changed]})
    verdict = by_path(spec)[path]
    assert verdict.kind is kind, verdict.reason
    assert reason in verdict.reason


def test_repeats_of_a_set_fill_a_step_as_those_of_one_folder_do(make_spec) -> None:
    sets = [{"path": "/a", "repeats": 2}, {"path": "/b", "repeats": 5}]
    found = by_path(make_spec(dataset={"path": None, "sets": sets}, train={"batch_size": 4}))
    assert found["dataset.sets[0].repeats"].kind is Kind.APPROXIMATED
    assert found["dataset.sets[1].repeats"].kind is Kind.EXACT
