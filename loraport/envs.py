"""One isolated environment a backend: found, made, and asked what is in it.

An environment is a folder under `$LORAPORT_HOME/envs`, by default `~/.local/share/loraport/envs`. The user's
configuration, `$LORAPORT_HOME/config.yaml`, may name interpreters instead: `python: {simpletuner: /opt/st/bin/python}`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from loraport.errors import BackendError, SpecError
from loraport.files import write_atomic

#: In an environment's folder: what it was made from; written last, so its presence means that it is whole.
STAMP = "loraport.json"


@dataclass(frozen=True)
class Checkout:
    """The source of a trainer that is run from a git checkout and not installed."""

    repository: str
    commit: str


@dataclass(frozen=True)
class Recipe:
    """What a backend's environment is made of. Version ranges are written as pip reads them."""

    package: str  #: distribution whose version is checked
    versions: str  #: range of `package` that the adapter was written for, such as ">=4.9,<4.11"
    module: str  #: what a working environment imports
    requirements: list[str]
    python: str = ">=3.11"  #: interpreters it runs on
    constraints: list[str] = field(default_factory=list)
    checkout: Checkout | None = None  #: placed beside the environment, in `source_folder`


def home() -> Path:
    """The folder of environments and user configuration."""
    given = os.environ.get("LORAPORT_HOME")
    return Path(given) if given else Path.home() / ".local" / "share" / "loraport"


def environment_folder(name: str) -> Path:
    """Where the isolated environment of a backend is, or would be."""
    return home() / "envs" / name


def source_folder(name: str) -> Path:
    """Where the checkout of a backend that has one is, or would be."""
    return environment_folder(name) / "src"


def find_interpreter(name: str, given: Path | None = None) -> Path:
    """The Python interpreter for a backend: `given` (the spec's backend.python), the user configuration's, the isolated
    environment's, else the current one. Raises SpecError when one that was named is not there."""
    for where, path in (("backend.python", given), (f"{home() / 'config.yaml'}: python.{name}", _configured(name))):
        if path is not None:
            if not path.expanduser().is_file():
                raise SpecError(f"{where}: {path} is not an interpreter: there is no such file.")
            return path.expanduser().absolute()
    isolated = _python_in(environment_folder(name) / "venv")
    return isolated if (environment_folder(name) / STAMP).is_file() else Path(sys.executable)


def package_version(python: Path, package: str) -> str | None:
    """The version of a distribution that an interpreter sees, or None. Nothing of it is imported."""
    code = "import sys, importlib.metadata as m; print(m.version(sys.argv[1]))"
    done = subprocess.run([python, "-I", "-c", code, package], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def install(name: str, recipe: Recipe, tell: Callable[[str], None], source: Path | None = None) -> Path:
    """Make the isolated environment of a backend, and return its interpreter.

    With `source`, that checkout is used instead of the recipe's own, or of `recipe.package` from the index. An
    environment that was made from the same recipe is left as it is; one that was cut off is gone on with. Uses uv when
    it is there, else venv and pip.
    Raises BackendError when no fitting Python is found or a step fails.
    """
    folder = environment_folder(name)
    made_from = {**asdict(recipe), "source": str(source.absolute()) if source else None}
    stamp = folder / STAMP
    python = _python_in(folder / "venv")
    if stamp.is_file() and json.loads(stamp.read_text())["made_from"] == made_from:
        tell(f"{name} is installed already, in {folder}")
        return python
    folder.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    if recipe.checkout is not None:
        _check_out(source_folder(name), recipe.checkout, source, tell)
        source = None
    requirements = [one for one in recipe.requirements if source is None or not _names(one, recipe.package)]
    write_atomic(folder / "constraints.txt", "\n".join(recipe.constraints) + "\n")
    uv = shutil.which("uv")
    if not python.is_file():
        tell(f"making {folder / 'venv'}")
        if uv:
            _step([uv, "venv", "--python", recipe.python, str(folder / "venv")], tell)
        else:
            _step([str(fitting_python(recipe.python)), "-m", "venv", str(folder / "venv")], tell)
    pip = [uv, "pip", "install", "--python", str(python)] if uv else [str(python), "-m", "pip", "install"]
    pip += ["-c", str(folder / "constraints.txt")]
    # What is at an address of its own may be out of reach: then everything else is there when it is tried again.
    from_index = [one for one in requirements if "://" not in one]
    elsewhere = [one for one in requirements if "://" in one]
    for some in (from_index + (["-e", str(source)] if source else []), *([one] for one in elsewhere)):
        if some:
            tell(f"installing {', '.join(some)}")
            _step([*pip, *some], tell)
    version = package_version(python, recipe.package)
    write_atomic(stamp, json.dumps({"made_from": made_from, "version": version}, indent=2) + "\n")
    tell(f"{name} is ready: {recipe.package} {version} in {folder}")
    return python


def problem_with(python: Path, recipe: Recipe) -> str | None:
    """Why an interpreter cannot run a backend, or None: the package is missing, of another version, or broken."""
    from packaging.specifiers import SpecifierSet

    version = package_version(python, recipe.package)
    if version is None:
        return f"{recipe.package} is not installed for {python}"
    if not SpecifierSet(recipe.versions).contains(version, prereleases=True):
        return f"{recipe.package} {version} is installed for {python}; the adapter is for {recipe.versions}"
    return None


def import_problem(python: Path, module: str) -> str | None:
    """The last line of what a real import of `module` prints when it fails, or None."""
    done = subprocess.run([python, "-c", f"import {module}"], capture_output=True, text=True)
    lines = done.stderr.strip().splitlines()
    return None if done.returncode == 0 else (lines[-1] if lines else f"exit code {done.returncode}")


def fitting_python(range_: str) -> Path:
    """An interpreter whose version is in the range: the current one, a `python3.N` on the path, or one of pyenv's.

    Raises BackendError when there is none.
    """
    from packaging.specifiers import SpecifierSet

    wanted = SpecifierSet(range_)
    if wanted.contains(".".join(map(str, sys.version_info[:3]))):
        return Path(sys.executable)
    for python in _other_pythons():
        code = "import sys; print('.'.join(map(str, sys.version_info[:3])))"
        asked = subprocess.run([python, "-c", code], capture_output=True, text=True)
        if asked.returncode == 0 and wanted.contains(asked.stdout.strip()):
            return python
    raise BackendError(
        f"No Python {range_} was found on this machine.",
        hint="Install one, or install uv, which brings its own: https://docs.astral.sh/uv",
    )


def _other_pythons() -> Iterator[Path]:
    """Interpreters on this machine, newest first."""
    for minor in range(20, 9, -1):
        found = shutil.which(f"python3.{minor}")
        if found:
            yield Path(found)
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from sorted((pyenv / "versions").glob("3.*/bin/python"), reverse=True)


def _check_out(folder: Path, checkout: Checkout, source: Path | None, tell: Callable[[str], None]) -> None:
    """Put the trainer's source at `folder`: a link to `source`, or the recipe's commit."""
    if folder.is_symlink():
        folder.unlink()
    if source is not None:
        if folder.exists():
            raise BackendError(f"{folder} is in the way of a link to {source}.", hint="Move it away and try again.")
        folder.symlink_to(source.absolute(), target_is_directory=True)
        return
    if shutil.which("git") is None:
        raise BackendError("git is not installed, and the trainer comes as a git checkout.", hint="Install git.")
    tell(f"checking out {checkout.repository} at {checkout.commit}")
    if not (folder / ".git").is_dir():
        _step(["git", "clone", "--quiet", checkout.repository, str(folder)], tell)
    _step(["git", "-C", str(folder), "fetch", "--quiet", "origin"], tell)
    _step(["git", "-C", str(folder), "checkout", "--quiet", checkout.commit], tell)


def _configured(name: str) -> Path | None:
    from loraport.spec.load import parse_yaml

    path = home() / "config.yaml"
    if not path.is_file():
        return None
    content = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    named = content.get("python") if isinstance(content, dict) else None
    found = named.get(name) if isinstance(named, dict) else None
    return Path(found) if isinstance(found, str) else None


def _python_in(environment: Path) -> Path:
    return environment / "bin" / "python"


def _names(requirement: str, package: str) -> bool:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    return canonicalize_name(Requirement(requirement).name) == canonicalize_name(package)


def _step(command: list[str], tell: Callable[[str], None]) -> None:
    """Run one installation step, telling its lines. Raises BackendError with the last of them when it fails."""
    last: list[str] = []
    # A repository that wants a password must fail, and not wait for somebody to type it.
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last = [*last[-7:], line.rstrip()]
            tell(line.rstrip())
    if process.returncode:
        raise BackendError(
            "The installation failed:\n    " + "\n    ".join(last),
            hint="The same command goes on where it stopped.",
        )
