"""The suites on what this project brings itself, and on broken things that they must find."""

from __future__ import annotations

import dataclasses

import pytest
from hotloop_core import discover
from hotloop_engine.ops import _select
from hotloop_testkit.exporters import ExporterConformance
from hotloop_testkit.family import FamilyConformance
from hotloop_testkit.ops import OpConformance
from transformers import LlamaConfig


class TestRmsNormInTriton(OpConformance):
    op, impl = "rms_norm", "triton"


class TestGluInTriton(OpConformance):
    op, impl = "glu", "triton"


class TestRopeInTriton(OpConformance):
    op, impl = "rope", "triton"


class TestLayerNormInTriton(OpConformance):
    op, impl = "layer_norm", "triton"


class TestNf4InTriton(OpConformance):
    op, impl = "nf4", "triton"


class TestCrossEntropyRowsInTriton(OpConformance):
    op, impl = "linear_cross_entropy", "triton"


class TestSafetensors(ExporterConformance):
    spec = discover().exporter("safetensors")
    quant = "32bit"


class TestGguf(ExporterConformance):
    spec = discover().exporter("gguf")


class Broken:
    """The reference, but for one function."""

    def __init__(self, op, **replaced):
        reference = _select._registered[op]["reference"].load()
        self.forward = replaced.get("forward", reference.forward)
        self.backward = replaced.get("backward", reference.backward)


@pytest.fixture
def register(monkeypatch):
    def add(op, name, thing):
        monkeypatch.setitem(_select._registered, op, {**_select._registered[op]})
        _select.register(op, name, lambda: thing, frozenset({"cpu"}))

    yield add
    _select._find.cache_clear()


def suite(op):
    # made here, so that pytest does not collect it
    return type("Mine", (OpConformance,), {"op": op, "impl": "broken"})()


def test_the_op_suite_finds_a_wrong_gradient(register):
    reference = _select._registered["rms_norm"]["reference"].load()

    def backward(dy, *args, **kwargs):
        dx, dw = reference.backward(dy, *args, **kwargs)
        return dx.mul_(1.001), dw

    register("rms_norm", "broken", Broken("rms_norm", backward=backward))
    with pytest.raises(AssertionError, match="worse than eager"):
        suite("rms_norm").test_it_is_no_worse_than_the_reference(5, 100, "float32")


def test_the_op_suite_finds_a_write_beside_the_buffer(register):
    reference = _select._registered["rms_norm"]["reference"].load()

    def forward(x, *args, out=None, **kwargs):
        found = reference.forward(x, *args, out=out, **kwargs)
        if out is not None:
            out.as_strided((out.shape[0], out.stride(0)), (out.stride(0), 1))[:, out.shape[1]] = 0
        return found

    register("rms_norm", "broken", Broken("rms_norm", forward=forward))
    checks = suite("rms_norm")
    with pytest.raises(AssertionError, match="written beside"):
        checks.test_strided_inputs_and_buffers_give_the_same_bits_and_nothing_else_is_touched()


def test_the_op_suite_finds_swapped_nibbles(register):
    reference = _select._registered["nf4"]["reference"].load()

    class Swapped:
        def forward(self, weight, *, out):
            packed = (weight.packed >> 4) | (weight.packed << 4)
            return reference.forward(dataclasses.replace(weight, packed=packed), out=out)

    register("nf4", "broken", Swapped())
    with pytest.raises(AssertionError, match="plain: error"):
        suite("nf4").test_it_is_no_worse_than_the_reference(5, 100, "float32")


def test_the_op_suite_finds_a_missing_entropy_gradient(register):
    reference = _select._registered["linear_cross_entropy"]["reference"].load()

    class NoEntropy:
        forward_ = staticmethod(reference.forward_)
        scale_rows_ = staticmethod(reference.scale_rows_)

        def backward_(self, *args, dentropy_T, **kwargs):
            reference.backward_(*args, dentropy_T=None, **kwargs)

    register("linear_cross_entropy", "broken", NoEntropy())
    with pytest.raises(AssertionError, match="plain dlogits: error"):
        suite("linear_cross_entropy").test_it_is_no_worse_than_the_reference(5, 100, "float32")


def test_the_family_suite_finds_a_description_that_does_not_fit():
    spec = discover().match({"model_type": "llama"})
    layer = dataclasses.replace(
        spec.layer, norms=dataclasses.replace(spec.layer.norms, offset=1.0, before_mlp=None)
    )
    wrong = dataclasses.replace(spec, layer=layer)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=320,
    )
    checks = type(
        "Mine", (FamilyConformance,), {"spec": wrong, "tiny_config": lambda self: config}
    )()
    with pytest.raises(Exception, match="does not claim: post_attention_layernorm"):
        checks.test_every_layer_is_covered_and_nothing_is_claimed_twice()
    with pytest.raises(AssertionError, match="no installed plugin offers"):
        checks.test_the_plugin_is_installed_and_its_import_is_light()
