"""What DiffSynth is said to do with each field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from loraport.planning import Kind
from loraport.spec.models import TrainSpec, leaf_fields
from loraport_diffsynth.capabilities import verdicts

MakeSpec = Callable[..., TrainSpec]
SCRIPT = {"options": {"script": "/checkout/train.py"}}


def test_every_field_is_judged_in_order(make_spec: MakeSpec) -> None:
    assert [verdict.path for verdict in verdicts(make_spec())] == list(leaf_fields())


def test_a_plain_spec_is_told_of_what_diffsynth_fixes_and_of_nothing_else(make_spec: MakeSpec) -> None:
    not_exact = {verdict.path: verdict.kind for verdict in verdicts(make_spec()) if verdict.kind is not Kind.EXACT}
    assert not_exact == {
        "train.warmup_steps": Kind.DEFAULTED,
        "train.max_grad_norm": Kind.DEFAULTED,
        "train.timestep_mean": Kind.APPROXIMATED,
        "train.timestep_std": Kind.APPROXIMATED,
    }


@pytest.mark.parametrize(
    ("changes", "path", "kind", "word"),
    [
        ({"model": {"dtype": "fp32"}}, "model.dtype", Kind.DEFAULTED, "bf16"),
        ({"model": {"revision": "v1"}}, "model.revision", Kind.IGNORED, "folder"),
        ({"model": {"revision": "v1", "checkpoint": "a/b"}}, "model.revision", Kind.REFUSED, "newest"),
        ({"model": {"family": "flux"}}, "model.family", Kind.REFUSED, "another backend"),
        ({"dataset": {"max_text_tokens": 4096}}, "dataset.max_text_tokens", Kind.DEFAULTED, "2048"),
        ({"dataset": {"max_text_tokens": 512}}, "dataset.max_text_tokens", Kind.EXACT, "by name"),
        ({"dataset": {"max_text_tokens": 512}, "backend": SCRIPT}, "dataset.max_text_tokens", Kind.DEFAULTED, "2048"),
        ({"lora": {"type": "lokr"}}, "lora.type", Kind.REFUSED, "native"),
        ({"lora": {"dora": True}}, "lora.dora", Kind.REFUSED, "native"),
        ({"lora": {"dropout": 0.1}}, "lora.dropout", Kind.DEFAULTED, "0"),
        ({"lora": {"alpha": 4}}, "lora.alpha", Kind.EXACT, "add_lora_to_model"),
        ({"lora": {"alpha": 4}, "backend": SCRIPT}, "lora.alpha", Kind.DEFAULTED, "alpha = rank"),
        ({"lora": {"alpha": 16}, "backend": SCRIPT}, "lora.alpha", Kind.EXACT, "alpha = rank"),
        ({"lora": {"rslora": True}, "backend": SCRIPT}, "lora.rslora", Kind.DEFAULTED, "alpha = rank"),
        ({"lora": {"targets": ["a{1,2}"]}, "backend": SCRIPT}, "lora.targets", Kind.REFUSED, "commas"),
        ({"lora": {"targets": ["a{1,2}"]}}, "lora.targets", Kind.EXACT, "regular expression"),
        ({"lora": {"factor": 4}}, "lora.factor", Kind.IGNORED, "lokr"),
        ({"train": {"batch_size": 4}}, "train.batch_size", Kind.APPROXIMATED, "always 1"),
        ({"train": {"gradient_accumulation": 4}}, "train.gradient_accumulation", Kind.EXACT, "image by image"),
        ({"train": {"optimizer": "adafactor"}}, "train.optimizer", Kind.APPROXIMATED, "torch"),
        ({"train": {"optimizer": "lion"}}, "train.optimizer", Kind.EXACT, "lion_pytorch.Lion"),
        ({"train": {"lr_scheduler": "cosine"}}, "train.lr_scheduler", Kind.DEFAULTED, "constant"),
        ({"train": {"lr_cycles": 2}}, "train.lr_cycles", Kind.IGNORED, "cosine_with_restarts"),
        ({"train": {"max_grad_norm": 0}}, "train.max_grad_norm", Kind.EXACT, "no clipping"),
        ({"train": {"ema_decay": 0.9}}, "train.ema_decay", Kind.DEFAULTED, "0"),
        ({"backend": SCRIPT}, "train.timestep_std", Kind.DEFAULTED, "1024"),
        ({"memory": {"quantize": "nf4"}}, "memory.storage", Kind.EXACT, "two phases"),
        ({"memory": {"offload": "group"}}, "memory.offload", Kind.APPROXIMATED, "single layers"),
        ({"memory": {"compile": "regional"}}, "memory.compile", Kind.DEFAULTED, "none"),
        ({"sample": {"every": 5, "prompts": ["x"]}}, "sample.prompts", Kind.IGNORED, "no samples"),
        ({"sample": {"prompts": ["x"]}}, "sample.every", Kind.EXACT, "not asked"),
        ({"validation": {"every": 5}}, "validation.every", Kind.IGNORED, "held-out"),
        ({"backend": {"options": {"splitt": True}}}, "backend.options", Kind.REFUSED, "split: true or false"),
        ({"backend": {"options": {"split": "yes"}}}, "backend.options", Kind.REFUSED, "split"),
        ({"backend": {"options": {"script": "train.py"}}}, "backend.options", Kind.REFUSED, "script"),
        ({"backend": {"options": {"split": True}}}, "backend.options", Kind.EXACT, "not portable"),
    ],
)
def test_what_it_cannot_do_it_says(
    make_spec: MakeSpec, changes: dict[str, Any], path: str, kind: Kind, word: str
) -> None:
    verdict = next(verdict for verdict in verdicts(make_spec(**changes)) if verdict.path == path)
    assert (verdict.kind, word in verdict.reason) == (kind, True), verdict.reason


def test_a_weight_on_regularisation_images_needs_our_entry(make_spec: MakeSpec) -> None:
    regular = {"dataset": {"regularization": {"path": "/data/cars", "weight": 0.5}}}
    found = [
        next(v.kind for v in verdicts(make_spec(**regular, **more)) if v.path == "dataset.regularization.weight")
        for more in ({}, {"backend": SCRIPT})
    ]
    assert found == [Kind.EXACT, Kind.REFUSED]


def test_a_checkpoint_that_is_stored_quantised_stays_so_and_the_other_one_is_named(make_spec: MakeSpec) -> None:
    def quantize(checkpoint: str, asked: str) -> tuple[Kind, str]:
        spec = make_spec(model={"checkpoint": checkpoint}, memory={"quantize": asked})
        return next((v.kind, v.reason) for v in verdicts(spec) if v.path == "memory.storage")

    assert quantize("ideogram-ai/ideogram-4-fp8", "fp8")[0] is Kind.EXACT
    kind, reason = quantize("ideogram-ai/ideogram-4-fp8", "nf4")
    assert kind is Kind.DEFAULTED
    assert "fp8" in reason
    assert "ideogram-ai/ideogram-4-nf4" in reason


def test_a_checkouts_script_does_not_split_what_is_stored_quantised(make_spec: MakeSpec) -> None:
    def options(**more: Any) -> Kind:
        spec = make_spec(
            model={"checkpoint": "ideogram-ai/ideogram-4-fp8"},
            memory={"quantize": "fp8"},
            backend={"options": {"script": "/checkout/train.py", **more}},
        )
        return next(v.kind for v in verdicts(spec) if v.path == "backend.options")

    assert options() is Kind.EXACT
    assert options(split=True) is Kind.REFUSED


def test_a_resumed_run_says_that_the_optimizer_begins_anew(make_spec: MakeSpec) -> None:
    verdict = next(v for v in verdicts(make_spec(), resume=True) if v.path == "train.optimizer")
    assert verdict.kind is Kind.APPROXIMATED
    assert "weights only" in verdict.reason


#: What goes together with what not: sections of the spec → field that is refused, and words of the reason.
INCOMPATIBLE: dict[str, tuple[dict[str, Any], str, str]] = {
    "nf4 computed in fp8": (
        {"memory": {"storage": "nf4", "compute": "fp8"}},
        "memory.compute",
        "set memory.storage: fp8",
    ),
    "bf16 computed in int8": ({"memory": {"compute": "int8"}}, "memory.compute", "set memory.storage: int8"),
    "blocks on disk": ({"memory": {"offload": "disk"}}, "memory.offload", "host memory only"),
    "activations that are not recomputed": (
        {"memory": {"offload": "group+activations", "gradient_checkpointing": "none"}},
        "memory.offload",
        "gradient_checkpointing: full",
    ),
    "two GPUs": ({"train": {"gpus": 2}}, "train.gpus", "one process"),
}


@pytest.mark.parametrize(("sections", "path", "says"), INCOMPATIBLE.values(), ids=INCOMPATIBLE)
def test_what_does_not_go_together_is_refused_with_the_reason(
    make_spec: MakeSpec, sections: dict[str, Any], path: str, says: str
) -> None:
    refused = {v.path: v.reason for v in verdicts(make_spec(**sections)) if v.kind is Kind.REFUSED}
    assert list(refused) == [path]
    assert says in refused[path]


@pytest.mark.parametrize(
    ("sections", "path", "kind", "says"),
    [
        ({"memory": {"quantize": "fp8-dynamic"}}, "memory.compute", Kind.APPROXIMATED, "comfy_kitchen_fp8_w8a8"),
        ({"memory": {"storage": "int8", "compute": "int8"}}, "memory.compute", Kind.APPROXIMATED, "int8_w8a8"),
        (
            {"memory": {"quantize": "fp8-dynamic"}, "model": {"checkpoint": "ideogram-ai/ideogram-4-fp8"}},
            "memory.compute",
            Kind.DEFAULTED,
            "unpacked",
        ),
        ({"memory": {"offload": "group+activations"}}, "memory.offload", Kind.APPROXIMATED, "checkpointing_offload"),
        ({"memory": {"compile": "full"}}, "memory.compile", Kind.DEFAULTED, "none"),
        ({"memory": {"gradient_checkpointing": "auto"}}, "memory.gradient_checkpointing", Kind.APPROXIMATED, "full"),
        ({"memory": {"text_encoder": "nf4"}}, "memory.text_encoder", Kind.EXACT, "quant_options"),
    ],
)
def test_what_fits_the_model_is_said_as_diffsynth_does_it(
    make_spec: MakeSpec, sections: dict[str, Any], path: str, kind: Kind, says: str
) -> None:
    verdict = next(v for v in verdicts(make_spec(**sections)) if v.path == path)
    assert verdict.kind is kind
    assert says in verdict.reason


def test_a_checkouts_script_takes_sets_but_not_their_weights_in_the_loss(make_spec: MakeSpec) -> None:
    sets = [{"path": "/a", "weight": 1}, {"path": "/b", "weight": 3, "loss_weight": 0.5, "resolution": 512}]
    dataset = {"path": None, "sets": sets}
    ours = {one.path: one.kind for one in verdicts(make_spec(dataset=dataset)) if one.path.startswith("dataset.sets")}
    assert set(ours.values()) == {Kind.EXACT}
    script = {one.path: one for one in verdicts(make_spec(dataset=dataset, backend=SCRIPT))}
    assert script["dataset.sets[1].loss_weight"].kind is Kind.REFUSED
    assert "set it to 1" in script["dataset.sets[1].loss_weight"].reason
    assert script["dataset.sets[1].weight"].kind is Kind.EXACT
