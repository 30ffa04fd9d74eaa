from __future__ import annotations

from typing import Any

import pytest
from ai_toolkit_specs import spec

from loraport.planning import Kind, Verdict
from loraport_ai_toolkit.capabilities import verdicts


def verdict(path: str, **sections: Any) -> Verdict:
    return next(one for one in verdicts(spec(**sections)) if one.path == path)


def test_an_alpha_other_than_the_rank_is_told_to_be_replaced_by_it() -> None:
    found = verdict("lora.alpha", lora={"rank": 16, "alpha": 8})

    assert found.kind is Kind.DEFAULTED
    assert "alpha = rank = 16" in found.reason
    assert verdict("lora.alpha", lora={"rank": 16, "alpha": 16}).kind is Kind.EXACT
    assert verdict("lora.alpha", lora={"rank": 16}).kind is Kind.EXACT


@pytest.mark.parametrize(
    ("sections", "path", "says"),
    [
        ({"memory": {"quantize": "nf4"}}, "memory.storage", "ai-toolkit has no nf4: set memory.quantize: fp8"),
        ({"memory": {"text_encoder": "nf4"}}, "memory.text_encoder", "no nf4: choose fp8"),
        ({"memory": {"quantize": "fp8-dynamic"}}, "memory.compute", "int8 alone"),
        ({"memory": {"storage": "fp8", "compute": "int8"}}, "memory.compute", "int8 alone"),
        ({"memory": {"offload": "group+activations"}}, "memory.offload", "neither activations nor from disk"),
        ({"memory": {"offload": "disk"}}, "memory.offload", "neither activations nor from disk"),
        ({"train": {"gpus": 2}}, "train.gpus", "one GPU"),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_to_do(sections: dict[str, Any], path: str, says: str) -> None:
    found = verdict(path, **sections)

    assert found.kind is Kind.REFUSED
    assert says in found.reason


@pytest.mark.parametrize(
    ("path", "sections", "kind"),
    [
        ("lora.type", {"lora": {"type": "loha"}}, Kind.REFUSED),
        ("lora.rslora", {"lora": {"rslora": True}}, Kind.REFUSED),
        ("lora.dora", {"lora": {"dora": True}}, Kind.REFUSED),
        ("lora.dropout", {"lora": {"type": "lokr", "dropout": 0.1}}, Kind.REFUSED),
        ("lora.dropout", {"lora": {"dropout": 0.1}}, Kind.APPROXIMATED),
        ("lora.targets", {"lora": {"targets": ["final_layer.*"]}}, Kind.REFUSED),
        ("lora.factor", {"lora": {"factor": 4}}, Kind.IGNORED),
        ("model.checkpoint", {"model": {"checkpoint": "ideogram-ai/ideogram-4-nf4"}}, Kind.REFUSED),
        ("model.revision", {"model": {"revision": "main"}}, Kind.REFUSED),
        ("model.dtype", {"model": {"dtype": "fp16"}}, Kind.REFUSED),
        ("train.learning_rate", {"train": {"optimizer": "prodigy", "learning_rate": 0.01}}, Kind.DEFAULTED),
        ("train.batch_size", {"train": {"batch_size": 4}, "dataset": {"repeats": 6}}, Kind.APPROXIMATED),
        ("train.batch_size", {"train": {"batch_size": 4}, "dataset": {"repeats": 8}}, Kind.EXACT),
        ("train.warmup_steps", {"train": {"warmup_steps": 5}}, Kind.EXACT),
        ("train.warmup_steps", {"train": {"warmup_steps": 5, "lr_scheduler": "cosine"}}, Kind.IGNORED),
        ("train.lr_cycles", {"train": {"lr_cycles": 3, "lr_scheduler": "cosine_with_restarts"}}, Kind.DEFAULTED),
        ("train.gradient_accumulation", {"train": {"gradient_accumulation": 2}}, Kind.APPROXIMATED),
        ("train.max_grad_norm", {"train": {"optimizer": "adafactor"}}, Kind.IGNORED),
        ("train.timestep_std", {}, Kind.DEFAULTED),
        ("dataset.upscale", {"dataset": {"upscale": True}}, Kind.IGNORED),
        ("dataset.upscale", {"dataset": {"upscale": True, "aspect_buckets": False}}, Kind.EXACT),
        ("dataset.upscale", {"dataset": {"aspect_buckets": False}}, Kind.IGNORED),
        ("dataset.aspect_buckets", {"dataset": {"aspect_buckets": False}}, Kind.EXACT),
        ("validation.images", {"validation": {"images": 3}}, Kind.IGNORED),
        ("memory.storage", {"backend": {"options": {"qtype": "uint4"}}}, Kind.DEFAULTED),
        ("memory.compute", {"memory": {"storage": "int8", "compute": "int8"}}, Kind.APPROXIMATED),
        ("memory.text_encoder", {"memory": {"text_encoder": "int8"}}, Kind.EXACT),
        ("memory.compile", {"memory": {"compile": "full"}}, Kind.EXACT),
        ("memory.gradient_checkpointing", {"memory": {"gradient_checkpointing": "selective"}}, Kind.APPROXIMATED),
        ("backend.options", {"backend": {"options": {"colour": 1}}}, Kind.REFUSED),
        ("backend.options", {"backend": {"options": {"layer_offloading_transformer_percent": 95}}}, Kind.REFUSED),
        ("backend.options", {"backend": {"options": {"qtype": "nf4"}}}, Kind.REFUSED),
    ],
)
def test_what_ai_toolkit_cannot_do_is_said(path: str, sections: dict[str, Any], kind: Kind) -> None:
    assert verdict(path, **sections).kind is kind


def test_each_set_is_told_of_its_captions_and_its_key_in_ai_toolkit() -> None:
    sets = [
        {"path": "/a", "caption_ext": "json", "weight": 1, "resolution": 512},
        {"path": "/b", "caption_field": "text", "weight": 2, "regularization": True, "loss_weight": 0.5},
    ]
    found = {one.path: one for one in verdicts(spec(dataset={"path": None, "sets": sets}))}
    not_exact = {path for path, one in found.items() if path.startswith("dataset.sets") and one.kind is not Kind.EXACT}
    assert not_exact == {"dataset.sets[0].caption_ext", "dataset.sets[1].caption_field"}
    assert "rewrites others" in found["dataset.sets[0].caption_ext"].reason
    assert "space after every comma" in found["dataset.sets[1].caption_field"].reason
    assert "num_repeats" in found["dataset.sets[0].weight"].reason
    assert found["dataset.sets[1].loss_weight"].reason == "loss_multiplier"
    assert "not is_reg" in found["dataset.sets[1].regularization"].reason
