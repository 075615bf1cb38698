"""`hotloop plugins`: what it says of plugins that are broken, empty or in each other's way."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import typer
from hotloop.cli import plugins as command
from hotloop_core import Plugin, Registry, discover
from typer.testing import CliRunner

TRACE = "Traceback (most recent call last):\n  File of theirs\nRuntimeError: no such luck"


@pytest.fixture
def listed(monkeypatch):
    """What the command prints where some plugins are installed."""

    def run(*plugins: Plugin) -> str:
        module = sys.modules[command.__module__]  # hotloop.cli.plugins itself is the command
        monkeypatch.setattr(module, "discover", lambda **_: Registry(plugins))
        app = typer.Typer()
        app.command()(command)
        done = CliRunner().invoke(app, [])
        assert done.exit_code == 0, done.output
        return " ".join(done.output.split())

    return run


def plugin(**brings):
    return Plugin(name="mine", distribution="hotloop-mine", version="1.2", **brings)


def test_an_error_that_says_what_to_do_is_shown_without_a_traceback(listed):
    found = listed(plugin(problem="SpecVersionError: Upgrade: `uv add x`.", trace=TRACE))
    assert "mine (hotloop-mine 1.2) is broken" in found
    assert "Upgrade: `uv add x`." in found and "Traceback" not in found


def test_an_error_of_the_plugins_own_is_shown_with_its_traceback(listed):
    assert "File of theirs" in listed(plugin(problem="RuntimeError: no such luck", trace=TRACE))


def test_a_plugin_whose_hooks_return_nothing_is_not_called_ok(listed):
    found = listed(plugin())
    assert "brings nothing" in found and "ok" not in found


def test_a_type_that_two_families_claim_is_named_with_both(listed):
    llama = discover().match({"model_type": "llama"})
    first, second = plugin(families=(llama,)), plugin(families=(replace(llama, name="mine"),))
    found = listed(first, replace(second, distribution="other"))
    assert "model_type='llama' is claimed by 'llama' (hotloop-mine) and 'mine' (other)" in found
    assert "--family NAME" in found
