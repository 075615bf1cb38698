"""Weights that live on the host: the wired model trains with the bits of a resident one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hotloop import add_lora
from hotloop.homes import homes_of, settle
from hotloop.planner import Request
from hotloop.planner import plan as make_plan
from hotloop.planner.task import Task
from hotloop.wiring import receipt_of, wire
from hotloop.wiring.classes import STATE
from hotloop_core.errors import BudgetError, PlanError
from hotloop_core.plan import KEEP_ALL, RECOMPUTE_ALL, LayerPlan, Placement, Plan
from hotloop_engine.ops.lora_linear import LinearGroup
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS = 4
OFFLOAD_X = LayerPlan(placements={**RECOMPUTE_ALL.placements, "x": Placement.OFFLOAD})
AGAIN_X = LayerPlan(placements={**RECOMPUTE_ALL.placements, "x": Placement.RECOMPUTE})
PLANS = {
    "keep": [KEEP_ALL] * LAYERS,
    "recompute": [RECOMPUTE_ALL] * LAYERS,
    "offload": [OFFLOAD_X] * LAYERS,
    "inputs from below": [OFFLOAD_X, AGAIN_X, AGAIN_X, AGAIN_X],
}


def tiny(tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=101,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    return model.requires_grad_(False)


def with_lora(model):
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, config)


def train(model):
    ids = torch.randint(0, 101, (2, 17), generator=torch.Generator().manual_seed(3))
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def plan_of(layers, streamed, **changes):
    parts = [replace(layer, streamed=i in streamed) for i, layer in enumerate(layers)]
    return Plan(layers=tuple(parts), tokens=34, longest=17, **changes)


@pytest.mark.parametrize("layers", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("streamed", [range(LAYERS), {1, 2}], ids=["all", "some"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_streamed_weights_give_the_bits_of_resident_ones(layers, streamed, tied):
    resident = with_lora(tiny(tied))
    wire(resident, plan_of(layers, ()))
    expected = train(resident)
    model = tiny(tied)
    plan = plan_of(layers, streamed, embedding_on_host=True, head_on_host=True)
    homes = settle(model, plan)
    wire(model, plan)
    model = with_lora(model)
    for _ in range(2):
        found = train(model)
        assert found.keys() == expected.keys()
        assert [n for n in found if not torch.equal(found[n], expected[n])] == []
    generated = model.generate(torch.arange(5)[None], max_new_tokens=5, do_sample=False)
    assert torch.equal(
        generated, resident.generate(torch.arange(5)[None], max_new_tokens=5, do_sample=False)
    )
    receipt_of(model).undo()
    homes.undo()
    assert homes_of(model) is None


def trained_from_the_host():
    """A model all of whose layers stream, after one step; and its homes."""
    model = tiny()
    plan = plan_of(PLANS["recompute"], range(LAYERS))
    homes = settle(model, plan)
    wire(model, plan)
    model = with_lora(model)
    train(model)
    return model, homes


def test_a_pass_fetches_each_streamed_layer_once_and_turns_round_without_a_reload():
    model, homes = trained_from_the_host()
    before = homes._store.statistics()
    train(model)
    after = homes._store.statistics()
    # Two slots: forward brings four layers (two may still be there), backward the two that gave way.
    assert after.loads - before.loads <= 2 * LAYERS - 2
    assert after.stalls - before.stalls <= 1


def test_blocks_multiply_by_the_fetched_copy_and_not_by_host_memory():
    """On a CPU both hold the same values; a card would read the host's memory over the link, or refuse."""
    model, homes = trained_from_the_host()
    for index, layer in enumerate(model.get_base_model().model.layers):
        made = layer.__dict__[STATE].made
        groups = [value for _, value in made.values() if isinstance(value, LinearGroup)]
        found = {view.weight.data_ptr() for group in groups for view in group.views}
        assert found == {tensor.data_ptr() for tensor in homes.views(index)}


def test_wiring_before_settling_is_refused():
    model = tiny()
    wire(model)
    with pytest.raises(Exception, match="settle its weights before"):
        settle(model, plan_of(PLANS["keep"], range(LAYERS)))


def test_a_host_that_cannot_hold_more_leaves_the_weights_where_they_are(monkeypatch):
    from hotloop_engine.stores import StreamedWeights

    model = tiny()
    plan = plan_of(PLANS["recompute"], {1})
    homes = settle(model, plan)
    wire(model, plan)
    model = with_lora(model)
    expected = train(model)
    add, asked = StreamedWeights.add_layer, []

    def refuse_the_third(store, tensors):
        asked.append(tensors)
        if len(asked) == 3:
            raise BudgetError("no more")
        return add(store, tensors)

    monkeypatch.setattr(StreamedWeights, "add_layer", refuse_the_third)
    more = plan_of(PLANS["recompute"], range(LAYERS), embedding_on_host=True)
    with pytest.raises(BudgetError, match="no more"):
        homes.move(more)
    assert homes.layers == (1,)
    found = train(model)
    assert [n for n in found if not torch.equal(found[n], expected[n])] == []
    monkeypatch.undo()
    homes.move(more)
    found = train(model)
    assert [n for n in found if not torch.equal(found[n], expected[n])] == []
    with pytest.raises(PlanError, match="brings weights back"):
        homes.move(plan)


@pytest.mark.parametrize("from_the_start", [(), {1}], ids=["resident", "one streamed"])
def test_a_batch_that_does_not_fit_moves_further_weights_to_the_host(from_the_start):
    from hotloop.planner import plan, plan_larger

    model = tiny()
    wide = {"lora": 4, "dtype": "float32", "bits": 16, "host": "8GiB"}
    small = plan(model, tokens=34, longest=17, vram="1GiB", **wide)
    small = replace(
        small,
        layers=tuple(replace(m, streamed=i in from_the_start) for i, m in enumerate(small.layers)),
    )
    resident = with_lora(tiny())
    wire(resident)
    settle(model, small)
    wire(model, small)
    model = with_lora(model)
    ids = torch.randint(0, 101, (8, 64), generator=torch.Generator().manual_seed(3))

    def run(one):
        one.zero_grad(set_to_none=True)
        loss = one(input_ids=ids, labels=ids).loss
        loss.backward()
        return {n: p.grad.clone() for n, p in one.named_parameters() if p.grad is not None}

    expected = run(resident)

    def fits(budget):
        try:
            return plan_larger(model, replace(small, budget=budget), tokens=512, longest=64)
        except BudgetError:
            return None

    low, high = 2**20, 2**30
    while high - low > 1000:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    # A little less than any plan needs with the weights where they are.
    shared = receipt_of(model).shared
    shared.plan = replace(small, budget=high - 90_000)
    found = run(model.train())
    homes = homes_of(model)
    assert set(homes.layers) > set(from_the_start) and shared.homes is homes
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


def test_adapters_that_leave_no_room_move_further_weights_to_the_host():
    job = {"tokens": 34, "longest": 17, "bits": 16, "dtype": "float32", "host": "1GiB"}
    config = tiny().config.to_dict()
    budget = Task.of(config, Request(lora=64, **job)).least()[0]
    roomy = make_plan(config, lora=1, vram=budget, **job)
    model = tiny()
    settle(model, roomy)
    wire(model, roomy)
    with pytest.raises(BudgetError):
        make_plan(model, tokens=34, longest=17, lora=64, vram=budget, homes=roomy)
    adapted = add_lora(model, r=64)
    planned = receipt_of(adapted).plan
    assert planned.peak_bytes <= budget
    away = {i for i, layer in enumerate(planned.layers) if layer.streamed}
    assert away > {i for i, layer in enumerate(roomy.layers) if layer.streamed} or (
        planned.embedding_on_host,
        planned.head_on_host,
    ) > (roomy.embedding_on_host, roomy.head_on_host)
    assert homes_of(adapted).hold(planned)
    found = train(adapted)
    resident = add_lora(tiny(), r=64)
    wire(resident, plan_of(PLANS["keep"], ()))
    expected = train(resident)
    torch.testing.assert_close(found["loss"], expected["loss"])
