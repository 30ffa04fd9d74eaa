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


def test_nf4_is_refused_with_what_to_do() -> None:
    found = verdict("memory.storage", memory={"quantize": "nf4"})

    assert found.kind is Kind.REFUSED
    assert "fp8" in found.reason


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
        ("model.checkpoint", {"model": {"checkpoint": "tiny"}}, Kind.REFUSED),
        ("model.checkpoint", {"model": {"checkpoint": "ideogram-ai/ideogram-4-nf4"}}, Kind.REFUSED),
        ("model.revision", {"model": {"revision": "main"}}, Kind.REFUSED),
        ("model.dtype", {"model": {"dtype": "fp16"}}, Kind.REFUSED),
        ("train.learning_rate", {"train": {"optimizer": "prodigy", "learning_rate": 0.01}}, Kind.DEFAULTED),
        ("train.warmup_steps", {"train": {"warmup_steps": 5}}, Kind.EXACT),
        ("train.warmup_steps", {"train": {"warmup_steps": 5, "lr_scheduler": "cosine"}}, Kind.IGNORED),
        ("train.lr_cycles", {"train": {"lr_cycles": 3, "lr_scheduler": "cosine_with_restarts"}}, Kind.DEFAULTED),
        ("train.gradient_accumulation", {"train": {"gradient_accumulation": 2}}, Kind.APPROXIMATED),
        ("train.max_grad_norm", {"train": {"optimizer": "adafactor"}}, Kind.IGNORED),
        ("train.timestep_std", {}, Kind.DEFAULTED),
        ("dataset.upscale", {"dataset": {"upscale": True}}, Kind.IGNORED),
        ("dataset.max_text_tokens", {}, Kind.APPROXIMATED),
        ("validation.images", {"validation": {"images": 3}}, Kind.IGNORED),
        ("memory.storage", {"backend": {"options": {"qtype": "uint4"}}}, Kind.DEFAULTED),
        ("backend.options", {"backend": {"options": {"colour": 1}}}, Kind.REFUSED),
        ("backend.options", {"backend": {"options": {"layer_offloading_transformer_percent": 95}}}, Kind.REFUSED),
        ("backend.options", {"backend": {"options": {"qtype": "nf4"}}}, Kind.REFUSED),
    ],
)
def test_what_ai_toolkit_cannot_do_is_said(path: str, sections: dict[str, Any], kind: Kind) -> None:
    assert verdict(path, **sections).kind is kind
