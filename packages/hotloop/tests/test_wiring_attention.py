"""How attention is called by a wired layer: heads in groups in very long batches, masks that it cannot have."""

from __future__ import annotations

import pytest
import torch
from hotloop.wiring import wire
from hotloop_core import plan as plans
from hotloop_core.errors import DataError, HotloopError
from hotloop_core.plan import KEEP_ALL, RECOMPUTE_ALL, Placement, Plan, key_heads_at_once
from hotloop_testkit.numerics import assert_no_worse_than
from hotloop_testkit.tiny import batch, build, gradients
from transformers import LlamaConfig, Qwen2Config


def tiny(config=LlamaConfig):
    return build(
        config(
            hidden_size=96,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=3,
            vocab_size=320,
        )
    )


def test_few_tokens_take_all_heads_and_many_take_some():
    shape = {"heads": 32, "kv_heads": 8, "head_dim": 128}
    assert key_heads_at_once(32_768, **shape) == 8
    assert key_heads_at_once(163_840, **shape) == 2
    assert key_heads_at_once(10_000_000, **shape) == 1
    assert key_heads_at_once(0, **shape) == 8


@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config])
@pytest.mark.parametrize("kind", ["dense", "packed"])
@pytest.mark.parametrize("groups", [(2, 1), (1, 1, 1)])
def test_heads_in_groups_have_the_gradients_of_all_together(config, kind, groups, monkeypatch):
    model, inputs = tiny(config), batch(kind, 320)
    receipt = wire(model)
    expected = gradients(model, inputs)
    for_one = 8 * inputs["input_ids"].numel() * 2 * 16
    monkeypatch.setattr(plans, "ATTENTION_ROOM", groups[0] * for_one)
    found = gradients(model, inputs)
    assert_no_worse_than(found, expected, expected, floor=1e-6)
    for layer in (RECOMPUTE_ALL, plans.LayerPlan(placements={"qkv": Placement.RECOMPUTE})):
        receipt.replan(Plan(layers=(layer,) * 2, tokens=128, longest=128))
        again = gradients(model, inputs)
        assert all(torch.equal(again[name], found[name]) for name in found)
    receipt.replan(Plan(layers=(KEEP_ALL,) * 2, tokens=128, longest=128))
    kept = gradients(model, inputs)
    assert all(torch.equal(kept[name], found[name]) for name in found)


@pytest.mark.parametrize("allowed", [{"mask"}, "mask"])
def test_a_mask_with_holes_is_refused_unless_masks_may_take_the_models_own_path(allowed):
    model, inputs = tiny(), batch("dense", 320)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, 3] = 0
    expected = gradients(model, inputs)
    receipt = wire(model)
    with pytest.raises(HotloopError, match="padding between its tokens"):
        model(**inputs)
    receipt.undo()
    wire(model, allow_eager=allowed)
    assert_no_worse_than(gradients(model, inputs), expected, expected, floor=2e-5)


@pytest.mark.parametrize(
    "given",
    [
        {"attention_mask": torch.ones(2, 9)},
        {"attention_mask": torch.ones(1, 13)},
        {"position_ids": torch.arange(9)[None]},
    ],
    ids=["short mask", "one row of mask", "short positions"],
)
@pytest.mark.parametrize("part", ["model", "decoder"])
def test_a_mask_or_positions_of_another_size_than_the_batch_are_refused(given, part):
    model, ids = tiny(), torch.randint(3, 320, (2, 13))
    wire(model)
    with pytest.raises(DataError, match=r"for a batch of \(2, 13\)"):
        (model if part == "model" else model.model)(input_ids=ids, **given, use_cache=False)
