"""What is written down of a bench tells no place of the machine."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from loraport_bench.places import shortened

BENCH = Path("/data/out")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("/models/full16", "…/full16"),
        ("/models/my full model/", "…/my full model"),
        ("model.checkpoint=/models/my model", "model.checkpoint=…/my model"),
        ("/models/full16, exact", "…/full16, exact"),
        ('{"path": "/models/a/b.bin:8", "more": ["/models/c"]}', '{"path": "…/b.bin:8", "more": ["…/c"]}'),
        ("checkpoint: /models/full16\nimages: '/data/mine'\n", "checkpoint: …/full16\nimages: '…/mine'\n"),
        ("/usr/lib:/opt/lib64", "…/lib:…/lib64"),
        ("No file /models/a.safetensors.", "No file …/a.safetensors."),
        ("/models/a holds no vae/config.json.", "…/a holds no vae/config.json."),
        ("/models/a: no b/c; take /models/d", "…/a: no b/c; take …/d"),
        ("file:///models/a", "file://…/a"),
        ("/data/out/rows/a/run", "<bench>/rows/a/run"),
        ("/data/output/rows", "…/rows"),
        (f"{sys.executable} -m trainer", "python -m trainer"),
        (str(Path.home() / ".cache" / "x"), "<home>/.cache/x"),
    ],
)  # fmt: skip
def test_an_absolute_path_is_told_by_its_last_part(given: str, wanted: str) -> None:
    assert shortened(given, BENCH) == wanted
    assert shortened({"a": [given], given: 1}, BENCH) == {"a": [wanted], wanted: 1}
    assert shortened(wanted, BENCH) == wanted


@pytest.mark.parametrize(
    "text",
    [
        *(
            "ideogram-ai/ideogram-4-fp8",
            "https://example.org/a/b",
            "backend/config.json",
            "./a/b",
            "../a",
            "~/models/a",
        ),
        *("images/s", "this / that", "$HOME/a", "${PLACE}/a", "*/a.json", "<bench>/data", "…/a.yaml", "/", "", "1/2"),
    ],
)
def test_what_is_no_place_of_this_machine_stays_as_it_is(text: str) -> None:
    assert shortened(text, BENCH) == ("…/" if text == "/" else text)


@pytest.mark.parametrize(
    "name", ["My models (v2), old/tiny", "the painter's, v2/a: b", "größe, (1)/x y", "a b/back\\\\1, c"]
)
@pytest.mark.parametrize("inner", [False, True])
def test_a_path_that_the_spec_names_is_told_by_its_last_part_whatever_is_in_its_name(name: str, inner: bool) -> None:
    place, last = f"/mnt/{name}", name.rpartition("/")[2]
    spec = {"model": {"checkpoint": place}, "dataset": {"path": None, "sets": [{"path": f"{place} 2/"}]}}
    texts = [place, f"model.checkpoint={place}", f"{place} holds no vae. Take {place}/vae, {place} 2, or {place}."]
    wanted = [
        f"…/{last}",
        f"model.checkpoint=…/{last}",
        f"…/{last} holds no vae. Take …/{last}/vae, …/{last} 2, or …/{last}.",
    ]
    given = {"files": texts, "spec": spec} if inner else {"files": texts}
    assert shortened(given, BENCH, None if inner else spec)["files"] == wanted
    for quoted in (json.dumps(place), shlex.quote(place), "'" + place.replace("'", "''") + "'"):
        told = shortened(f"checkpoint {quoted}", BENCH, spec)
        assert told[:-1].endswith(f"…/{last}")
        assert "/mnt" not in told
    assert shortened(spec, BENCH)["dataset"]["sets"] == [{"path": f"…/{last} 2/"}]


def test_a_place_that_the_spec_names_is_no_part_of_what_is_shortened_already() -> None:
    spec = {"dataset": {"path": "/data"}}
    told = shortened(
        ["/data/a b.png", "<bench>/data", "…/data", "https://data/x", "/mydata/x", "/data/out/x"], BENCH, spec
    )
    assert told == ["…/data/a b.png", "<bench>/data", "…/data", "https://data/x", "…/x", "<bench>/x"]
