"""Two thousand steps of varying shapes with offloaded activations and streamed weights: nothing grows."""

from __future__ import annotations

import gc
import random

import psutil
import pytest
import torch
from hotloop.homes import settle
from hotloop.wiring import receipt_of, wire
from hotloop_core.plan import RECOMPUTE_ALL, LayerPlan, Placement, Plan
from hotloop_engine.stores import pinned_bytes
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
LAYERS, STEPS, MOST = 3, 2000, 1024


def build():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=2003,
    )
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).requires_grad_(False)
    layer = LayerPlan(
        placements={
            **RECOMPUTE_ALL.placements,
            "x": Placement.OFFLOAD,
            "gate_up": Placement.OFFLOAD,
        },
        streamed=True,
    )
    plan = Plan(
        layers=(layer,) * LAYERS,
        tokens=MOST,
        longest=MOST,
        embedding_on_host=True,
        head_on_host=True,
    )
    settle(model, plan)
    wire(model, plan)
    return get_peft_model(model, LoraConfig(r=8, target_modules="all-linear")).train()


def measure():
    gc.collect()
    torch.cuda.synchronize()
    return {
        "device": torch.cuda.memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
        "pinned": pinned_bytes(),
        "host": psutil.Process().memory_info().rss,
    }


@pytest.mark.timeout(280)
def test_nothing_grows_over_two_thousand_steps_of_varying_shapes():
    model = build()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    shapes = random.Random(0)
    ids = torch.randint(0, 2003, (8, MOST), device="cuda")
    settled = None
    for step in range(STEPS):
        rows = shapes.choice([1, 2, 4])
        length = shapes.randint(2, MOST // rows)
        batch = ids[:rows, :length]
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        if step % 97 == 13:  # a step that is given up in the middle
            del loss
            continue
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step == STEPS // 4:
            settled = measure()
    assert torch.isfinite(loss)
    last = measure()
    assert last["device"] <= settled["device"] + 2**20
    assert last["reserved"] <= settled["reserved"] + 64 * 2**20
    assert last["pinned"] == settled["pinned"]
    assert last["host"] <= settled["host"] + 48 * 2**20
    statistics = receipt_of(model).store.statistics()
    assert statistics.held_bytes == 0 and statistics.grown <= 1
