"""Norms over all heads of q and k, then the rotation: against fp64 truth, both implementations."""

from __future__ import annotations

import pytest
import torch
from hotloop_engine.blocks.context import BlockContext, NormView
from hotloop_engine.blocks.rotation import Rotation
from hotloop_testkit.numerics import assert_no_worse_than, poisoned_buffers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
T, H, G, K, EPS = 11, 4, 2, 24, 1e-5
ROWS = {"q": slice(0, H * K), "k": slice(H * K, (H + G) * K)}


def tables() -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(T)[:, None] * 10.0 ** -torch.linspace(0, 2, K // 2)
    angles = torch.cat((angles, angles), dim=-1).to(DEVICE)
    return angles.cos(), angles.sin()


def eager(qkv: torch.Tensor, weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """As transformers' OLMo 2 writes it: both rounded to the dtype."""
    cos, sin = (
        table[:, None].to(torch.promote_types(qkv.dtype, torch.float32)) for table in tables()
    )
    turned = []
    for rows, w in zip(ROWS.values(), weights, strict=True):
        x = qkv[:, rows].to(cos.dtype)
        x = (w * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS))).to(qkv.dtype)
        x = x.view(T, -1, K)
        first, second = x.chunk(2, dim=-1)
        turned.append((x * cos + torch.cat((-second, first), dim=-1) * sin).to(qkv.dtype))
    return turned


def differentiated(
    qkv: torch.Tensor, weights: list[torch.Tensor], dq: torch.Tensor, dk: torch.Tensor
) -> dict[str, torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (qkv, *weights)]
    q, k = eager(leaves[0], leaves[1:])
    torch.autograd.backward([q, k], [dq, dk])
    names = ("dqkv", "dwq", "dwk")
    grads = {name: leaf.grad for name, leaf in zip(names, leaves, strict=True)}
    return {"q": q.detach(), "k": k.detach(), **grads}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_norms_over_all_heads_are_no_worse_than_eager_in_a_wider_buffer(impl, dtype):
    torch.manual_seed(0)
    wide = torch.randn(T, (H + 2 * G) * K + 8, device=DEVICE).to(dtype)
    width = (H + G) * K
    weights = [(1 + 0.3 * torch.randn(n * K, device=DEVICE)).to(dtype) for n in (H, G)]
    dq, dk = (torch.randn(T, n, K, device=DEVICE).to(dtype) for n in (H, G))
    double = [t.double() for t in (wide[:, :width], *weights, dq, dk)]
    truth = differentiated(double[0], double[1:3], *double[3:])
    plain = differentiated(wide[:, :width], weights, dq, dk)

    def heads(buffer: torch.Tensor) -> list[torch.Tensor]:
        return [buffer[:, rows].unflatten(-1, (-1, K)) for rows in ROWS.values()]

    trained = [w.requires_grad_() for w in weights]
    views = [NormView(weight=w, eps=EPS) for w in trained]
    context = BlockContext(dtype=dtype, device=DEVICE, ops={"rope": impl, "rms_norm": impl})
    rotation = Rotation(
        context, *tables(), interleaved=False, q_norm=views[0], k_norm=views[1], over="all"
    )
    before, out, sink = wide.clone(), torch.zeros_like(wide), {}
    with torch.no_grad(), poisoned_buffers():
        q, k, statistics = rotation.forward(*heads(wide))
        rotated = q.clone(), k.clone()
        out_q, out_k = heads(out)
        rotation.backward(dq, dk, *heads(wide), statistics, sink, out_q=out_q, out_k=out_k)
    ours = {
        **dict(zip(("q", "k"), rotated, strict=True)),
        "dqkv": out[:, :width],
        **{name: sink[id(w)] for name, w in zip(("dwq", "dwk"), trained, strict=True)},
    }
    assert_no_worse_than(ours, plain, truth, slack=0.05)
    assert torch.equal(wide, before) and not out[:, width:].any()
