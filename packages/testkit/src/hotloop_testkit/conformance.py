"""What every suite of the kit shares: its checks stay in force, and a plugin's import stays light."""

from __future__ import annotations

import importlib.metadata
import inspect
import subprocess
import sys
from typing import TYPE_CHECKING, Any, ClassVar

from hotloop_core import discover
from hotloop_core.hooks import GROUP

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

HEAVY = ("torch", "transformers", "triton", "peft")
"""What importing a plugin may not load: torch alone takes seconds."""


class WeakenedError(TypeError):
    """A suite was subclassed with a check deleted, replaced or switched off."""


class Conformance:
    """The parent of the suites. Subclass a suite, set what it asks for, and keep its checks.

    A check that cannot pass is marked as expected to fail, with the reason, and still runs:

        @pytest.mark.xfail(reason="no bf16 on this card: issue 12")
        def test_x(self): super().test_x()

    Anything else that takes a check away raises WeakenedError when the class is made.
    """

    checks: ClassVar[Mapping[str, Callable[..., object]]] = {}

    def __init_subclass__(cls, *, kit: bool = False, **kwargs: Any) -> None:
        """kit: this class is a suite of the kit, whose `test_` methods become checks."""
        super().__init_subclass__(**kwargs)
        if kit:
            own = {name: value for name, value in vars(cls).items() if name.startswith("test_")}
            cls.checks = {**cls.checks, **own}
            return
        for name, check in cls.checks.items():
            _require(cls, name, check)
        for mark in _marks(vars(cls).get("pytestmark", ())):
            if mark.name in {"skip", "skipif", "xfail"}:
                raise WeakenedError(
                    f"{cls.__name__}: pytestmark {mark.name!r} switches off the whole suite; mark the one check that "
                    "cannot pass as xfail with a reason"
                )

    def test_every_check_is_in_force(self) -> None:
        """Catches what was taken away after the class was made."""
        for name, check in type(self).checks.items():
            _require(type(self), name, check)


Conformance.checks = {"test_every_check_is_in_force": Conformance.test_every_check_is_in_force}


def _require(cls: type, name: str, check: Callable[..., object]) -> None:
    found = inspect.getattr_static(cls, name, None)
    if found is check:
        return
    marks = _marks(getattr(found, "pytestmark", ()))
    expected = [m for m in marks if m.name == "xfail" and str(m.kwargs.get("reason", "")).strip()]
    if callable(found) and expected and not any(m.name.startswith("skip") for m in marks):
        return
    raise WeakenedError(
        f"{cls.__name__}.{name}: a check of the kit was {'deleted' if found is None else 'replaced'}. Keep it; where "
        "it cannot pass, override it with @pytest.mark.xfail(reason=...) and call super()"
    )


def _marks(found: Any) -> list[Any]:
    return [*found] if isinstance(found, list | tuple) else [found]


def module_of(plugin: str) -> str:
    """The module that an installed plugin's entry point names."""
    points = importlib.metadata.entry_points(group=GROUP, name=plugin)
    return next(iter(points)).module


def plugin_with(kind: str, spec: object) -> str:
    """The name of the installed plugin whose `kind` ("families", "exporters", "ops") hold this spec.

    Raises:
        AssertionError: none does, with what is installed and what is broken.
    """
    plugins = discover().plugins
    names = [p.name for p in plugins if any(found is spec for found in getattr(p, kind))]
    broken = {p.name: p.problem for p in plugins if p.problem}
    assert names, (
        f"no installed plugin offers {spec!r}; installed: {[p.name for p in plugins]}, broken: {broken}. Install the "
        f"package (`uv pip install -e .`) and check its entry point in the group {GROUP!r}"
    )
    assert len(names) == 1, f"offered by several plugins: {names}"
    return names[0]


def assert_import_is_light(module: str) -> None:
    """Imports a module in a fresh interpreter; fails if it loads one of HEAVY."""
    program = f"import sys, {module}; print(*(m for m in {HEAVY!r} if m in sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, f"importing {module} failed:\n{run.stderr}"
    loaded = run.stdout.split()
    assert not loaded, (
        f"importing {module} loads {', '.join(loaded)}; import these inside functions"
    )
