"""Attention as the equation says, one sequence at a time; the others are held against it."""

from __future__ import annotations

import torch
from torch import Tensor

from .interface import Backend, Capability, Gradients, Inputs


class Reference(Backend):
    """Any option, any device, in fp32 (fp64 for fp64). Forms S x S scores."""

    name = "reference"
    capability = Capability(
        devices=frozenset({"cpu", "cuda"}),
        forced_on=frozenset({"cuda"}),
        dtypes=frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16}),
        head_sizes=(1, 1024, 1),
    )

    def _forward(self, inputs: Inputs, out: Tensor | None) -> tuple[Tensor, Tensor]:
        q_THK = inputs.q_THK
        o_THK = q_THK.new_empty(q_THK.shape) if out is None else out
        lse_HT = q_THK.new_empty(q_THK.shape[1], q_THK.shape[0], dtype=_wide(q_THK.dtype))
        for start, stop in inputs.sequences.bounds():
            s_HSS, _, v_HSK = _scores(inputs, start, stop)
            lse_HT[:, start:stop] = s_HSS.logsumexp(dim=-1)
            o_THK[start:stop] = (s_HSS.softmax(dim=-1) @ v_HSK).transpose(0, 1)
        return o_THK, lse_HT

    def _backward(
        self, inputs: Inputs, do_THK: Tensor, o_THK: Tensor, lse: Tensor, out: Gradients | None
    ) -> Gradients:
        q_THK, k_TGK, _ = inputs.qkv
        dq_THK, dk_TGK, dv_TGK = out or tuple(x.new_empty(x.shape) for x in inputs.qkv)
        kv_heads = k_TGK.shape[1]
        for start, stop in inputs.sequences.bounds():
            s_HSS, dcap_HSS, v_HSK = _scores(inputs, start, stop)
            p_HSS = (s_HSS - lse[:, start:stop, None]).exp()
            do_HSK, q_HSK = (_heads(x, start, stop) for x in (do_THK, q_THK))
            dp_HSS = do_HSK @ v_HSK.mT
            delta_HS = (p_HSS * dp_HSS).sum(dim=-1)  # do . o, without the rounding of a stored o
            ds_HSS = p_HSS * (dp_HSS - delta_HS[..., None]) * dcap_HSS * inputs.scale
            k_HSK = _heads(k_TGK, start, stop, repeat=q_THK.shape[1] // kv_heads)
            dq_THK[start:stop] = (ds_HSS @ k_HSK).transpose(0, 1)
            for target, dx_HSK in ((dk_TGK, ds_HSS.mT @ q_HSK), (dv_TGK, p_HSS.mT @ do_HSK)):
                target[start:stop] = dx_HSK.unflatten(0, (kv_heads, -1)).sum(1).transpose(0, 1)
        return dq_THK, dk_TGK, dv_TGK


def _scores(inputs: Inputs, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the masked scores, the soft cap's derivative there, and v with heads repeated."""
    q_THK, k_TGK, v_TGK = inputs.qkv
    repeat = q_THK.shape[1] // k_TGK.shape[1]
    q_HSK = _heads(q_THK, start, stop)
    k_HSK, v_HSK = (_heads(x, start, stop, repeat=repeat) for x in (k_TGK, v_TGK))
    s_HSS = inputs.scale * q_HSK @ k_HSK.mT
    derivative_HSS = torch.ones_like(s_HSS)
    if inputs.softcap is not None:
        capped_HSS = torch.tanh(s_HSS / inputs.softcap)
        s_HSS, derivative_HSS = inputs.softcap * capped_HSS, 1 - capped_HSS.square()
    i = torch.arange(stop - start, device=q_THK.device)
    distance_SS = i[:, None] - i
    visible_SS = distance_SS >= 0
    if inputs.window is not None:
        visible_SS &= distance_SS < inputs.window
    return s_HSS.masked_fill(~visible_SS, float("-inf")), derivative_HSS, v_HSK


def _heads(x_THK: Tensor, start: int, stop: int, *, repeat: int = 1) -> Tensor:
    x_HSK = x_THK[start:stop].transpose(0, 1).to(_wide(x_THK.dtype))
    return x_HSK.repeat_interleave(repeat, dim=0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
