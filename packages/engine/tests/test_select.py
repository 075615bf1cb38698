"""How an implementation of an op is found."""

from __future__ import annotations

import importlib

import pytest
import torch
from hotloop_core.errors import NoImplementationError, PluginError
from hotloop_engine.ops import _select
from hotloop_engine.ops._select import CUDA, EVERYWHERE, implementation, register

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(_select, "_registered", {})
    _select._find.cache_clear()
    yield
    _select._find.cache_clear()


def test_the_device_decides_where_nothing_is_named():
    fast, plain = object(), object()
    register("twist", "triton", lambda: fast, CUDA)
    register("twist", "reference", lambda: plain, EVERYWHERE)
    assert implementation("twist", GPU) is fast
    assert implementation("twist", CPU) is plain
    assert implementation("twist", GPU, "reference") is plain


def test_an_implementation_registered_later_is_found_by_name_only():
    register("twist", "reference", object, EVERYWHERE)
    first, brought = implementation("twist", CPU), object()
    register("twist", "plugin", lambda: brought, EVERYWHERE)
    assert implementation("twist", CPU, "plugin") is brought
    assert type(implementation("twist", CPU)) is type(first)


def test_a_name_is_registered_once():
    register("twist", "reference", object, EVERYWHERE)
    with pytest.raises(PluginError, match="already has an implementation 'reference'"):
        register("twist", "reference", object, EVERYWHERE)


def test_what_cannot_run_is_refused_and_never_replaced(monkeypatch):
    monkeypatch.setattr(_select, "_triton_interprets", lambda: False)
    register("twist", "triton", object, CUDA)
    with pytest.raises(NoImplementationError, match="cannot run on cpu"):
        implementation("twist", CPU, "triton")
    with pytest.raises(NoImplementationError, match="no implementation for cpu"):
        implementation("twist", CPU)
    with pytest.raises(NoImplementationError, match="no op is called 'twizt'; known: twist"):
        implementation("twizt", CPU)


def test_one_that_cannot_be_loaded_is_refused_with_the_reason():
    register("twist", "triton", lambda: importlib.import_module("no_such_module"), CUDA)
    register("twist", "reference", object, EVERYWHERE)
    with pytest.raises(NoImplementationError, match="No module named 'no_such_module'"):
        implementation("twist", GPU)
