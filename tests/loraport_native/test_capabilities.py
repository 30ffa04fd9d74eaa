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
        ({"lora": {"dora": True}, "memory": {"quantize": "nf4"}}, "lora.dora", Kind.REFUSED),
        ({"lora": {"dora": True}}, "lora.dora", Kind.EXACT),
        ({"lora": {"type": "lokr", "dropout": 0.1}}, "lora.dropout", Kind.REFUSED),
        ({"lora": {"type": "loha", "dropout": 0.1}}, "lora.dropout", Kind.REFUSED),
        ({"lora": {"dropout": 0.1}}, "lora.dropout", Kind.EXACT),
        ({"lora": {"factor": 4}}, "lora.factor", Kind.IGNORED),
        ({"lora": {"type": "lokr", "factor": 4}}, "lora.factor", Kind.EXACT),
        ({"train": {"lr_cycles": 3}}, "train.lr_cycles", Kind.IGNORED),
        ({"train": {"lr_cycles": 3, "lr_scheduler": "cosine_with_restarts"}}, "train.lr_cycles", Kind.EXACT),
        ({"memory": {"compute": "int8"}}, "memory.compute", Kind.REFUSED),
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
