"""Conformance suites that a plugin author subclasses: `family`, `ops`, `exporters`; and `numerics`, their standard."""

import pytest

pytest.register_assert_rewrite(
    *(f"hotloop_testkit.{name}" for name in ("family", "ops", "exporters", "conformance"))
)
