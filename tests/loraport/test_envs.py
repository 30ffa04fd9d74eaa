"""Environments: the right interpreter is found, and installing is safe to repeat. No network is used."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loraport.envs import (
    STAMP,
    Checkout,
    Recipe,
    environment_folder,
    find_interpreter,
    fitting_python,
    import_problem,
    install,
    package_version,
    problem_with,
    source_folder,
)
from loraport.errors import BackendError, SpecError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAPORT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # pip's odd way to say: no isolation
    return tmp_path / "home"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A trainer's source tree whose build needs nothing from an index."""
    folder = tmp_path / "a trainer"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(
        "[build-system]\nrequires = []\nbuild-backend = 'backend'\nbackend-path = ['.']\n"
        "[project]\nname = 'my-trainer'\nversion = '2.5'\n"
    )
    (folder / "my_trainer.py").write_text("VALUE = 1\n")
    (folder / "backend.py").write_text(
        "import base64, hashlib, pathlib, zipfile\n"
        "def build_wheel(folder, config_settings=None, metadata_directory=None):\n"
        "    name = 'my_trainer-2.5-py3-none-any.whl'\n"
        "    info = 'my_trainer-2.5.dist-info/'\n"
        "    files = {'my_trainer.pth': str(pathlib.Path.cwd()),\n"
        "             info + 'METADATA': 'Metadata-Version: 2.1\\nName: my-trainer\\nVersion: 2.5\\n',\n"
        "             info + 'WHEEL': 'Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n'}\n"
        "    with zipfile.ZipFile(pathlib.Path(folder) / name, 'w') as wheel:\n"
        "        for path, text in files.items(): wheel.writestr(path, text)\n"
        "        wheel.writestr(info + 'RECORD', ''.join(f'{path},,\\n' for path in [*files, info + 'RECORD']))\n"
        "    return name\n"
        "build_editable = build_wheel\n"
    )
    return folder


def commit(folder: Path, message: str) -> str:
    """Put all of a folder into its git repository, which is made where there is none; the commit's name."""

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
        done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)
        return done.stdout.decode().strip()

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", message)
    return git("rev-parse", "HEAD")


RECIPE = Recipe(package="my-trainer", versions=">=2,<3", module="my_trainer", requirements=["my-trainer==2.5"])


def test_without_an_environment_the_current_interpreter_is_used() -> None:
    assert find_interpreter("mine") == Path(sys.executable)


def test_the_spec_comes_before_the_users_configuration(home: Path, tmp_path: Path) -> None:
    given, configured = tmp_path / "given", tmp_path / "configured"
    for path in (given, configured):
        path.touch()
    home.mkdir()
    (home / "config.yaml").write_text(f"python:\n  mine: {configured}\n")
    assert find_interpreter("mine", given) == given
    assert find_interpreter("mine") == configured
    assert find_interpreter("other") == Path(sys.executable)


def test_an_interpreter_that_is_not_there_is_an_error_that_says_who_named_it(home: Path) -> None:
    with pytest.raises(SpecError, match=r"backend\.python: /nowhere/python"):
        find_interpreter("mine", Path("/nowhere/python"))
    home.mkdir()
    (home / "config.yaml").write_text("python: {mine: /nowhere/python}")
    with pytest.raises(SpecError, match=r"config\.yaml: python\.mine"):
        find_interpreter("mine")


@pytest.mark.slow
def test_a_checkout_is_installed_into_an_environment_of_its_own(checkout: Path) -> None:
    told: list[str] = []
    python = install("mine", RECIPE, told.append, checkout)
    assert find_interpreter("mine") == python
    assert package_version(python, "my-trainer") == "2.5"
    assert problem_with(python, RECIPE) is None
    assert import_problem(python, "my_trainer") is None
    assert "No module" in (import_problem(python, "torch_that_is_not_there") or "")
    stamp = environment_folder("mine") / STAMP
    assert json.loads(stamp.read_text())["version"] == "2.5"
    before = stamp.stat().st_mtime_ns
    install("mine", RECIPE, told.append, checkout)
    assert stamp.stat().st_mtime_ns == before
    assert "installed already" in told[-1]


@pytest.mark.slow
def test_an_installation_that_fails_can_be_repeated_and_is_not_taken_for_whole(checkout: Path) -> None:
    with pytest.raises(BackendError, match="installation failed"):
        install("mine", RECIPE, lambda line: None)  # no index has my-trainer
    assert find_interpreter("mine") == Path(sys.executable)
    assert install("mine", RECIPE, lambda line: None, checkout) == find_interpreter("mine")


def test_a_package_of_another_version_is_told_with_the_range() -> None:
    told = problem_with(Path(sys.executable), Recipe("pydantic", "<1", "pydantic", []))
    assert told is not None
    assert "<1" in told
    missing = problem_with(Path(sys.executable), Recipe("no-such-package", ">1", "x", []))
    assert missing is not None
    assert "not installed" in missing


def test_a_python_in_the_range_is_found_or_the_error_says_what_to_install() -> None:
    version = ".".join(map(str, sys.version_info[:2]))
    assert fitting_python(f"=={version}.*") == Path(sys.executable)
    with pytest.raises(BackendError, match=r"No Python >=9 .*\n.*uv"):
        fitting_python(">=9")


def test_pyenvs_interpreters_are_found_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "versions" / "3.99.1" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake.write_text("#!/bin/sh\necho 3.99.1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert fitting_python(">=3.99") == fake


def test_backends_without_an_environment_say_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "loraport.cli.main", "backends", "install", "native"], capture_output=True, text=True
    )
    assert done.returncode == 3
    assert "runs in this one" in done.stderr


@pytest.mark.slow
def test_a_trainer_that_is_a_checkout_is_cloned_at_its_commit_or_linked(checkout: Path) -> None:
    first = commit(checkout, "first")
    (checkout / "my_trainer.py").write_text("VALUE = 2\n")
    commit(checkout, "second")
    recipe = Recipe("pip", ">1", "pip", ["pip"], checkout=Checkout(str(checkout), first))
    told: list[str] = []
    install("mine", recipe, told.append)
    assert (source_folder("mine") / "my_trainer.py").read_text() == "VALUE = 1\n"
    with pytest.raises(BackendError, match="in the way"):
        install("mine", recipe, told.append, checkout)
    install("other", recipe, told.append, checkout)
    assert (source_folder("other") / "my_trainer.py").read_text() == "VALUE = 2\n"


@pytest.mark.slow
def test_a_requirement_that_is_out_of_reach_is_named_and_the_rest_stays_for_the_next_try(
    checkout: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    recipe = Recipe("my-trainer", ">=2,<3", "my_trainer", ["pip", f"my-trainer @ git+file://localhost{elsewhere}"])
    told: list[str] = []
    with pytest.raises(BackendError, match=r"elsewhere(.|\n)*goes on where it stopped"):
        install("mine", recipe, told.append)
    assert "installing pip" in told
    assert not (environment_folder("mine") / STAMP).exists()
    assert find_interpreter("mine") == Path(sys.executable)

    shutil.copytree(checkout, elsewhere)
    commit(elsewhere, "first")
    told.clear()
    python = install("mine", recipe, told.append)
    assert not any(line.startswith("making") for line in told)
    assert find_interpreter("mine") == python
    assert package_version(python, "my-trainer") == "2.5"
