"""Reading spec files: what is refused is told at once, by its path, with what to write instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loraport.errors import SpecError
from loraport.spec.load import MAX_BYTES, PATH_FIELDS, build_spec, load_spec
from loraport.spec.models import TrainSpec, leaf_fields

MINIMAL = "name: demo\nmodel: {checkpoint: org/name}\ndataset: {path: images}\n"


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(content: str | bytes) -> Path:
        path = tmp_path / "spec.yaml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def refused(path: Path, overrides: list[str] | None = None) -> str:
    with pytest.raises(SpecError) as caught:
        load_spec(path, overrides)
    return str(caught.value)


def test_a_minimal_spec_gets_every_default(write: Any) -> None:
    loaded = load_spec(write(MINIMAL))
    assert loaded.notices == []
    assert loaded.spec.train.steps == 1000
    assert loaded.spec.lora.effective_alpha == 16


def test_relative_paths_start_at_the_spec_file(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    path = write(
        MINIMAL.replace("org/name", "./weights").replace("images", "../images")
        + "validation: {path: held-out}\nbackend: {python: venv/bin/python}\n"
    )
    monkeypatch.chdir(tmp_path / "elsewhere")
    spec = load_spec(path).spec
    assert spec.model.checkpoint == str(tmp_path / "weights")
    assert spec.dataset.path == tmp_path / ".." / "images"
    assert spec.validation.path == tmp_path / "held-out"
    assert spec.backend.python == tmp_path / "venv/bin/python"


def test_every_field_that_holds_a_path_is_anchored() -> None:
    holds_path = [path for path, info in leaf_fields().items() if "Path" in str(info.annotation)]
    assert sorted(holds_path) == sorted(PATH_FIELDS)


def test_a_checkpoint_is_a_folder_when_there_is_one(write: Any, tmp_path: Path) -> None:
    path = write(MINIMAL)
    assert load_spec(path).spec.model.checkpoint == "org/name"
    (tmp_path / "org/name").mkdir(parents=True)
    assert load_spec(path).spec.model.checkpoint == str(tmp_path / "org/name")


def test_a_folder_called_tiny_does_not_shadow_the_tiny_checkpoint(write: Any, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    assert load_spec(write(MINIMAL.replace("org/name", "tiny"))).spec.model.checkpoint == "tiny"


def test_home_is_expanded_and_an_unknown_user_is_a_plain_name(write: Any) -> None:
    assert load_spec(write(MINIMAL.replace("images", "~/images"))).spec.dataset.path == Path.home() / "images"
    assert "~nobody-here" in str(load_spec(write(MINIMAL.replace("images", "~nobody-here/a"))).spec.dataset.path)


@pytest.mark.parametrize("value", ['""', '"a\\0b"'])
@pytest.mark.parametrize("field", ["model.checkpoint", *PATH_FIELDS])
def test_what_cannot_be_a_path_is_refused(write: Any, field: str, value: str) -> None:
    assert f"{field}: " in refused(write(MINIMAL), [f"{field}={value}"])


def test_a_checkpoint_name_too_long_for_a_path_is_taken_as_a_hub_id(write: Any) -> None:
    assert load_spec(write(MINIMAL.replace("org/name", "a" * 5000))).spec.model.checkpoint == "a" * 5000


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xff\xfen\x00", "is not UTF-8 text (byte 0)"),
        ("name: caf\xe9".encode("latin-1"), "is not UTF-8 text (byte 9)"),
        ("", "a spec is a mapping of sections (model:, dataset:, …), not empty"),
        ("- a\n- b", "not a list"),
        ("just text", "not a str"),
        ("#" * (MAX_BYTES + 1), "more than 1,000,000 bytes"),
        ("version: 2\n" + MINIMAL, "version: 2 is newer"),
    ],
)
def test_an_unreadable_file_is_told_with_its_path(write: Any, content: str | bytes, says: str) -> None:
    path = write(content)
    message = refused(path)
    assert says in message
    assert str(path) in message or says.startswith("version")


def test_a_byte_order_mark_is_passed_over(write: Any) -> None:
    assert load_spec(write(b"\xef\xbb\xbf" + MINIMAL.encode())).spec.name == "demo"


def test_a_folder_and_a_missing_file_are_told_apart(tmp_path: Path) -> None:
    assert "is a folder" in refused(tmp_path)
    missing = refused(tmp_path / "missing.yaml")
    assert "No such file" in missing
    assert "loraport init" in missing


def test_an_endless_file_is_not_read_to_its_end() -> None:
    assert "more than 1,000,000 bytes" in refused(Path("/dev/zero"))


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("train: {stpes: 5}", "train.stpes: no such field. Did you mean train.steps?"),
        ("trian: {steps: 5}", "trian: no such field. Did you mean train?"),
        ("stpes: 5", "stpes: no such field. Did you mean train.steps or sample.steps?"),
        ("lora: {steps: 5}", "lora.steps: no such field. Did you mean train.steps or sample.steps?"),
        ("lora: {lr: 5}", "lora.lr: no such field. Did you mean train.learning_rate?"),
        ("dataset: {path: a, regularization: {pth: b}}", "dataset.regularization.pth: no such field. Did you mean"),
        ("dataset: {path: a, regularization: {qqqq: b}}", "Choices: caption_ext, path, repeats, weight."),
        ("save: {qqqq: 1}", "save.qqqq: no such field. Choices: dtype, every, keep."),
    ],
)
def test_an_unknown_key_is_told_with_its_path_and_the_nearest_name(write: Any, lines: str, says: str) -> None:
    base = MINIMAL.replace("dataset: {path: images}\n", "") if lines.startswith("dataset") else MINIMAL
    assert says in refused(write(base + lines + "\n"))


def test_a_training_field_under_model_points_to_where_it_belongs(write: Any) -> None:
    message = refused(write("name: a\nmodel: {checkpoint: tiny, steps: 5}\ndataset: {path: b}\n"))
    assert "model.steps: no such field." in message
    assert "train.steps" in message


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("train.steps", "0", "train.steps: input should be greater than or equal to 1 (got 0)"),
        ("train.steps", "many", "train.steps: input should be a valid integer"),
        ("train.steps", "true", "train.steps: a number belongs here (got True)"),
        ("train.learning_rate", "50", "train.learning_rate: input should be less"),
        ("train.learning_rate", "true", "train.learning_rate: a number belongs here"),
        ("train.optimizer", "adam", "train.optimizer: input should be 'adamw', 'adamw8bit'"),
        ("train.optimizer", "adamw8bits", "'lion' (got 'adamw8bits'). Did you mean 'adamw8bit'?"),
        ("train.gpus", "0", "train.gpus: input should be greater than or equal to 1 (got 0)"),
        ("memory.storage", "nf5", "(got 'nf5'). Did you mean 'nf4'?"),
        ("memory.gradient_checkpointing", "partial", "'none', 'selective', 'full' or 'auto' (got 'partial')"),
        ("dataset.resolution", "1000", "dataset.resolution: input should be a multiple of 16 (got 1000)"),
        ("dataset.caption_dropout", "1.5", "dataset.caption_dropout: input should be less than or equal to 1"),
        ("lora.targets", "['(']", "lora.targets: '(' is not a regular expression"),
        ("lora.targets", "[]", "lora.targets: give at least one pattern"),
        ("sample.every", "10", "sample.every is set, so sample.prompts needs at least one prompt"),
        ("lora", "{type: lokr, dora: true}", "lora.dora needs lora.type: lora, not lokr"),
        ("train", "5", "train: a section with fields belongs here: batch_size, "),
        ("name", "a/b", "name: string should match pattern"),
        ("name", ".hidden", "name: string should match pattern"),
        ("name", "日" * 100, "name: at most 200 bytes"),
        ("name", "123", "name: input should be a valid string (got 123)"),
    ],
)
def test_a_bad_value_is_told_with_its_path(write: Any, field: str, value: str, says: str) -> None:
    assert says in refused(write(MINIMAL), [f"{field}={value}"])


def test_every_problem_is_told_at_once(write: Any) -> None:
    message = refused(write("train: {steps: 0, stpes: 1}\nlora: {rank: 0}\n"))
    for path in ("name", "model", "dataset", "train.steps", "train.stpes", "lora.rank"):
        assert f"\n  {path}: " in message


def test_a_huge_value_is_not_quoted_whole(write: Any) -> None:
    assert len(refused(write(MINIMAL.replace("demo", "x" * 500_000)))) < 1000


def test_a_section_with_every_line_commented_out_keeps_its_defaults(write: Any) -> None:
    assert load_spec(write(MINIMAL + "train:\n  # steps: 5\nsave:\n")).spec.train.steps == 1000


def test_a_required_field_says_what_it_is_for(write: Any) -> None:
    assert "model.checkpoint: needed, but not there. Hub id" in refused(write("name: a\nmodel:\ndataset: {path: a}\n"))


def test_set_changes_fields_and_reads_values_as_yaml(write: Any) -> None:
    spec = load_spec(
        write(MINIMAL + "train: {steps: 5, seed: 7}\n"),
        [
            "train.steps=10",
            "train.learning_rate=1e-3",
            "sample.prompts=[a, 'b = c']",
            "dataset.trigger_word=",
            "lora={rank: 8, targets: [layers.*]}",
            "lora.alpha=4",
            "dataset.regularization.weight=0.5",
            "backend.options.device=cpu",
        ],
    ).spec
    assert (spec.train.steps, spec.train.seed, spec.train.learning_rate) == (10, 7, 1e-3)
    assert spec.sample.prompts == ["a", "b = c"]
    assert spec.dataset.trigger_word is None
    assert (spec.lora.rank, spec.lora.alpha, spec.lora.targets) == (8, 4, ["layers.*"])
    assert spec.dataset.regularization.weight == 0.5
    assert spec.backend.options == {"device": "cpu"}


def test_set_accepts_foreign_names_and_wins_over_the_file(write: Any) -> None:
    loaded = load_spec(write(MINIMAL + "train: {learning_rate: 1e-4}\n"), ["lr=1e-3", "lora.network_dim=4"])
    assert (loaded.spec.train.learning_rate, loaded.spec.lora.rank) == (1e-3, 4)
    assert loaded.notices == [
        "--set lr=1e-3: read lr as train.learning_rate",
        "--set lora.network_dim=4: read lora.network_dim as lora.rank",
    ]


def test_relative_paths_given_with_set_start_at_the_current_folder(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    path = write(MINIMAL)
    monkeypatch.chdir(tmp_path / "here")
    assert load_spec(path, ["dataset.path=pictures"]).spec.dataset.path == tmp_path / "here" / "pictures"


@pytest.mark.parametrize("text", ["train.steps", "=5", " =5"])
def test_set_without_a_field_or_a_value_says_how_to_write_it(write: Any, text: str) -> None:
    assert "section.field=value" in refused(write(MINIMAL), [text])


def test_set_to_broken_yaml_or_an_unknown_field_is_refused(write: Any) -> None:
    assert refused(write(MINIMAL), ["train.steps=[1"]).startswith("--set train.steps=[1:")
    assert "train.stpes: no such field" in refused(write(MINIMAL), ["train.stpes=5"])


def test_reading_changes_nothing_in_the_given_mapping(tmp_path: Path) -> None:
    raw = {"name": "a", "model": {"checkpoint": "./w"}, "dataset": {"path": "x"}, "lr": 1e-3}
    before = {"name": "a", "model": {"checkpoint": "./w"}, "dataset": {"path": "x"}, "lr": 1e-3}
    build_spec(raw, base=tmp_path, origin="raw")
    assert raw == before


def test_load_on_the_model_gives_the_same_spec(write: Any) -> None:
    path = write(MINIMAL)
    assert TrainSpec.load(path, ["train.steps=3"]) == load_spec(path, ["train.steps=3"]).spec


SETS = "name: demo\nmodel: {checkpoint: org/name}\n"


def sets(*entries: str, shared: str = "") -> str:
    return SETS + f"dataset:\n  {shared or 'repeats: 1'}\n  sets:\n" + "".join(f"    - {{{one}}}\n" for one in entries)


def test_several_sets_have_their_paths_from_the_spec_file_and_the_hubs_stay(write: Any, tmp_path: Path) -> None:
    spec = load_spec(write(sets("path: one", "path: ../two", "path: 'hub:me/mine@v1'"))).spec
    assert spec.dataset.path is None
    assert [str(one.path) for one in spec.dataset.sets] == [
        str(tmp_path / "one"),
        f"{tmp_path}/../two",
        "hub:me/mine@v1",
    ]


@pytest.mark.parametrize("written", ["datasets", "dataset"])
def test_a_list_as_other_trainers_have_it_is_read_with_a_notice(write: Any, tmp_path: Path, written: str) -> None:
    text = (
        f"{SETS}{written}:\n  - folder_path: one\n    num_repeats: 3\n  - {{path: two, is_reg: true, flip_x: true}}\n"
    )
    loaded = load_spec(write(text))
    one, two = loaded.spec.dataset.sets
    assert (one.path, one.repeats) == (tmp_path / "one", 3)
    assert (two.regularization, two.flip) == (True, True)
    told = "\n".join(loaded.notices)
    for notice in (
        f"read {written} as dataset.sets",
        "read dataset.sets[0].folder_path as dataset.sets[0].path",
        "read dataset.sets[0].num_repeats as dataset.sets[0].repeats",
        "read dataset.sets[1].is_reg as dataset.sets[1].regularization",
    ):
        assert notice in told


def test_what_all_sets_share_may_stand_beside_their_list(write: Any) -> None:
    spec = load_spec(write(f"{SETS}datasets: [{{path: a}}, {{path: b}}]\ndataset: {{resolution: 512}}\n")).spec
    assert (spec.dataset.resolution, len(spec.dataset.sets)) == (512, 2)


def test_set_reaches_into_the_list(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(sets("path: one", "path: two, weight: 1", "path: three, weight: 5"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    overrides = ["dataset.sets[0].weight=2", "dataset.sets[1].folder_path=elsewhere", "dataset.resolution=512"]
    one, two, three = load_spec(path, overrides).spec.dataset.sets
    assert (one.weight, one.path, three.weight) == (2.0, tmp_path / "one", 5.0)
    assert two.path == tmp_path / "here" / "elsewhere"
    listed = "sample={every: 5, prompts: [a, b]}"
    assert load_spec(path, ["dataset.sets[0].weight=2", listed, "sample.prompts[1]=c"]).spec.sample.prompts == [
        "a",
        "c",
    ]


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        (
            ["path: a, resolutoin: 512"],
            "dataset.sets[0].resolutoin: no such field. Did you mean dataset.sets[0].resolution?",
        ),
        (
            ["path: a", "qqqq: 1, path: b"],
            "dataset.sets[1].qqqq: no such field. Choices: caption_dropout, caption_ext,",
        ),
        (["path: a", "repeats: 2"], "dataset.sets[1].path: needed, but not there. Folder of images"),
        (["path: a, resolution: 1000"], "dataset.sets[0].resolution: input should be a multiple of 16 (got 1000)"),
        (["path: a, weight: 0"], "dataset.sets[0].weight: input should be greater than 0 (got 0)"),
        (["path: a, weight: -1"], "dataset.sets[0].weight: input should be greater than 0 (got -1)"),
        (["path: a, weight: true"], "dataset.sets[0].weight: a number belongs here (got True)"),
        (["path: a, weight: 1", "path: b"], "dataset: sets[1].weight is needed, for other sets have one"),
        (["path: a, weight: 1, repeats: 2"], "dataset: sets[0] has a weight and repeats"),
        (["path: a, regularization: true"], "dataset: every set is regularisation"),
        (["path: a", "path: ./a"], "dataset: sets[1] is sets[0] once more"),
        (["path: 'hub:mine'"], "dataset.sets[0].path: a dataset of the hub is hub:owner/name"),
        (["path: 'hub:me/mine@'"], "dataset.sets[0].path: a dataset of the hub is hub:owner/name"),
        (["path: a, folder_path: b"], "dataset.sets[0].folder_path and dataset.sets[0].path are the same field"),
        (["path: ''"], "dataset.sets[0].path: '' is not a path"),
    ],
)
def test_what_is_wrong_with_a_set_is_told_with_its_place(write: Any, entries: list[str], says: str) -> None:
    assert says in refused(write(sets(*entries)))


@pytest.mark.parametrize(
    ("dataset", "says"),
    [
        ("dataset: {}", "dataset: needs path (one folder of images) or sets (several)"),
        ("dataset: {sets: []}", "dataset: needs path (one folder of images) or sets (several)"),
        ("dataset: {path: a, sets: [{path: b}]}", "dataset: give path (one folder) or sets (several), not both"),
        ("dataset: {sets: [{path: a}], regularization: {path: b}}", "as a set with regularization: true"),
        ("dataset: {sets: [{path: a, weight: 1}], repeats: 2}", "sets[0] has a weight and repeats"),
        ("dataset: {sets: [5]}", "dataset.sets[0]: a section with fields belongs here: caption_dropout,"),
        ("dataset: {sets: 5}", "dataset.sets: input should be a valid list (got 5)"),
        ("dataset: {path: a}\ndatasets: [{path: b}]", "dataset: give path (one folder) or sets (several), not both"),
        (
            "dataset: {sets: [{path: a}]}\ndatasets: [{path: b}]",
            "datasets and dataset.sets are the same field; keep one",
        ),
        ("dataset: [{path: a}]\ndatasets: [{path: b}]", "datasets and dataset.sets are the same field; keep one"),
        ("dataset: 5\ndatasets: [{path: b}]", "datasets and dataset.sets are the same field; keep one"),
    ],
)
def test_a_dataset_is_one_folder_or_several_sets(write: Any, dataset: str, says: str) -> None:
    assert says in refused(write(f"{SETS}{dataset}\n"))


def test_the_same_folder_at_two_resolutions_or_with_two_captions_is_meant(write: Any) -> None:
    entries = ["path: a", "path: a, resolution: 512", "path: a, caption_ext: txt", "path: a, caption_field: text"]
    assert len(load_spec(write(sets(*entries))).spec.dataset.sets) == 4


def test_set_outside_the_list_says_how_long_it_is(write: Any) -> None:
    path = write(sets("path: a", "path: b"))
    assert "sets[2] is not there: sets has [0] to [1]" in refused(path, ["dataset.sets[2].path=c"])
    for wrong in ("dataset.sets[0].path=c", "dataset[0].path=c", "datasets[0].path=c", "train.steps[0]=5", "[0]=3"):
        assert "[0] is not there" in refused(write(MINIMAL), [wrong])
    assert "dataset.sets[x]: no such field. Did you mean dataset.sets?" in refused(path, ["dataset.sets[x].path=c"])
