"""The plugin manager: finds plugins by entry point and collects what they register.

A plugin that fails to import or register is reported by `failures()` and the rest goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import pluggy

from loraport import hookspecs
from loraport.errors import SpecError, unknown

if TYPE_CHECKING:
    import typer

    from loraport.backend import Backend
    from loraport.families import Family
    from loraport.listeners import ListenerFactory
    from loraport.lora.dialect import Dialect
    from loraport.profiles import Measurement, Profile
    from loraport.rules import Rule

GROUP = "loraport"


class Plugins:
    """What is installed. `Plugins()` reads the entry points; tests can pass their own list."""

    def __init__(self, points: list[EntryPoint] | None = None):
        self.manager = pluggy.PluginManager(GROUP)
        self.manager.add_hookspecs(hookspecs)
        self._failures: dict[str, str] = {}
        for point in sorted(entry_points(group=GROUP) if points is None else points, key=lambda point: point.name):
            try:
                self.manager.register(point.load(), point.name)
                self.manager.check_pending()
            except (Exception, SystemExit) as error:  # whatever a stranger's import raises, the rest must go on
                self._failures[point.name] = _in_one_line(error)
                if self.manager.has_plugin(point.name):
                    self.manager.unregister(name=point.name)

    def failures(self) -> dict[str, str]:
        """Plugins that could not be used: entry-point name → the error, in one line."""
        return dict(self._failures)

    def backends(self) -> dict[str, Backend]:
        return self._named("register_backends")

    def backend(self, name: str) -> Backend:
        """The backend of that name. Raises SpecError with the choices, and names plugins that failed to load."""
        found = self.backends()
        if name not in found:
            failed = "; ".join(f"{plugin} ({reason})" for plugin, reason in self._failures.items())
            raise SpecError(
                unknown("Backend", name, found),
                hint=f"Plugins that failed to load: {failed}" if failed else None,
            )
        return found[name]

    def profiles(self) -> dict[tuple[str, str], Profile]:
        """The plugins' profiles, and the user's from `$LORAPORT_HOME/profiles`. SpecError for a broken one."""
        from loraport.envs import home
        from loraport.profiles import user_profiles

        found = self._named("register_profiles", key=lambda profile: (profile.kind, profile.name))
        return found | user_profiles(home() / "profiles", found)

    def measurements(self) -> list[Measurement]:
        found: list[Measurement] = []
        self._call("register_measurements", register=found.append)
        return found

    def dialects(self) -> dict[str, Dialect]:
        return self._named("register_dialects")

    def families(self) -> dict[str, Family]:
        return self._named("register_families")

    def rules(self) -> dict[str, type[Rule]]:
        """The rules for datasets by id, of every family."""
        from loraport.rules import rule_id

        return self._named("register_rules", key=rule_id)

    def listeners(self) -> list[ListenerFactory]:
        found: list[ListenerFactory] = []
        self._call("register_listeners", register=found.append)
        return found

    def add_commands(self, cli: typer.Typer) -> None:
        """Let every plugin add its commands."""
        self._call("register_commands", cli=cli)

    def _named(self, hook: str, key: Callable[[Any], Any] = lambda item: item.name) -> dict[Any, Any]:
        found: dict[Any, Any] = {}

        def register(item: Any) -> None:
            name = key(item)
            if name in found:
                raise ValueError(f"another plugin has registered {name!r} already")
            found[name] = item

        self._call(hook, register=register)
        return found

    def _call(self, hook: str, **arguments: Any) -> None:
        # One plugin at a time, so that a failing one is known by name and stops only itself.
        for implementation in getattr(self.manager.hook, hook).get_hookimpls():
            try:
                implementation.function(**{name: arguments[name] for name in implementation.argnames})
            except (Exception, SystemExit) as error:  # as above
                self._failures[implementation.plugin_name] = f"{hook}: {_in_one_line(error)}"


def _in_one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@cache
def plugins() -> Plugins:
    """The plugins installed in this environment, read once."""
    return Plugins()
