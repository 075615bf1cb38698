"""4-bit weights that are dequantised once: seen adapters, released memory, and that it happens once."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from hotloop.wiring import wire
from hotloop.wiring.classes import STATE
from hotloop_core import discover
from hotloop_core.plan import KEEP_ALL, LayerPlan, Plan
from hotloop_engine.ops.lora_linear import LinearGroup
from hotloop_engine.ops.nf4 import reference as nf4
from hotloop_testkit.tiny import assert_same_bits, batch, build, gradients, quantise_, with_lora
from transformers import LlamaConfig

READY = LayerPlan(dequantised=True)
LAYERS, PROJECTIONS = 2, 7


def plan(layer):
    return Plan(layers=(layer,) * LAYERS, tokens=80, longest=80)


def four_bit():
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
    )
    spec = next(f for f in discover().families if "llama" in f.model_types)
    return with_lora(quantise_(build(config, seed=0), spec), spec).train()


def kept(model):
    """What the groups of all layers hold between passes."""
    layers = model.get_base_model().model.layers
    made = [m for layer in layers for _, m in layer.__dict__[STATE].made.values()]
    groups = [m for m in made if isinstance(m, LinearGroup)]
    return [g.operand._kept for g in groups if g.operand._kept is not None]


@pytest.fixture
def dequantised(monkeypatch):
    """How many weights were dequantised."""
    seen, forward = [], nf4.forward

    def counting(weight, **options):
        seen.append(weight)
        return forward(weight, **options)

    monkeypatch.setattr(nf4, "forward", counting)
    return seen


def test_each_weight_is_dequantised_once_in_many_steps(dequantised):
    model = four_bit()
    receipt = wire(model, plan(READY))
    for _ in range(3):
        gradients(model, batch("dense", 320))
    assert len(dequantised) == LAYERS * PROJECTIONS
    receipt.replan(plan(KEEP_ALL))
    dequantised.clear()
    gradients(model, batch("dense", 320))
    assert len(dequantised) == 2 * LAYERS * PROJECTIONS
    assert kept(model) == []


def test_an_optimizer_that_tells_torch_nothing_of_its_step_is_seen():
    model = four_bit()
    wire(model, plan(READY))
    inputs = batch("dense", 320)
    gradients(model, inputs)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1.5)  # as a kernel that writes to an address: no version counts it
    found = gradients(model, inputs)
    fresh = four_bit()
    for parameter in fresh.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1.5)
    wire(fresh)
    assert_same_bits(found, gradients(fresh, inputs))


def test_disabled_adapters_are_seen():
    model, plain = four_bit(), four_bit()
    wire(model, plan(READY))
    wire(plain)
    inputs = batch("dense", 320)
    gradients(model, inputs)
    with torch.no_grad(), model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(model(**inputs).loss, plain(**inputs).loss)
    assert_same_bits(gradients(model, inputs), gradients(plain, inputs))


def test_a_first_pass_in_inference_mode_keeps_nothing_that_training_could_not_write_to():
    model = four_bit()
    wire(model, plan(READY))
    inputs = batch("dense", 320)
    with torch.inference_mode():
        model(**inputs)
    assert kept(model) == []
    gradients(model, inputs)
    assert len(kept(model)) == 4 * LAYERS


def test_generation_has_the_memory_back_and_training_goes_on():
    model = four_bit()
    wire(model, plan(READY))
    inputs = batch("dense", 320)
    before = gradients(model, inputs)
    held = [weakref.ref(e) for e in kept(model)]
    model.eval().generate(input_ids=inputs["input_ids"][:, :5], max_new_tokens=3, do_sample=False)
    gc.collect()
    assert [ref for ref in held if ref() is not None] == []
    assert_same_bits(gradients(model.train(), inputs), before)


def test_undo_a_copy_and_a_pickle_hold_none_of_it():
    model = four_bit()
    receipt = wire(model, plan(READY))
    gradients(model, batch("dense", 320))
    held = [weakref.ref(e) for e in kept(model)]
    assert held and kept(copy.deepcopy(model)) == []
    assert len(pickle.dumps(model)) < 2 * sum(p.nbytes for p in model.parameters())
    receipt.undo()
    gc.collect()
    assert [ref for ref in held if ref() is not None] == []
