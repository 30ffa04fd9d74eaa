"""What the native trainer promises about each field, against what it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loraport.planning import Context, Kind, Verdict
from loraport.spec.models import leaf_fields
from loraport_native.capabilities import verdicts
from loraport_native.translate import translate


def by_path(spec: Any) -> dict[str, Verdict]:
    return {verdict.path: verdict for verdict in verdicts(spec)}


def test_every_field_is_judged_in_order_and_the_usual_spec_is_done_exactly(make_spec) -> None:
    found = verdicts(make_spec())
    assert [verdict.path for verdict in found] == list(leaf_fields())
    assert {verdict.kind for verdict in found} == {Kind.EXACT}


@pytest.mark.parametrize(
    ("changes", "path", "kind"),
    [
        ({"lora": {"dora": True}, "memory": {"quantize": "nf4"}}, "lora.dora", Kind.EXACT),
        ({"lora": {"dora": True}}, "lora.dora", Kind.EXACT),
        ({"lora": {"type": "lokr", "dropout": 0.1}}, "lora.dropout", Kind.REFUSED),
        ({"lora": {"type": "loha", "dropout": 0.1}}, "lora.dropout", Kind.REFUSED),
        ({"lora": {"dropout": 0.1}}, "lora.dropout", Kind.EXACT),
        ({"lora": {"factor": 4}}, "lora.factor", Kind.IGNORED),
        ({"lora": {"type": "lokr", "factor": 4}}, "lora.factor", Kind.EXACT),
        ({"train": {"lr_cycles": 3}}, "train.lr_cycles", Kind.IGNORED),
        ({"train": {"lr_cycles": 3, "lr_scheduler": "cosine_with_restarts"}}, "train.lr_cycles", Kind.EXACT),
        ({"memory": {"quantize": "fp8-dynamic"}}, "memory.compute", Kind.EXACT),
        ({"memory": {"storage": "nf4", "compute": "fp8"}}, "memory.compute", Kind.EXACT),
        ({"memory": {"offload": "disk"}}, "memory.offload", Kind.EXACT),
        ({"memory": {"compile": "full"}}, "memory.compile", Kind.EXACT),
        ({"memory": {"gradient_checkpointing": "auto"}}, "memory.gradient_checkpointing", Kind.EXACT),
        ({"memory": {"offload": "group+activations"}}, "memory.gradient_checkpointing", Kind.DEFAULTED),
        ({"train": {"gpus": 4}}, "train.gpus", Kind.EXACT),
        ({"model": {"dtype": "fp16"}}, "model.dtype", Kind.REFUSED),
        ({"model": {"family": "flux"}}, "model.family", Kind.REFUSED),
        ({"backend": {"options": {"devise": "cpu"}}}, "backend.options", Kind.REFUSED),
        ({"backend": {"options": {"device": "cpu"}}}, "backend.options", Kind.EXACT),
        ({"backend": {"options": {"deterministic": True}}}, "backend.options", Kind.EXACT),
        ({"backend": {"options": {"deterministic": "false"}}}, "backend.options", Kind.REFUSED),
        ({"backend": {"options": {"memory_limit_gib": 5.5}}}, "backend.options", Kind.EXACT),
        ({"backend": {"options": {"memory_limit_gib": 0}}}, "backend.options", Kind.REFUSED),
        ({"backend": {"options": {"memory_limit_gib": True}}}, "backend.options", Kind.REFUSED),
    ],
)
def test_what_it_cannot_do_it_says(make_spec, changes: dict[str, Any], path: str, kind: Kind) -> None:
    verdict = by_path(make_spec(**changes))[path]
    assert verdict.kind is kind, verdict.reason


def test_an_unknown_option_is_told_with_the_known_ones(make_spec) -> None:
    spec = make_spec(backend={"options": {"devise": "cpu"}})
    assert "devise" in by_path(spec)["backend.options"].reason
    assert "device: auto" in by_path(spec)["backend.options"].reason


def test_the_command_runs_the_trainer_in_the_interpreter_asked_for(make_spec) -> None:
    spec = make_spec(backend={"python": "/opt/env/bin/python"})
    made = translate(spec, Context(run_dir=Path("/runs/a")))
    assert made.command == ["/opt/env/bin/python", "-m", "loraport_native.train", "/runs/a"]
    assert made.files == {}


#: What goes together with what not: sections of the spec → field that is refused, and words of the reason.
INCOMPATIBLE: dict[str, tuple[dict[str, Any], str, str]] = {
    "bf16 computed in fp8": ({"memory": {"compute": "fp8"}}, "memory.compute", "only model"),
    "bf16 computed in int8": ({"memory": {"compute": "int8"}}, "memory.compute", "only model"),
    "fp8 computed in int8": ({"memory": {"storage": "fp8", "compute": "int8"}}, "memory.compute", "only model, fp8"),
    "int8 computed in fp8": ({"memory": {"storage": "int8", "compute": "fp8"}}, "memory.compute", "only model, int8"),
    **{
        f"{offload} in one graph": ({"memory": {"offload": offload, "compile": "full"}}, "memory.compile", "regional")
        for offload in ("group", "group+activations", "disk")
    },
    "streams off CUDA": (
        {"memory": {"offload": "group"}, "backend": {"options": {"device": "mps"}}},
        "memory.offload",
        "CUDA card only",
    ),
    "fewer bits on MPS": (
        {"memory": {"storage": "fp8"}, "backend": {"options": {"device": "mps"}}},
        "memory.storage",
        "need CUDA or a CPU",
    ),
}


@pytest.mark.parametrize(("sections", "path", "says"), INCOMPATIBLE.values(), ids=INCOMPATIBLE)
def test_what_does_not_go_together_is_refused_with_the_reason(
    make_spec, sections: dict[str, Any], path: str, says: str
) -> None:
    refused = {
        path: found.reason for path, found in by_path(make_spec(**sections)).items() if found.kind is Kind.REFUSED
    }
    assert list(refused) == [path]
    assert says in refused[path]
