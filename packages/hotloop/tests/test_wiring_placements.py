"""Wherever a tensor waits between forward and backward, the gradients are the same."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from hotloop.wiring import receipt_of, wire
from hotloop_core.errors import PlanError
from hotloop_core.plan import KEEP_ALL, RECOMPUTE_ALL, LayerPlan, Placement, Plan
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

KEEP, OFFLOAD, RECOMPUTE = Placement.KEEP, Placement.OFFLOAD, Placement.RECOMPUTE
NAMES = ("x", "qkv", "attention", "attention_out", "x_mid", "gate_up", "mlp_out")
LAYERS = 4


def all_of(placement, **others):
    return LayerPlan(placements={**dict.fromkeys(NAMES, placement), **others})


PLANS = {
    "offload": [all_of(OFFLOAD)] * LAYERS,
    "offload x": [replace(RECOMPUTE_ALL, placements={**RECOMPUTE_ALL.placements, "x": OFFLOAD})]
    * LAYERS,
    "every other x": [all_of(RECOMPUTE, x=KEEP), all_of(RECOMPUTE)] * 2,
    "one x of four": [all_of(RECOMPUTE, x=OFFLOAD), *[all_of(RECOMPUTE)] * 3],
    "x of a layer that keeps": [KEEP_ALL, all_of(KEEP, x=RECOMPUTE)] * 2,
    "x of a layer that offloads": [all_of(OFFLOAD), all_of(OFFLOAD, x=RECOMPUTE)] * 2,
    **{
        f"{placement} {name}": [LayerPlan(placements={name: placement})] * LAYERS
        for name in NAMES[1:]
        for placement in (OFFLOAD, RECOMPUTE)
    },
}
FAMILIES = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "attn_implementation": "eager",
    },
}


def tiny(family, **changes):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 101,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(family, **{**sizes, **FAMILIES[family], **changes})
    return AutoModelForCausalLM.from_config(config)


def with_lora(model, **changes):
    torch.manual_seed(1)
    config = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    return get_peft_model(model, LoraConfig(**{**config, **changes}))


def plan_of(layers, **changes):
    return Plan(layers=tuple(layers), tokens=34, longest=17, **changes)


def gradients(model, seed=5):
    model.zero_grad(set_to_none=True)
    ids = torch.randint(0, 101, (2, 17), generator=torch.Generator().manual_seed(3))
    torch.manual_seed(seed)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def same_bits(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.fixture(scope="module", params=FAMILIES)
def wired(request):
    model = with_lora(tiny(request.param), lora_dropout=0.1).train()
    receipt = wire(model, plan_of([KEEP_ALL] * LAYERS))
    return model, receipt, gradients(model)


@pytest.mark.parametrize("layers", PLANS.values(), ids=PLANS)
def test_every_placement_gives_the_bits_of_keeping_everything(wired, layers):
    model, receipt, kept = wired
    receipt.replan(plan_of(layers))
    same_bits(gradients(model), kept)


@pytest.mark.parametrize("name", ["offload", "every other x", "offload x"])
def test_gradients_add_up_over_steps(wired, name):
    model, receipt, _ = wired

    def two():
        first = gradients(model)
        ids = torch.arange(22).view(2, 11)
        torch.manual_seed(9)
        model(input_ids=ids, labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if n in first}

    receipt.replan(plan_of([KEEP_ALL] * LAYERS))
    kept = two()
    receipt.replan(plan_of(PLANS[name]))
    same_bits(two(), kept)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("tile", [1, 8, 17, 33])
def test_tiles_change_nothing_but_the_order_of_sums(family, lora, tile):
    model = tiny(family)
    model = with_lora(model) if lora else model
    whole = [RECOMPUTE_ALL] * LAYERS
    receipt = wire(model, plan_of(whole))
    expected = gradients(model)
    for layers in (whole, [all_of(RECOMPUTE, x=OFFLOAD), all_of(RECOMPUTE)] * 2):
        receipt.replan(plan_of(layers, tile=tile))
        found = gradients(model)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=2e-4, atol=2e-5)


def test_tiles_draw_dropout_masks_that_backward_draws_again():
    model = with_lora(tiny("llama"), lora_dropout=0.5).train()
    receipt = wire(model, plan_of([KEEP_ALL] * LAYERS, tile=8))
    once = gradients(model)
    receipt.replan(plan_of([all_of(RECOMPUTE, x=OFFLOAD), *[all_of(RECOMPUTE)] * 3], tile=8))
    same_bits(gradients(model), once)
    differing = gradients(model, seed=6)
    assert not torch.equal(differing["loss"], once["loss"])


def test_an_input_that_somebody_replaced_is_stored_instead_of_recomputed():
    model = with_lora(tiny("llama"))
    receipt = wire(model, plan_of([KEEP_ALL] * LAYERS))
    layers = model.get_base_model().model.layers
    handle = layers[1].register_forward_pre_hook(lambda m, a: (a[0] * 2.0, *a[1:]))
    try:
        kept = gradients(model)
        receipt.replan(plan_of([all_of(RECOMPUTE, x=KEEP), *[all_of(RECOMPUTE)] * 3]))
        same_bits(gradients(model), kept)
    finally:
        handle.remove()


def test_an_exception_in_the_middle_leaves_the_store_empty():
    model = with_lora(tiny("llama"))
    wire(model, plan_of(PLANS["offload"]))
    expected = gradients(model)
    norm = model.get_base_model().model.norm
    handle = norm.register_forward_pre_hook(lambda *a: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        gradients(model)
    handle.remove()
    gc.collect()
    same_bits(gradients(model), expected)
    store = receipt_of(model).store
    statistics = store.statistics()
    assert statistics.held_bytes == 0 and statistics.grown == 0
    assert statistics.bytes_back < statistics.bytes_out, "the step that failed took nothing back"


def test_a_second_backward_through_offloaded_tensors_is_refused_by_name():
    model = with_lora(tiny("llama"))
    wire(model, plan_of(PLANS["offload"]))
    decoder = model.get_base_model().model
    loss = decoder(torch.arange(20).view(1, 20), use_cache=False).last_hidden_state.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(PlanError, match="second time"):
        loss.backward()


def test_evaluation_puts_nothing_into_the_store():
    model = with_lora(tiny("llama"))
    wire(model, plan_of(PLANS["offload"]))
    gradients(model)
    before = receipt_of(model).store.statistics().tensors
    with torch.no_grad():
        model(input_ids=torch.arange(20).view(1, 20))
    assert receipt_of(model).store.statistics().tensors == before


@pytest.mark.parametrize("placement", [KEEP, OFFLOAD])
def test_nf4_keys_and_values_leave_the_loss_and_change_gradients_a_little(placement):
    model = with_lora(tiny("llama", hidden_size=64, num_key_value_heads=4))
    receipt = wire(model, plan_of([KEEP_ALL] * LAYERS))
    exact = gradients(model)
    lossy = LayerPlan(placements={"qkv": placement}, nf4_kv=True)
    receipt.replan(plan_of([lossy] * LAYERS))
    found = gradients(model)
    assert torch.equal(found["loss"], exact["loss"])
    errors = {n: (found[n] - exact[n]).norm().item() for n in exact if n != "loss"}
    total = torch.cat([exact[n].flatten() for n in errors]).norm().item()
    assert 1e-3 * total < max(errors.values()) < 0.1 * total
    assert not any(error for name, error in errors.items() if ".3.mlp." in name)


def test_nf4_rounds_to_the_nearest_value_of_its_table():
    from hotloop_engine.blocks.lossy import NF4, pack, unpack

    torch.manual_seed(0)
    qkv = torch.randn(70, 16 + 128 + 5)
    qkv[3, 16:80] = 0.0
    back = unpack(pack(qkv, 16, 128), torch.full_like(qkv, float("nan")))
    assert torch.equal(back[:, :16], qkv[:, :16])
    blocks = qkv[:, 16:144].reshape(-1, 64)
    scale = blocks.abs().amax(-1, keepdim=True)
    values = torch.tensor(NF4)[None, None] * scale[..., None]
    nearest = (blocks[..., None] - values).abs().amin(-1)
    distance = (back[:, 16:144].reshape(-1, 64) - blocks).abs()
    torch.testing.assert_close(distance, nearest, rtol=0, atol=1e-6)
