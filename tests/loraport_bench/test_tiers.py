"""What each real backend is asked to train in either tier. Plans only: nothing is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loraport.errors import SpecError
from loraport.gpu import Card
from loraport.spec.load import build_spec
from loraport_bench import tiers
from loraport_bench.images import Staged
from loraport_bench.settings import Settings
from loraport_bench.tiers import best_effort, inequalities, make, matched, refuse_options, why_not_matched

ALL = ["native", "diffsynth", "simpletuner", "ai-toolkit"]
STAGED = Staged(Path("/bench/data/images"), Path("/bench/data/held-out"), "/models/ideogram-4", 8, 2, "")


def settings(backends: list[str] = ALL, changes: Any = None, card: str | None = None, **sections: Any) -> Settings:
    content: dict[str, Any] = {
        "name": "demo",
        "model": {"checkpoint": "/models/ideogram-4"},
        "dataset": {"path": "/photos", "resolution": 1024, "caption_dropout": 0.1, "trigger_word": "zx"},
        "lora": {"rank": 32},
        "train": {"steps": 1000, "optimizer": "adamw", "lr_scheduler": "cosine", "seed": 3},
        "sample": {"every": 100, "prompts": ["a"]},
        **sections,
    }
    given = build_spec(content, base=Path.cwd(), origin="test").spec.model_dump(mode="json")
    return Settings(
        given=given, changes=changes or {}, backends=backends, profiles=["spec"], batches=[1], card=card,
        tiers=["matched"], repeats=1, seeds=[7], steps=60, warm_up=10,
        checkpoints=4, held_out=2, time_limit_s=60, sampling_s=0.05,
        overhead_pairs=0,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "cards", list)


def test_the_four_trainers_share_a_matched_spec_in_which_each_does_the_work_exactly() -> None:
    contents, changed = matched(settings(), STAGED, "spec", 1)
    plans = {name: make(contents[name], name, Path("/run")) for name in ALL}
    assert {name: why_not_matched(made) for name, made in plans.items()} == dict.fromkeys(ALL)
    specs = [made.spec.model_copy(update={"backend": None}) for made in plans.values()]
    assert all(spec == specs[0] for spec in specs)
    spec = plans["native"].spec
    assert (spec.train.max_grad_norm, spec.train.lr_scheduler, spec.train.steps, spec.train.seed) == (
        0,
        "constant",
        60,
        7,
    )
    assert (spec.sample.every, spec.validation.every, spec.save.every, spec.save.keep) == (0, 0, 15, 4)
    assert (spec.dataset.path, spec.dataset.trigger_word) == (Path("/bench/data/images"), None)
    assert spec.lora.rank == 32
    assert "diffsynth" in changed["train.max_grad_norm"]
    # What they cannot be brought to do alike is listed, each with every backend's word on it.
    left = {each.path: each.backends for each in inequalities(plans)}
    assert set(left["train.timestep_std"]) == set(ALL)
    assert "train.warmup_steps" in left
    assert not left.keys() & set(tiers.MATCHED)


def test_a_trainer_that_cannot_do_a_needed_field_has_no_place_in_the_matched_tier_and_is_told_why() -> None:
    contents, _ = matched(settings(), STAGED, "nf4", 4)
    reasons = {name: why_not_matched(make(contents[name], name, Path("/run"))) for name in ALL}
    assert reasons["native"] is None
    assert "train.batch_size = 4: approximated" in (reasons["diffsynth"] or "")
    assert make(contents["ai-toolkit"], "ai-toolkit", Path("/run")).refused()  # nf4


def test_what_a_set_says_of_its_images_must_be_exact_too_and_how_its_captions_are_written_need_not() -> None:
    sets = [{"path": "/a"}, {"path": "/b", "caption_ext": "json", "resolution": 768, "repeats": 2, "loss_weight": 0.5}]
    given = settings(dataset={"sets": sets, "resolution": 1024})
    contents, _ = matched(given, STAGED, "spec", 1)
    assert [one["path"] for one in contents["native"]["dataset"]["sets"]] == [
        "/bench/data/images/set-0",
        "/bench/data/images/set-1",
    ]
    reasons = {name: why_not_matched(make(contents[name], name, Path("/run"))) for name in ALL}
    assert reasons["native"] is None
    assert "dataset.sets[1].loss_weight = 0.5" in (reasons["simpletuner"] or "")
    assert all("caption_ext" not in (reason or "") for reason in reasons.values())


def test_a_spec_that_all_do_exactly_is_left_as_it_is() -> None:
    contents, changed = matched(settings(["native"], memory={"gradient_checkpointing": "none"}), STAGED, "spec", 1)
    spec = make(contents["native"], "native", Path("/run")).spec
    assert (spec.train.max_grad_norm, spec.dataset.caption_dropout, spec.train.lr_scheduler) == (1.0, 0.1, "cosine")
    assert spec.memory.gradient_checkpointing == "none"
    assert set(changed) == {
        *("dataset.path", "dataset.upscale", "dataset.trigger_word", "validation.every", "sample.every", "save.every"),
    }


def test_best_effort_is_what_the_cards_profile_recommends_as_far_as_each_trainer_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiers, "cards", lambda: [Card("H200", 140.0, (9, 0))])
    memory = {
        name: make(best_effort(settings(), STAGED, "fp8", 1, name), name, Path("/run")).spec.memory for name in ALL
    }
    assert (memory["native"].storage, memory["native"].compute) == ("fp8", "fp8")
    assert (memory["native"].compile, memory["native"].gradient_checkpointing) == ("regional", "none")
    for name in ALL:
        made = make(best_effort(settings(), STAGED, "fp8", 1, name), name, Path("/run"))
        assert not made.refused(), name
        assert made.spec.memory.storage == "fp8"
    # An older card does not compute in fp8, and nobody is asked to.
    monkeypatch.setattr(tiers, "cards", lambda: [Card("A100", 80.0, (8, 0))])
    assert (
        make(best_effort(settings(), STAGED, "fp8", 1, "native"), "native", Path("/run")).spec.memory.compute == "model"
    )


def test_another_cards_profile_can_be_asked_for() -> None:
    content = best_effort(settings(card="8gb"), STAGED, "nf4", 1, "native")
    memory = make(content, "native", Path("/run")).spec.memory
    assert memory.storage == "nf4"
    assert memory.offload != "none"


def test_options_of_one_trainer_are_not_given_to_another_and_changes_for_one_reach_it_alone() -> None:
    given = settings(
        ["native", "diffsynth"],
        {"diffsynth": ["backend.options.split=false"]},
        backend={"name": "native", "options": {"device": "cpu"}},
    )
    contents, _ = matched(given, STAGED, "spec", 1)
    assert contents["native"]["backend"]["options"] == {"device": "cpu"}
    assert contents["diffsynth"]["backend"]["options"] == {"split": False}


def test_other_work_for_one_trainer_is_refused_in_the_matched_tier_and_taken_in_the_other() -> None:
    given = settings(["native", "diffsynth"], {"diffsynth": ["train.learning_rate=2e-4"]})
    with pytest.raises(SpecError, match=r"train\.learning_rate is 0\.0002 for diffsynth and 0\.0001 for native"):
        matched(given, STAGED, "spec", 1)
    assert best_effort(given, STAGED, "spec", 1, "diffsynth")["train"]["learning_rate"] == 2e-4
    assert best_effort(given, STAGED, "spec", 1, "native")["train"]["learning_rate"] == 1e-4


def test_a_trainer_may_be_given_a_checkpoint_of_its_own_in_best_effort_alone() -> None:
    given = settings(["native", "diffsynth"], changes={"diffsynth": ["model.checkpoint=/models/bf16"]})
    other = best_effort(given, STAGED, "fp8", 1, "diffsynth")
    assert other["model"]["checkpoint"] == "/models/bf16"
    assert best_effort(given, STAGED, "fp8", 1, "native")["model"]["checkpoint"] == STAGED.checkpoint
    with pytest.raises(SpecError, match=r"model\.checkpoint is '/models/bf16' for diffsynth"):
        matched(given, STAGED, "fp8", 1)


def test_a_wrong_change_for_one_trainer_is_told_by_its_path() -> None:
    with pytest.raises(SpecError, match=r"the spec for diffsynth is not a valid spec:\n  lora\.rnk"):
        matched(settings(changes={"diffsynth": ["lora.rnk=3"]}), STAGED, "spec", 1)


@pytest.mark.parametrize(
    ("change", "instead"),
    [
        ("train.steps=4", "--steps"),
        ("max_train_steps=4", "--steps"),
        ("train={seed: 42}", "--seeds"),
        ("save.every=1", "--checkpoints"),
        ("save.keep=2", "--checkpoints"),
        ("train.batch_size=2", "--batches"),
    ],
)
def test_a_change_of_what_an_option_of_the_bench_sets_is_refused_with_the_option(change: str, instead: str) -> None:
    with pytest.raises(SpecError, match=r"^--for native: \S+ is set by the bench\.") as told:
        refuse_options("--for native", settings().given, ["lora.rank=8", change])
    assert f"Use {instead}," in str(told.value)


def test_the_batch_size_may_be_set_where_no_option_says_it_and_so_may_every_other_field() -> None:
    refuse_options("--set", settings().given, ["train.batch_size=2", "train.learning_rate=2e-4"], batches=False)


def test_what_is_asked_of_memory_for_one_trainer_holds_in_either_tier() -> None:
    compiled = settings(["native"], {"native": ["memory.compile=none"]}, "24gb", memory={"compile": "regional"})
    for profile in ("spec", "fp8"):
        assert matched(compiled, STAGED, profile, 1)[0]["native"]["memory"]["compile"] == "none"
        assert best_effort(compiled, STAGED, profile, 1, "native")["memory"]["compile"] == "none"
    other = settings(["native"], {"native": ["memory.quantize=nf4", "memory.profile=8gb"]})
    memory = best_effort(other, STAGED, "fp8", 1, "native")["memory"]
    assert (memory["storage"], memory["compute"], memory["offload"]) == ("nf4", "model", "group")


def test_a_hardware_profile_for_one_trainer_leaves_the_quantisation_that_is_measured() -> None:
    given = settings(["native"], {"native": ["memory.profile=8gb"]})
    memory = matched(given, STAGED, "fp8", 1)[0]["native"]["memory"]
    assert (memory["storage"], memory["offload"]) == ("fp8", "group")


def test_other_memory_settings_for_one_trainer_are_refused_where_they_must_be_alike_and_else_told() -> None:
    both = ["native", "diffsynth"]
    with pytest.raises(SpecError, match=r"memory\.compile is 'none' for diffsynth and 'regional' for native"):
        matched(settings(both, {"native": ["memory.compile=regional"]}), STAGED, "fp8", 1)
    contents, _ = matched(settings(both, {"native": ["memory.text_encoder=fp8"]}), STAGED, "spec", 1)
    plans = {name: make(contents[name], name, Path("/run")) for name in both}
    assert "fp8" in {each.path: each.backends for each in inequalities(plans)}["memory.text_encoder"]["native"]


def test_a_quantisation_replaces_the_specs_own_and_nothing_else_of_its_memory() -> None:
    memory = {"quantize": "nf4", "offload": "group", "gradient_checkpointing": "none", "text_encoder": "fp8"}
    contents, changed = matched(settings(["native"], memory=memory), STAGED, "fp8", 1)
    assert contents["native"]["memory"] == {
        **{"storage": "fp8", "compute": "model", "compile": "none"},
        **{"offload": "group", "gradient_checkpointing": "none", "text_encoder": "fp8"},
    }
    assert changed["memory.quantize"] == "what --profiles says"
    assert "memory.quantize" not in matched(settings(["native"], memory=memory), STAGED, "nf4", 1)[1]
    contents, _ = matched(settings(["native"], memory={"profile": "8gb"}), STAGED, "fp8", 1)
    assert (contents["native"]["memory"]["storage"], contents["native"]["memory"]["offload"]) == ("fp8", "group")


def test_a_trainer_that_is_refused_in_any_case_changes_nothing_for_the_others() -> None:
    model = {"checkpoint": "/models/ideogram-4", "dtype": "fp32"}
    contents, changed = matched(settings(["native", "diffsynth"], model=model), STAGED, "spec", 1)
    assert "model.dtype" in (why_not_matched(make(contents["diffsynth"], "diffsynth", Path("/run"))) or "")
    assert contents["native"]["train"]["max_grad_norm"] == 1
    assert "train.max_grad_norm" not in changed
