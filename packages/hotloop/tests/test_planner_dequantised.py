"""Plans with 4-bit weights that stay dequantised: for whom there is room, what it costs and brings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hotloop.planner import plan
from hotloop_core.plan import amount

SHAPES = Path(__file__).parents[3] / "benchmarks" / "shapes.json"
LLAMA_8B = json.loads(SHAPES.read_text(encoding="utf-8"))["llama3-8b"]


def h100(**options):
    return plan(LLAMA_8B, **{"tokens": 4096, "lora": 16, "card": "H100", **options})


def test_what_a_named_budget_leaves_goes_to_weights_that_stay_dequantised():
    plain = h100(vram="20GiB", dequantised=False)
    spent = h100(vram="20GiB")
    ready = sum(layer.dequantised for layer in spent.layers)
    each = spent.memory["weights that stay dequantised"] // ready
    assert 0 < ready < 32
    assert plain.budget - each < spent.peak_bytes <= spent.budget
    assert [replace(layer, dequantised=False) for layer in spent.layers] == list(plain.layers)
    # 2 bytes an element, K + 64 and N + 64 of q k v, o, gate up, down.
    sizes = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
    assert each == sum(2 * (n + 64) * (k + 64) for n, k in sizes)
    spared = plain.step_ms["copies of weights"] - spent.step_ms["copies of weights"]
    assert spared == pytest.approx(plain.step_ms["copies of weights"] * ready / 32)
    assert f"weights of {ready} of 32 layers stay dequantised" in str(spent)


def test_memory_that_nobody_named_stays_free():
    assert not any(layer.dequantised for layer in h100().layers)
    assert all(layer.dequantised for layer in h100(dequantised=True).layers)


def test_what_dequantised_weights_would_bring_is_offered_where_it_is_much():
    def offers(**options):
        made = plan(LLAMA_8B, **{"lora": 16, "card": "RTX 4090", **options})
        return [note for note in made.notes if "dequantised=True" in note]

    (offer,) = offers(tokens=2048)
    before = plan(LLAMA_8B, tokens=2048, lora=16, card="RTX 4090")
    after = plan(LLAMA_8B, tokens=2048, lora=16, card="RTX 4090", dequantised=True)
    more = after.peak_bytes - before.peak_bytes
    faster = 1 - sum(after.step_ms.values()) / sum(before.step_ms.values())
    assert f"makes it {faster:.0%} faster with {amount(more)} more" in offer
    assert offers(tokens=2048, vram="23GiB") == []
    assert offers(tokens=32768, placements="recompute") == []
    assert offers(tokens=256) == []  # the host is what such a step waits for


def test_weights_that_stream_or_train_or_have_16_bits_are_not_dequantised():
    for options in (
        {"vram": "4GiB"},
        {"bits": 16},
        {"bits": 16, "full_finetuning": True, "lora": None},
    ):
        made = h100(**{"vram": "1000GiB", **options})
        assert not any(layer.dequantised for layer in made.layers)
