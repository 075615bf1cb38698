"""A family that brings an op of its own, named in its LayerSpec."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hotloop import wiring
from hotloop_core import API, OpSpec, Plugin, Registry, discover
from hotloop_engine.ops import _select
from hotloop_testkit.tiny import batch, build, gradients
from transformers import LlamaConfig


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The calls of an op that a stranger's module `stranger_glu` holds."""
    monkeypatch.setattr(
        _select, "_registered", {k: dict(v) for k, v in _select._registered.items()}
    )
    monkeypatch.setattr(wiring, "_registered_ops", set(wiring._registered_ops))
    reference = _select._registered["glu"]["reference"].load()
    made: list[str] = []

    def counted(name):
        def run(*args, **kwargs):
            made.append(name)
            return getattr(reference, name)(*args, **kwargs)

        return run

    module = SimpleNamespace(forward=counted("forward"), backward_=counted("backward_"))
    monkeypatch.setitem(sys.modules, "stranger_glu", module)
    yield made
    _select._find.cache_clear()


def test_a_layer_runs_the_op_that_its_description_names_unless_the_caller_names_another(calls):
    llama = discover().match({"model_type": "llama"})
    family = replace(llama, layer=replace(llama.layer, ops={"glu": "stranger"}))
    op = OpSpec(
        api=API, op="glu", name="stranger", target="stranger_glu", devices=frozenset({"cpu"})
    )
    plugin = Plugin(name="s", distribution="s", version="1", families=(family,), ops=(op,))
    model = build(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=320,
        )
    )
    inputs = batch("dense", 320)
    expected = gradients(model, inputs)
    receipt = wiring.wire(model, registry=Registry((plugin,)))
    found = gradients(model, inputs)
    assert calls == ["forward"] * 2 + ["backward_"] * 2
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)
    receipt.undo()
    calls.clear()
    wiring.wire(model, registry=Registry((plugin,)), ops={"glu": "reference"})
    gradients(model, inputs)
    assert calls == []
