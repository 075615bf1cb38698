"""A family that brings a block in place of attention: clipped projections, as OLMo 1 has them (arXiv:2402.00838)."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hotloop import plan, wiring
from hotloop_core import (
    CustomBlock,
    LayerPlan,
    Placement,
    Plan,
    Plugin,
    Registry,
    discover,
    facts_of,
)
from hotloop_core.errors import PlanError, PluginError, WireError
from hotloop_core.plan import KEEP_ALL, RECOMPUTE_ALL
from hotloop_testkit.numerics import assert_no_worse_than
from hotloop_testkit.tiny import batch, build, gradients, quantise_, with_lora
from transformers import LlamaConfig

CLIP = 0.5
ROLES = ("q", "k", "v", "o")


class ClippedAttention:
    """z = attention(rope(clip(W_q h)), rope(clip(W_k h)), clip(W_v h)) W_o^T, and a scale on its output."""

    def __init__(self, call):
        self.call, self.size = call, call.facts.head_dim
        self.q, self.k, self.v, self.o = (call.linear(role) for role in ROLES)
        self.scale = call.module("self_attn.out_scale").weight

    def forward(self, h):
        kept, raw = [], []
        for linear in (self.q, self.k, self.v):
            y, own = linear.forward(h)
            raw.append(y)
            kept.append(own)
        q, k, v = self._turned(raw)
        o, lse = self.call.attend.forward(q, k, v)
        z, own = self.o.forward(o.flatten(1))
        return z * self.scale.to(z.dtype), (
            *raw,
            o,
            lse,
            z,
            *(t for ts in (*kept, own) for t in ts),
        )

    def backward(self, dz, h, kept, *, need_dh):
        *raw, o, lse, z = kept[:6]
        own = list(kept[6:])
        each = len(own) // 4
        own = [tuple(own[i * each : (i + 1) * each]) for i in range(4)]
        self.call.add_gradient(self.scale, (dz.float() * z.float()).sum(0))
        do = self.o.backward(dz * self.scale.to(dz.dtype), o.flatten(1), own[3])
        q, k, v = self._turned(raw)
        dq, dk, dv = self.call.attend.backward(do.view(o.shape), q, k, v, (o, lse))
        dq, dk, _, _ = self.call.op("rope").backward(dq, dk, self.call.cos_PR, self.call.sin_PR)
        dh = None
        for linear, dy, y, ts in zip(
            (self.q, self.k, self.v), (dq, dk, dv), raw, own, strict=False
        ):
            part = linear.backward(dy.flatten(1) * (y.abs() <= CLIP), h, ts, need_dx=need_dh)
            if need_dh:
                dh = part if dh is None else dh + part
        return dh

    def _turned(self, raw):
        q, k, v = (y.clamp(-CLIP, CLIP).unflatten(1, (-1, self.size)) for y in raw)
        q, k = self.call.op("rope").forward(q, k, self.call.cos_PR, self.call.sin_PR)
        return q, k, v


class Scale(torch.nn.Module):
    """A weight that is multiplied in."""

    def __init__(self, size):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, size))


def shapes(facts):
    q, kv, d = facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim, facts.hidden_size
    return {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q)}


def kept(facts):
    return 2 * facts.heads * facts.head_dim + 2 * facts.kv_heads * facts.head_dim


def described(**changes):
    llama = discover().match({"model_type": "llama"})
    block = CustomBlock(
        **{
            "target": "stranger_blocks:ClippedAttention",
            "module": "self_attn",
            "projections": {role: f"self_attn.{role}_proj" for role in ROLES},
            "shapes": shapes,
            "kept": kept,
            "parameters": ("self_attn.out_scale",),
            **changes,
        }
    )
    family = replace(llama, name="clipped", layer=replace(llama.layer, attention=block))
    return family, Registry((Plugin(name="s", distribution="s", version="1", families=(family,)),))


@pytest.fixture(autouse=True)
def stranger(monkeypatch):
    monkeypatch.setitem(
        sys.modules, "stranger_blocks", SimpleNamespace(ClippedAttention=ClippedAttention)
    )


def clipped_model():
    """A Llama whose own code clips, and scales attention's output."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        initializer_range=0.05,
    )
    model = build(config)
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.out_scale = Scale(64)
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(attention, name).__class__ = ClippedLinear
        attention.o_proj.__class__ = ScaledLinear
        attention.o_proj.__dict__["owner"] = attention
    return model


class ClippedLinear(torch.nn.Linear):
    def __call__(self, x):
        return super().__call__(x).clamp(-CLIP, CLIP)


class ScaledLinear(torch.nn.Linear):
    def __call__(self, x):
        return super().__call__(x) * self.owner.out_scale.weight


def plan_of(model, layer):
    return Plan(layers=(layer,) * 2, tokens=128, longest=128)


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_a_block_in_place_of_attention_gives_eagers_gradients(kind):
    model, inputs = clipped_model(), batch(kind, 320)
    if kind == "packed":  # eager would have a row predict the next row's first token
        inputs["labels"][inputs["position_ids"] == 0] = -100
    expected = gradients(model, {**inputs, "use_cache": False})  # with a cache eager packs nothing
    wiring.wire(model, registry=described()[1])
    found = gradients(model, inputs)
    assert found.keys() == expected.keys()
    assert any("out_scale" in name for name in found)
    assert_no_worse_than(found, expected, expected, floor=2e-5)


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_where_its_tensors_wait_changes_no_bit(base):
    family, registry = described()
    model = with_lora(build_described(family, base), family)
    inputs = batch("packed", 320)
    receipt = wiring.wire(model, plan_of(model, KEEP_ALL), registry=registry)
    expected = gradients(model, inputs)
    assert expected
    away = LayerPlan(placements={"own_attention": Placement.RECOMPUTE})
    for layer in (away, RECOMPUTE_ALL):
        receipt.replan(plan_of(model, layer))
        found = gradients(model, inputs)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_keys_and_values_in_nf4_are_not_promised_for_a_block_that_keeps_its_own():
    family, registry = described()
    model = build_described(family, "fp32")
    wiring.wire(model, plan_of(model, LayerPlan(nf4_kv=True)), registry=registry)
    with pytest.raises(PlanError, match="Plan without nf4_kv"):
        gradients(model, batch("dense", 320))


def build_described(family, base):
    model = build(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=320,
        )
    )
    for layer in model.model.layers:
        layer.self_attn.out_scale = Scale(64)
    return quantise_(model, family) if base == "nf4" else model


def test_a_module_that_the_block_does_not_name_is_refused():
    model = clipped_model()
    with pytest.raises(WireError, match=r"self_attn\.out_scale\.weight"):
        wiring.wire(model, registry=described(parameters=())[1])


def test_a_target_that_is_not_there_is_named():
    model = clipped_model()
    wiring.wire(model, registry=described(target="stranger_blocks:Missing")[1])
    with pytest.raises(PluginError, match="stranger_blocks:Missing"):
        gradients(model, batch("dense", 320))


def test_a_plan_counts_what_the_block_keeps():
    family, _ = described()
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    facts = facts_of(family, LlamaConfig(**sizes, **heads).to_dict())
    options = {"tokens": 16384, "longest": 2048, "lora": 16, "card": "H100", "host": "100GiB"}
    wide, narrow = (plan(facts, vram=vram, **options) for vram in ("76GiB", "12GiB"))
    assert wide.layers[0].placement("own_attention") is Placement.KEEP
    assert any(layer.placement("own_attention") is not Placement.KEEP for layer in narrow.layers)
    assert narrow.peak_bytes <= 12 * 2**30 < wide.peak_bytes
    assert sum(narrow.step_ms.values()) > sum(wide.step_ms.values())
