"""What every suite of the kit shares: its checks stay in force, and a plugin's import stays light."""

from __future__ import annotations

import importlib.metadata
import inspect
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from hotloop_core import discover
from hotloop_core.hooks import GROUP

if TYPE_CHECKING:
    from collections.abc import Callable

HEAVY = ("torch", "transformers", "triton", "peft")
"""What importing a plugin may not load: torch alone takes seconds."""


class WeakenedError(TypeError):
    """A suite was subclassed with a check deleted, replaced or switched off."""


_SUITES: dict[type, dict[str, Callable[..., object]]] = {}
"""Suite of the kit -> its checks, and the helpers that they call, by name."""


class Conformance:
    """The parent of the suites. Subclass a suite, set what it asks for, and keep its checks.

    A check that cannot pass is marked as expected to fail, with the reason, and still runs:

        @pytest.mark.xfail(reason="no bf16 on this card: issue 12")
        def test_x(self): super().test_x()

    Anything else that takes a check away raises WeakenedError when the class is made, or fails the check when it runs.
    """

    def __init_subclass__(cls, *, kit: bool = False, **kwargs: Any) -> None:
        """kit: this class is a suite of the kit, whose methods become checks (`test_...`) and their helpers."""
        super().__init_subclass__(**kwargs)
        _require_all(cls)
        if kit:
            _SUITES[cls] = _guarded(cls)
            return
        if vars(cls).get("__test__", True) is not True:
            raise WeakenedError(
                f"{cls.__name__}: __test__ = False switches off the whole suite. Remove it; a class that others share "
                "needs only a name that does not begin with Test"
            )
        for mark in _marks(vars(cls).get("pytestmark", ())):
            if mark.name in {"skip", "skipif", "xfail"}:
                raise WeakenedError(
                    f"{cls.__name__}: pytestmark {mark.name!r} switches off the whole suite; mark the one check that "
                    "cannot pass as xfail with a reason"
                )

    def test_every_check_is_in_force(self) -> None:
        """Catches what was taken away after the class was made."""
        _require_all(type(self))


def checks_of(cls: type) -> dict[str, Callable[..., object]]:
    """What a class may not take away: the checks of the kit's suites above it, and the helpers that they call."""
    above = (_SUITES.get(suite, {}) for suite in cls.__mro__)
    return {name: check for checks in above for name, check in checks.items()}


def _guarded(suite: type) -> dict[str, Callable[..., object]]:
    return {
        name: value
        for name, value in vars(suite).items()
        if callable(value) and name.startswith(("test_", "_")) and not name.startswith("__")
    }


_SUITES[Conformance] = _guarded(Conformance)


def _require_all(cls: type) -> None:
    for name, check in checks_of(cls).items():
        found = inspect.getattr_static(cls, name, None)
        if found is not check and not _expected_to_fail(name, found):
            done = "deleted" if found is None else "replaced"
            if name.startswith("_"):
                raise WeakenedError(
                    f"{cls.__name__}.{name}: a helper of the kit's checks was {done}. Give yours another name; what "
                    "only one check needs belongs into an xfail of that check"
                )
            raise WeakenedError(
                f"{cls.__name__}.{name}: a check of the kit was {done}. Keep it; where it cannot pass, override it "
                "with @pytest.mark.xfail(reason=...) and call super()"
            )


def _expected_to_fail(name: str, found: Any) -> bool:
    """Whether a check was overridden as it may be: an xfail with a reason, which still runs what it overrides."""
    marks = _marks(getattr(found, "pytestmark", ()))
    xfails = [mark for mark in marks if mark.name == "xfail"]
    return (
        name.startswith("test_")
        and bool(xfails)
        and all(
            str(m.kwargs.get("reason", "")).strip() and m.kwargs.get("run", True) for m in xfails
        )
        and not any(mark.name.startswith("skip") for mark in marks)
        and name in getattr(getattr(found, "__code__", None), "co_names", ())
    )


def _marks(found: Any) -> list[Any]:
    return [*found] if isinstance(found, list | tuple) else [found]


class NotInstalledError(pytest.skip.Exception):
    """What a check needs and the environment has not; the one reason for which the kit itself skips a check."""


def switched_off(item: pytest.Item, error: BaseException | None) -> str | None:
    """How a check of the kit was kept from counting where it ran, by a mark, a fixture or a config; None if it was not.

    error: what the check, or what prepares it, raised.
    """
    cls = getattr(item, "cls", None)
    name = getattr(item, "originalname", "")
    if cls is None or name not in checks_of(cls):
        return None
    own = _marks(getattr(getattr(cls, name), "pytestmark", ()))
    if any(mark not in own for mark in item.iter_markers("xfail")):
        return "an xfail mark that is not the check's own"
    if isinstance(error, pytest.xfail.Exception) and not any(m.name == "xfail" for m in own):
        return f"pytest.xfail({str(error)!r})"
    needless = not isinstance(error, NotInstalledError) and item.get_closest_marker("gpu") is None
    return f"a skip ({error})" if isinstance(error, pytest.skip.Exception) and needless else None


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
