"""One run of a model on a batch, and how far its loss and gradients are from truth."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from hotloop_core.errors import GradientError
from torch import Tensor, nn

from .report import LOSS, TOTAL, Row
from .truth import Gradients, token_losses
from .undisturbed import attributes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hotloop.wiring import Receipt

FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
"""Relative error that counts as exact: about the rounding of one stored result; in fp32, of a long sum."""
OUTLIER = 3.0
"""A gradient may have this many times eager's error. On SmolLM2-135M in bf16, 255 tokens, 420 adapter gradients, the
median of ours / eager is 0.75 and the largest 2.1, either way round."""
LARGEST_SCALE = 2.0**16  # where torch's GradScaler starts
PIECE = 2**24  # elements compared at a time, so that an embedding's gradient needs no fp64 copy


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of the model: inputs of its forward, parameters by name, compute dtype, fp16's loss scale."""

    model: nn.Module
    inputs: Mapping[str, Any]
    trained: Mapping[str, nn.Parameter]
    dtype: torch.dtype
    scale: float = 1.0

    def run(self, *, with_logits: bool = False) -> Gradients:
        """Loss and gradients of the model as it is now, under autocast; `.grad` is not touched."""
        device = next(iter(self.trained.values())).device.type
        with torch.autocast(device, dtype=self.dtype, enabled=self.dtype != torch.float32):
            output = self.model(**self.inputs)
        loss = output.loss
        tokens = token_losses(output.logits, self.inputs["labels"]) if with_logits else None
        del output
        parameters = list(self.trained.values())
        found = torch.autograd.grad(loss * self.scale, parameters, allow_unused=True)
        gradients = (g if g is None or self.scale == 1 else g / self.scale for g in found)
        by_name: dict[str, Tensor | None] = dict(zip(self.trained, gradients, strict=True))
        return Gradients(loss=float(loss.detach()), by_name=by_name, token_losses=tokens)


def largest_finite_scale(ask: Question) -> tuple[Question, Gradients]:
    """The question with fp16's loss scale as GradScaler would find it, and the answer to it.

    Raises:
        GradientError: gradients are not finite at any scale.
    """
    scale = LARGEST_SCALE if ask.dtype == torch.float16 else 1.0
    while True:
        scaled = Question(
            model=ask.model, inputs=ask.inputs, trained=ask.trained, dtype=ask.dtype, scale=scale
        )
        found = scaled.run(with_logits=True)
        bad = [n for n, g in found.by_name.items() if g is not None and not g.isfinite().all()]
        if not bad and math.isfinite(found.loss):
            return scaled, found
        if scale <= 1:
            raise GradientError(
                f"eager PyTorch in {ask.dtype} gives a loss of {found.loss} and {len(bad)} gradients that are not "
                f"finite ({', '.join(bad[:3])}), so there is nothing to compare with. Pass dtype=torch.bfloat16, "
                "whose range is that of float32."
            )
        scale /= 2


@dataclass(frozen=True, kw_only=True)
class Standard:
    """Truth, how far eager is from it, and how far ours may be, by name."""

    exact: Gradients
    eager: Mapping[str, float]
    allowed: Mapping[str, float]

    @staticmethod
    def of(eager: Gradients, exact: Gradients, dtype: torch.dtype, slack: float) -> Standard:
        """What is allowed: `slack` more than eager's error, or what rounding a result costs in any case.

        A single gradient may have OUTLIER times eager's error, since on one batch that is chance; a wrong op shows in
        the groups. The loss is one number, whose error in eager may be nothing by luck: three standard deviations of
        eager's errors, token by token, are allowed instead where that is more.
        """
        errors = errors_of(eager, exact)
        factors = dict.fromkeys(exact.by_name, OUTLIER)
        allowed = {
            name: max(FLOOR[dtype], factors.get(name, 1 + slack) * error)
            for name, error in errors.items()
        }
        allowed[LOSS] = max(allowed[LOSS], 3 * _token_spread(eager, exact))
        return Standard(exact=exact, eager=errors, allowed=allowed)

    def rows(self, ours: Gradients) -> tuple[Row, ...]:
        """Every compared quantity, the worst first."""
        rows = (
            Row(name=name, ours=error, eager=self.eager[name], allowed=self.allowed[name])
            for name, error in errors_of(ours, self.exact).items()
        )
        return tuple(sorted(rows, key=lambda row: -row.ratio))


def _token_spread(found: Gradients, exact: Gradients) -> float:
    """Standard deviation of the loss, relative, if the tokens' errors were independent: ||d|| / |sum|."""
    assert found.token_losses is not None and exact.token_losses is not None
    distance = float((found.token_losses - exact.token_losses).norm())
    return _relative(distance, abs(float(exact.token_losses.sum())))


def wired_run(
    ask: Question,
    receipt: Receipt,
    *,
    ops: Mapping[str, str] | None = None,
    attention: str | None = None,
) -> Gradients:
    """The wired model's answer with deterministic attention; `ops` and `attention` override what it was wired with."""
    shared = receipt.shared
    changes = {
        "deterministic": True,
        "ops": {**shared.ops, **(ops or {})},
        "backend": shared.backend if attention is None else attention,
    }
    with attributes((shared, name, value) for name, value in changes.items()):
        return ask.run()


def errors_of(found: Gradients, exact: Gradients) -> dict[str, float]:
    """Relative error by name: loss, each gradient, each group, and the whole gradient as one vector.

    A group's error is the root mean square of its members'. The groups are each kind of parameter over all layers
    ("model.layers.*.mlp.up_proj.weight") and each layer ("model.layers.3").
    """
    errors = {LOSS: _relative(abs(found.loss - exact.loss), abs(exact.loss))}
    groups: dict[str, list[float]] = {}
    all_distances = all_sizes = 0.0
    for name, truth in exact.by_name.items():
        distance, size = _norms(found.by_name[name], truth)
        errors[name] = _relative(distance, size)
        all_distances += distance**2
        all_sizes += size**2
        in_layer = re.match(r"(.*?\.)(\d+)(\..*)", name)
        if in_layer is not None:
            path, index, rest = in_layer.groups()
            for group in (f"{path}*{rest}", f"{path}{index}"):
                groups.setdefault(group, []).append(errors[name])
    for group, members in groups.items():
        if len(members) > 1:
            errors[group] = math.sqrt(sum(e * e for e in members) / len(members))
    errors[TOTAL] = _relative(math.sqrt(all_distances), math.sqrt(all_sizes))
    return errors


def _relative(distance: float, size: float) -> float:
    if distance == 0:
        return 0.0
    return distance / size if size and math.isfinite(distance) else math.inf


def _norms(value: Tensor | None, truth: Tensor | None) -> tuple[float, float]:
    """(||value - truth||, ||truth||), summed in fp64; a gradient that only one of them has is infinitely wrong."""
    if value is None or truth is None:
        return (0.0, 0.0) if value is truth else (math.inf, 0.0)
    distance = size = 0.0
    pieces = zip(value.flatten().split(PIECE), truth.flatten().split(PIECE), strict=True)
    for mine, exact in pieces:
        exact64 = exact.to(mine.device).double()
        distance += float((mine.double() - exact64).square().sum())
        size += float(exact64.square().sum())
    return (math.sqrt(distance) if math.isfinite(distance) else math.inf), math.sqrt(size)
