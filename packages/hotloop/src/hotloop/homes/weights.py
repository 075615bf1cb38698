"""A frozen weight as the tensors that it is made of, and over other memory: 16 bit, or bitsandbytes' 4 bit."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from hotloop_core.errors import PlanError, UnsupportedError
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


_DATA: Any = torch._C.TensorBase.data


class Passing(nn.Parameter):
    """A 16-bit weight on the device for a while: what would write into it is refused, since nothing would keep it."""

    truth: Tensor

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """The values."""
        return _DATA.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        self.data.copy_(self.truth)  # `weight.data += x` has written by now
        raise UnsupportedError(refusal_to_change("a weight"))


def refusal_to_change(what: str) -> str:
    """Why a weight on the host cannot be written, and what to do."""
    return (
        f"{what} whose home is host memory cannot be changed (by merging an adapter, or by loading over it). Bring "
        "the model back first: hotloop.homes.homes_of(model).undo(); hotloop.export merges without it."
    )


def parts(weight: Tensor) -> list[Tensor]:
    """What travels: the weight; of a 4-bit one the packed data and its block statistics, the tables (1 KB) apart."""
    state: Any = getattr(weight, "quant_state", None)
    plain = weight.detach().as_subclass(Tensor)
    if state is None:
        return [plain]
    return [plain, state.absmax, *([state.state2.absmax] if state.nested else [])]


def over(weight: Tensor, tensors: Sequence[Tensor], tables: Callable[[Tensor], Tensor]) -> Any:
    """The same weight as a Parameter over other tensors for its `parts`; `tables` places the rest of a quant state."""
    state: Any = getattr(weight, "quant_state", None)
    if state is None:
        return nn.Parameter(tensors[0], requires_grad=False)
    kept: Any = weight
    moved = copy.copy(state)
    moved.absmax, moved.code = tensors[1], tables(state.code)
    if state.nested:
        moved.state2 = copy.copy(state.state2)
        moved.state2.absmax, moved.state2.code = tensors[2], tables(state.state2.code)
        moved.offset = tables(state.offset)
    return type(kept)(
        tensors[0],
        requires_grad=False,
        quant_state=moved,
        blocksize=kept.blocksize,
        compress_statistics=kept.compress_statistics,
        quant_type=kept.quant_type,
        quant_storage=kept.quant_storage,
        bnb_quantized=True,
    )


def passing(weight: Tensor, tensors: Sequence[Tensor], device: torch.device) -> Any:
    """`weight` over device tensors that hold it for a while."""
    if getattr(weight, "quant_state", None) is not None:
        # PEFT merges into 4 bit by assigning a new weight, which the module refuses.
        return over(weight, tensors, lambda table: table.to(device))
    view = Passing(tensors[0], requires_grad=False)
    view.truth = parts(weight)[0]
    return view


def dense(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[out, in] in `dtype`, dequantised where it is 4 bit, as a linear layer multiplies by it."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.detach().to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.detach(), state).to(dtype)


def device_weight(module: nn.Module) -> Tensor:
    """A copy of the module's own weight on the device that it computes on, or the weight itself where it lives there.

    For those who read a model tensor by tensor (export, verify): a 4-bit one comes with its quant state.
    """
    from .classes import HOME

    weight = module._parameters["weight"]
    home = module.__dict__.get(HOME)
    assert weight is not None
    if home is None:
        return weight
    return over(
        weight, [t.to(home.device) for t in parts(weight)], lambda table: table.to(home.device)
    )


def require_frozen(path: str, weight: Tensor) -> None:
    """Raises PlanError where a weight that is to live on the host trains."""
    if weight.requires_grad:
        raise PlanError(
            f"{path}.weight trains, so it has to live on the device: the host holds frozen weights only. Freeze it "
            "(model.requires_grad_(False) before the adapters), or plan with it resident."
        )
