from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from hotloop.verification.report import Row
from hotloop_testkit.conformance import (
    Conformance,
    WeakenedError,
    assert_import_is_light,
    checks_of,
)
from hotloop_testkit.family import FamilyConformance, _verified


def check(*marks):
    """A check of its own with these marks: they stick to the function."""

    def passes(self):
        pass

    for mark in marks:
        passes = mark(passes)
    return passes


def calls(*marks):
    """An override of `test_one` with these marks that runs what it overrides."""

    def passes(self):
        Suite.test_one(self)

    for mark in marks:
        passes = mark(passes)
    return passes


class Suite(Conformance, kit=True):
    def test_one(self):
        self._helper()

    def _helper(self):
        pass

    def test_two(self):
        pass


def test_a_subclass_that_keeps_every_check_is_accepted():
    class Mine(Suite):
        def test_of_my_own(self):
            pass

    Mine().test_every_check_is_in_force()


XFAIL = pytest.mark.xfail(reason="no such kernel yet: issue 12")


@pytest.mark.parametrize(
    "weakened",
    [
        {"test_one": None},
        {"test_one": calls()},
        {"test_one": check(XFAIL)},
        {"test_one": calls(pytest.mark.xfail)},
        {"test_one": calls(pytest.mark.xfail(reason=" "))},
        {"test_one": calls(pytest.mark.xfail(reason="it crashes", run=False))},
        {"test_one": calls(pytest.mark.skip(reason="slow"))},
        {"test_one": calls(XFAIL, pytest.mark.skip)},
        {"_helper": calls(XFAIL)},
        {"test_every_check_is_in_force": check()},
        {"pytestmark": pytest.mark.skip(reason="later")},
        {"pytestmark": [pytest.mark.gpu, pytest.mark.xfail(reason="all of it")]},
    ],
)
def test_a_check_that_is_taken_away_is_an_error(weakened):
    with pytest.raises(WeakenedError, match=r"Keep it|another name|mark the one"):
        type("Mine", (Suite,), weakened)


def test_an_xfail_with_a_reason_and_other_marks_are_accepted():
    type("Mine", (Suite,), {"test_one": calls(XFAIL), "pytestmark": pytest.mark.gpu})


def test_a_suite_is_not_switched_off_as_a_class_that_pytest_passes_by():
    with pytest.raises(WeakenedError, match="Remove it"):
        type("Mine", (Suite,), {"__test__": False})


def test_a_suite_of_ones_own_takes_nothing_away():
    with pytest.raises(WeakenedError, match="test_one"):
        type("Mine", (Suite,), {"test_one": None}, kit=True)

    class More(Suite, kit=True):
        def test_three(self):
            pass

    assert {"test_one", "test_three", "test_every_check_is_in_force"} <= checks_of(More).keys()
    with pytest.raises(WeakenedError, match="test_three"):
        type("Mine", (More,), {"test_three": None})


def test_a_check_taken_away_later_is_found_when_the_suite_runs(monkeypatch):
    class Mine(Suite):
        pass

    monkeypatch.delattr(Suite, "test_two")
    with pytest.raises(WeakenedError, match="test_two: a check of the kit was deleted"):
        Mine().test_every_check_is_in_force()


def test_a_subclass_of_a_subclass_is_checked_too():
    class Mine(Suite):
        pass

    with pytest.raises(WeakenedError):
        type("Yours", (Mine,), {"test_two": None})


def test_the_suites_have_checks():
    checks = checks_of(FamilyConformance)
    assert len(checks) > 15 and "test_every_check_is_in_force" in checks


def test_a_heavy_import_is_named(tmp_path, monkeypatch):
    (tmp_path / "heavy_plugin.py").write_text("import torch\n")
    (tmp_path / "light_plugin.py").write_text("import json\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert_import_is_light("light_plugin")
    with pytest.raises(AssertionError, match="heavy_plugin loads torch"):
        assert_import_is_light("heavy_plugin")


@dataclass(frozen=True)
class Verified:
    """What `verify` found in one draw: the error of one gradient, where 1.3 is allowed."""

    ours: float

    @property
    def rows(self):
        return (Row(name="w", ours=self.ours, eager=1.0, allowed=1.3),)

    @property
    def ok(self):
        return all(row.ok for row in self.rows)


@pytest.mark.parametrize(
    "errors, accepted",
    [
        ([1.2], True),
        ([1.36, 0.9, 0.9, 1.2, 1.0], True),
        ([1.36, 1.3, 1.35, 1.29, 1.31], False),
        ([2.5, 1.0, 1.0, 1.0, 1.0], False),
        ([float("inf"), 1.0, 1.0, 1.0, 1.0], False),
    ],
)
def test_a_gradient_is_worse_than_eagers_if_it_is_so_over_several_draws(
    errors, accepted, monkeypatch
):
    drawn = []
    monkeypatch.setattr(
        "hotloop.verification.verify", lambda number, _, **options: Verified(errors[number])
    )

    def draw(number):
        drawn.append(number)
        return number, None

    outcome = nullcontext() if accepted else pytest.raises(AssertionError, match="w are worse")
    with outcome:
        _verified(draw, torch.bfloat16)
    assert drawn == list(range(len(errors)))
