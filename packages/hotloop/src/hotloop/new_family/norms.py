"""Where the norms of a layer stand, what they compute, and what is added to the residual stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from hotloop_core import ConfigKeys

from .tiny import EPSILONS
from .trace import CLOSE, Call, same

if TYPE_CHECKING:
    from torch import Tensor

    from .reading import Reading

Kind = tuple[str, float, float]
"""rms or layer, offset, epsilon."""
MEASURED = 0.05
"""Relative error of an epsilon that was measured."""


def read_norms(reading: Reading, attention: Call, mlp: Call) -> None:
    """Where each norm stands, by whose result the blocks get and whose input their results are."""
    roles: dict[str, Call] = {}
    for call in reading.first.norms():
        if call.path.startswith((f"{attention.path}.", f"{mlp.path}.")):
            continue
        if same(call.result, attention.given):
            roles["before_attention"] = call
        elif same(call.given, attention.result):
            roles["after_attention"] = call
        elif same(call.result, mlp.given):
            roles["before_mlp"] = call
        elif same(call.given, mlp.result):
            roles["after_mlp"] = call
        else:
            reading.missing.append(
                f"a norm {call.path!r} that stands neither before nor after a block"
            )
    x = reading.first.x
    middle = roles["before_mlp"].given if "before_mlp" in roles else mlp.given
    if same(middle, x) or same(mlp.given, attention.given):
        reading.missing.append("attention and MLP beside each other (a parallel residual)")
    else:
        _read_residual(reading, roles, attention, mlp, middle)
    reading.norms = {role: call.path for role, call in roles.items()}
    _read_kind(reading, [*roles.values()])


def _read_kind(reading: Reading, calls: list[Call]) -> None:
    """One kind for all norms, the final one among them."""
    final = reading.seen.final_norm
    if final is None:
        reading.missing.append("no norm behind the layers")
        return
    kinds = {call.path: norm_kind(call) for call in (*calls, final)}
    strange = [path for path, kind in kinds.items() if kind is None]
    if strange:
        (call,) = (c for c in (*calls, final) if c.path == strange[0])
        reading.missing.append(
            f"a norm {strange[0]!r} ({type(call.module).__name__}) that is neither RMSNorm nor LayerNorm"
        )
        return
    found = [kind for kind in kinds.values() if kind is not None]
    if len({kind[:2] for kind in found}) > 1:
        reading.missing.append(f"norms of several kinds: {', '.join(sorted(map(str, kinds)))}")
        return
    kind, offset, _ = found[0]
    reading.norms |= {"kind": kind, "offset": offset}
    _read_epsilon(reading, [eps for _, _, eps in found])


def _read_epsilon(reading: Reading, values: list[float]) -> None:
    """Which key of the config holds the epsilon, or what it is where the config has no such key."""
    eps = values[-1]
    keys = [key for key in EPSILONS if key in reading.config]
    alike = all(abs(each - eps) < MEASURED * eps for each in values)
    key = next((k for k in keys if abs(reading.config[k] - eps) < MEASURED * eps), None)
    if alike and key is not None:
        reading.keys["norm_eps"] = key
    elif alike and not keys:
        reading.keys["defaults"] = {ConfigKeys().norm_eps: float(f"{eps:.0e}")}
    else:
        found = ", ".join(f"{each:.2g}" for each in values)
        reading.missing.append(f"norms with epsilons ({found}) that are not the config's one")


def norm_kind(call: Call) -> Kind | None:
    """What a norm computes of what it was given; None where that is no RMSNorm or LayerNorm over the last dimension."""
    weight: Tensor | None = getattr(call.module, "weight", None)
    bias: Tensor | None = getattr(call.module, "bias", None)
    if weight is not None and weight.dim() != 1:
        return None
    x, y = call.given.double(), call.result.double() - (0.0 if bias is None else bias.detach())
    w = torch.ones((), dtype=x.dtype) if weight is None else weight.detach()
    centred = x - x.mean(-1, keepdim=True)
    for kind, n, offset in (("rms", x, 0.0), ("rms", x, 1.0), ("layer", centred, 0.0)):
        scaled, square = n * (offset + w), n.square().mean(-1, keepdim=True)
        ratio = (scaled * y).mean(-1, keepdim=True) / scaled.square().mean(-1, keepdim=True)
        eps = max(float((ratio**-2 - square).mean()), 0.0)
        if same(scaled * (square + eps).rsqrt(), y):
            return kind, offset, eps
    return None


def _read_residual(
    reading: Reading, roles: dict[str, Call], attention: Call, mlp: Call, middle: Tensor
) -> None:
    """x + s·attention, then middle + s·mlp, with one s for both."""
    added = (
        (middle - reading.first.x, roles.get("after_attention", attention).result),
        (reading.first.y - middle, roles.get("after_mlp", mlp).result),
    )
    scales = [float((sum_ * part).sum() / part.square().sum()) for sum_, part in added]
    fits = [same(scale * part, sum_) for scale, (sum_, part) in zip(scales, added, strict=True)]
    if not all(fits) or abs(scales[0] - scales[1]) > CLOSE:
        reading.missing.append("a residual stream that is not x + s · block(x) with one s")
    elif abs(scales[0] - 1) > CLOSE:
        reading.name("residual_scale", scales[0], "what each block's output is multiplied by")
