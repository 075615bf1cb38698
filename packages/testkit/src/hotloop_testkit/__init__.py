"""Conformance suites that a plugin author subclasses."""
