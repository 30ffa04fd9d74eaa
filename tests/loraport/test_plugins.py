"""Plugins come in by entry point; whatever one of them does wrong is reported, and the rest goes on."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from loraport import hookspecs
from loraport.errors import SpecError
from loraport.plugins import GROUP, Plugins, plugins
from loraport.profiles import Profile

DOCS = Path(__file__).parents[2] / "docs" / "plugins.md"

GOOD = """
from types import SimpleNamespace
from loraport.hookspecs import hookimpl

@hookimpl
def register_backends(register):
    register(SimpleNamespace(name="good", version="1", description=""))
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plugins]:
    """Plugins from source texts, by name: `install(good=GOOD, bad="1/0")`."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(**sources: str) -> Plugins:
        points = []
        for name, source in sources.items():
            (tmp_path / f"plugin_under_test_{name}.py").write_text(source)
            monkeypatch.delitem(sys.modules, f"plugin_under_test_{name}", raising=False)
            points.append(EntryPoint(name, f"plugin_under_test_{name}", GROUP))
        return Plugins(points)

    return make


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("1/0", "ZeroDivisionError: division by zero"),
        ("import not_installed_anywhere", "ModuleNotFoundError: No module named 'not_installed_anywhere'"),
        ("def broken(:", "SyntaxError: invalid syntax"),
        ("import sys; sys.exit('no GPU')", "SystemExit: no GPU"),
        ("raise ImportError('one\\n  two')", "ImportError: one two"),
    ],
)
def test_a_plugin_that_fails_to_import_is_reported_in_one_line_and_the_rest_goes_on(
    install: Callable[..., Plugins], source: str, reason: str
) -> None:
    found = install(bad=source, good=GOOD)
    assert list(found.backends()) == ["good"]
    assert found.failures()["bad"].startswith(reason)
    assert "\n" not in found.failures()["bad"]


def test_a_plugin_that_is_not_there_is_reported() -> None:
    found = Plugins([EntryPoint("gone", "no_such_module_anywhere", GROUP)])
    assert "ModuleNotFoundError" in found.failures()["gone"]


@pytest.mark.parametrize(
    ("hook", "body", "reason"),
    [
        ("register_backends", "raise RuntimeError('no luck')", "register_backends: RuntimeError: no luck"),
        ("register_backends", "import sys; sys.exit(3)", "register_backends: SystemExit: 3"),
        ("register_backends", "register(object())", "register_backends: AttributeError"),
        ("register_backends", "register(type('B', (), {'name': 'good'}))", "another plugin has registered 'good'"),
        ("register_profiles", "from loraport.profiles import Profile; Profile('gpu', 'a', 'b')", "Profile kind 'gpu'"),
        ("register_dialects", "register()", "register_dialects: TypeError"),
    ],
)
def test_a_hook_that_fails_is_reported_and_the_rest_goes_on(
    install: Callable[..., Plugins], hook: str, body: str, reason: str
) -> None:
    source = f"from loraport.hookspecs import hookimpl\n@hookimpl\ndef {hook}(register):\n    {body}\n"
    found = install(good=GOOD, late_and_bad=source)
    assert list(found.backends()) == ["good"]
    found.profiles()
    found.dialects()
    assert reason in found.failures()["late_and_bad"]


@pytest.mark.parametrize("hook", ["register_backend(register)", "register_backends(registrar)"])
def test_a_misspelt_hook_is_reported_and_not_passed_over(install: Callable[..., Plugins], hook: str) -> None:
    found = install(bad=f"from loraport.hookspecs import hookimpl\n@hookimpl\ndef {hook}:\n    pass\n", good=GOOD)
    assert "PluginValidationError" in found.failures()["bad"]
    assert [name for name, _ in found.manager.list_name_plugin()] == ["good"]
    assert list(found.backends()) == ["good"]


def test_a_command_that_cannot_be_added_does_not_take_the_others_away(install: Callable[..., Plugins]) -> None:
    bad = "from loraport.hookspecs import hookimpl\n@hookimpl\ndef register_commands(cli):\n    cli.no_such_thing()\n"
    good = (
        "from loraport.hookspecs import hookimpl\n@hookimpl\ndef register_commands(cli):\n"
        "    @cli.command()\n    def hello(): pass\n"
    )
    cli = typer.Typer()
    found = install(bad=bad, good=good)
    found.add_commands(cli)
    assert [command.callback.__name__ for command in cli.registered_commands if command.callback] == ["hello"]
    assert "register_commands: AttributeError" in found.failures()["bad"]


def test_an_unknown_backend_names_the_nearest_and_the_plugins_that_failed(install: Callable[..., Plugins]) -> None:
    with pytest.raises(SpecError) as caught:
        install(good=GOOD, bad="1/0").backend("goood")
    assert "Did you mean 'good'? Choices: good." in str(caught.value)
    assert "bad (ZeroDivisionError: division by zero)" in str(caught.value)


def test_the_built_in_plugins_all_work() -> None:
    found = plugins()
    found.add_commands(typer.Typer())
    assert {"native"} <= set(found.backends())
    assert {"comfyui", "native"} <= set(found.dialects())
    assert {"ideogram4"} <= set(found.families())
    assert ("hardware", "12gb") in found.profiles()
    assert found.listeners()
    assert found.failures() == {}


def test_built_ins_come_in_as_modules_with_hooks_like_anybodys() -> None:
    hooks = set(_hooks())
    for name, plugin in plugins().manager.list_name_plugin():
        assert isinstance(plugin, ModuleType), name
        assert hooks & set(vars(plugin)), name


def _hooks() -> dict[str, Any]:
    return {name: hook for name, hook in vars(hookspecs).items() if hasattr(hook, "loraport_spec")}


@pytest.mark.parametrize("name", _hooks())
def test_every_hook_is_documented_with_its_signature_and_an_example(name: str) -> None:
    hook = _hooks()[name]
    assert (hook.__doc__ or "").strip().endswith(".")
    sections = re.split(r"^## ", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    section = next((section for section in sections if section.startswith(f"`{name}`")), "")
    assert section, f"docs/plugins.md has no section on {name}"
    signature = inspect.signature(hook)
    parameters = ", ".join(f"{each.name}: {each.annotation}" for each in signature.parameters.values())
    assert f"`{name}({parameters})`" in section
    assert "**When:**" in section
    example = re.search(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert example, f"no example for {name}"
    compile(example.group(1), str(DOCS), "exec")


def test_the_documentation_names_no_hook_that_is_gone() -> None:
    named = re.findall(r"^## `(register_\w+)`", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(named) == sorted(_hooks())


@pytest.mark.parametrize("name", _hooks())
def test_every_documented_example_registers_without_a_failure(name: str, install: Callable[..., Plugins]) -> None:
    sections = re.split(r"^## ", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    section = next(section for section in sections if section.startswith(f"`{name}`"))
    example = re.search(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert example
    found = install(example=example.group(1))
    found.add_commands(typer.Typer())
    registered = [found.backends(), found.profiles(), found.measurements(), found.dialects(), found.families()]
    registered += [found.rules(), found.listeners()]
    assert found.failures() == {}
    assert name == "register_commands" or sum(map(len, registered)) >= 1


def test_a_hardware_profile_may_set_only_fields_of_memory() -> None:
    Profile("hardware", "a", "b", {"quantize": "nf4"})
    with pytest.raises(ValueError, match=r"sets memory\.rank, which it cannot"):
        Profile("hardware", "a", "b", {"rank": 4})
    with pytest.raises(ValueError, match=r"sets memory\.quantize, which it cannot"):
        Profile("offload", "a", "b", {"quantize": "nf4"})
    with pytest.raises(ValueError, match="must set storage and compute"):
        Profile("quantize", "a", "b", {"storage": "nf4"})
