"""Loss and gradients in higher precision through transformers' own code, one decoder layer at a time.

The model is copied without its decoder layers. In place of each layer stands a small module that makes a copy of it in
the precision asked for, 4-bit weights dequantised, runs it and drops it; in backward it does so again and
differentiates that copy. So the device holds one layer of the copy at a time, and the host the residual stream between
layers.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from hotloop_core.errors import GradientError
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hotloop.exporting.merging import dequantised
from hotloop.homes import device_weight

from . import exact_attention

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """A loss and the gradient of each trained parameter by name; None where the loss does not depend on it.

    token_losses: [T] fp64 on the host, of the trained tokens, from the logits; None where there were none.
    """

    loss: float
    by_name: dict[str, Tensor | None]
    token_losses: Tensor | None = None


def token_losses(logits_BSV: Tensor, labels_BS: Tensor, *, rows: int = 512) -> Tensor:
    """-log p(label) of each trained token [T], fp64 on the host; `rows` tokens at a time."""
    logits_TV, labels_T = logits_BSV.detach()[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten()
    pieces = zip(logits_TV.split(rows), labels_T.split(rows), strict=True)
    losses = [nn.functional.cross_entropy(x.double(), y, reduction="none") for x, y in pieces]
    return torch.cat(losses)[labels_T != -100].cpu()


def exact_gradients(
    root: nn.Module,
    layers: str,
    inputs: Mapping[str, Any],
    trained: Mapping[str, nn.Parameter],
    dtype: torch.dtype,
) -> Gradients:
    """Loss and gradients of `trained` in `dtype` (fp32 or fp64), the gradients on the host.

    Args:
        root: the ...ForCausalLM, not wired. It is only read.
        layers: the path of its list of decoder layers.
        inputs: what its forward takes, labels among them.
        trained: name -> parameter.
        dtype: of every weight and of every operation that transformers does not do in fp32 itself.

    Attention keeps its scores: B H S^2 elements of memory a few times, one layer at a time.

    Raises:
        GradientError: loss or gradients are not finite.
    """
    names = {id(parameter): name for name, parameter in trained.items()}
    sink: dict[str, Tensor] = {}
    memo: dict[int, Any] = {id(root.config): copy.deepcopy(root.config)}
    config = memo[id(root.config)]
    config._attn_implementation = exact_attention.register()
    stand_ins = {
        id(layer): _Layer(layer, dict(memo), names, sink, dtype)
        for layer in root.get_submodule(layers)  # type: ignore[union-attr]
    }
    clone, outside = _exact_copy(root, {**memo, **stand_ins}, names, dtype)
    for replaced in ("forward", "_original_forward"):
        vars(clone).pop(replaced, None)  # a trainer's wrapper around the live model's forward
    device = next(iter(trained.values())).device
    with _full_precision(), torch.autocast(device.type, enabled=False):
        output = clone(**inputs)
        loss, tokens = output.loss, token_losses(output.logits, inputs["labels"])
        del output
        loss.backward()
    for name, parameter in outside.items():
        if parameter.grad is not None:
            sink[name] = parameter.grad.cpu()
    bad = [name for name, gradient in sink.items() if not gradient.isfinite().all()]
    if bad or not bool(loss.isfinite()):
        raise GradientError(
            f"even in {dtype} the loss is {float(loss.detach())} and {len(bad)} gradients are not finite "
            f"({', '.join(bad[:3])}). Look for NaN in the weights, or for values that overflow."
        )
    by_name = {name: sink.get(name) for name in trained}
    return Gradients(loss=float(loss.detach()), by_name=by_name, token_losses=tokens)


class _Layer(nn.Module):
    """Stands in for a decoder layer: the same call, computed by a copy that lives only during the call."""

    def __init__(
        self,
        layer: nn.Module,
        memo: dict[int, Any],
        names: Mapping[int, str],
        sink: dict[str, Tensor],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.live = (layer,)  # in a tuple, so that it is no submodule
        self.sink = sink
        self._copy = lambda: _exact_copy(layer, dict(memo), names, dtype)

    def __getattr__(self, name: str) -> Any:
        """Decoders ask a layer for its attention_type and the like."""
        return getattr(vars(self)["live"][0], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not hidden.requires_grad:  # nothing trains before; the layer itself may train
            hidden = hidden.detach().requires_grad_()
        return _Recomputed.apply(hidden, self, args, kwargs)

    def exact(self) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        """The copy, and its trained parameters by name."""
        return self._copy()


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, layer: _Layer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        ctx.call = (layer, args, kwargs)
        ctx.hidden = hidden.detach().cpu()
        copied, _ = layer.exact()
        return copied(hidden.detach(), *args, **kwargs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        layer, args, kwargs = ctx.call
        hidden = ctx.hidden.to(gradient.device).requires_grad_()
        copied, trained = layer.exact()
        with torch.enable_grad():
            output = copied(hidden, *args, **kwargs)
        wanted = [hidden, *trained.values()]
        dhidden, *found = torch.autograd.grad(output, wanted, gradient, allow_unused=True)
        for name, value in zip(trained, found, strict=True):
            if value is not None:
                earlier = layer.sink.get(name, 0)  # a parameter that several layers share
                layer.sink[name] = value.cpu() + earlier
        return dhidden, None, None, None


def _exact_copy(
    module: nn.Module, memo: dict[int, Any], names: Mapping[int, str], dtype: torch.dtype
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A copy with every parameter in `dtype`, and the copies of the trained ones by name.

    deepcopy takes what `memo` already holds, so the parameters are converted before it sees them and never copied as
    they are. Buffers stay as the model has them: the rope frequencies belong to the model's definition.
    """
    trained: dict[str, nn.Parameter] = {}
    for child in _modules(module, memo):
        if quantised(child):
            memo[id(child)] = _dense(child, dtype)
            continue
        for key, parameter in child._parameters.items():
            if parameter is None or id(parameter) in memo:
                continue
            name = names.get(id(parameter))
            value = (
                device_weight(child) if key == "weight" else parameter
            )  # its home may be the host
            exact = nn.Parameter(value.detach().to(dtype, copy=True), name is not None)
            memo[id(parameter)] = exact
            if name is not None:
                trained[name] = exact
    return copy.deepcopy(module, memo), trained


def quantised(module: nn.Module) -> bool:
    """Whether this is a 4-bit linear itself; PEFT's wrapper around one shows the same weight."""
    return getattr(module._parameters.get("weight"), "quant_state", None) is not None


def _modules(module: nn.Module, memo: Mapping[int, Any]) -> Iterator[nn.Module]:
    """The module and all below it, without what `memo` replaces."""
    if id(module) in memo:
        return
    yield module
    for child in module.children():
        yield from _modules(child, memo)


def _dense(module: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """The layer that a 4-bit linear stands for: the weights that it computes with, upcast."""
    weight = dequantised(module.weight, "weight").to(dtype)  # type: ignore[arg-type]
    linear = nn.Linear(weight.shape[1], weight.shape[0], module.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)  # type: ignore[operator]
    return linear


@contextmanager
def _full_precision() -> Iterator[None]:
    """fp32 products in fp32, not in TF32."""
    found = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(found)
