"""What a family's own block is: the function between the norms of a layer's attention or MLP, with its derivative.

    y = x + s · after(block(before(x)))

A layer's `CustomBlock` names a class that implements `Block`. The engine makes one object of it for each forward pass
and does the rest: the norms and the residual stream, autograd, adapters, 4-bit and streamed weights, and where the
tensors that backward needs wait. The laws of `kernels` hold here too: no further from fp64 truth than eager PyTorch, no
atomics, the same bits from the same inputs, views of any row stride, zero tokens allowed. Forward may run a second time
before backward, and must give the same.

Shape suffixes are those of `kernels`: T tokens of all rows, one after the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from .facts import ModelFacts

Kept = tuple["Tensor", ...]
"""What backward needs beside the inputs. A plan keeps it, moves it to the host, or drops it and runs forward again."""


class Linear(Protocol):
    """One projection at this call: y = x W^T + b + s·dropout(x) A^T B^T, whatever W and the adapter are right now."""

    def forward(self, x_TK: Tensor) -> tuple[Tensor, Kept]:
        """Returns (y [T, N] in x's dtype, what backward needs beside x)."""
        ...

    def backward(
        self, dy_TN: Tensor, x_TK: Tensor, kept: Kept, *, need_dx: bool = True
    ) -> Tensor | None:
        """Returns dx [T, K], None only where it is not needed; weight, bias and adapter get their gradients."""
        ...


class Attend(Protocol):
    """Causal attention of this layer, confined to rows, by the backend that is chosen for the card."""

    def forward(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Kept:
        """Returns (o [T, H, K], and what backward needs beside it); scale, window and soft cap are the layer's."""
        ...

    def backward(
        self, do_THK: Tensor, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, kept: Kept
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (dq, dk, dv). kept: what forward returned."""
        ...


class BlockCall(Protocol):
    """What a block is given: the layer it belongs to, at one call."""

    @property
    def facts(self) -> ModelFacts:
        """Sizes and kinds of the model."""
        ...

    @property
    def layer(self) -> int:
        """The layer's index."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the GEMMs and of attention, and of what the block is given and returns."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
        ...

    @property
    def cos_PR(self) -> Tensor:
        """The rotation's cosines, as `kernels.Rope` takes them."""
        ...

    @property
    def sin_PR(self) -> Tensor:
        """The rotation's sines."""
        ...

    @property
    def attend(self) -> Attend:
        """The layer's attention."""
        ...

    def linear(self, role: str) -> Linear:
        """A projection, by its role in the description."""
        ...

    def module(self, path: str) -> nn.Module:
        """A module of the description's `parameters`, by its path: the one that runs, where PEFT trains a copy."""
        ...

    def op(self, name: str) -> Any:
        """The implementation of an op of `kernels` that runs here."""
        ...

    def add_gradient(self, parameter: Tensor, gradient: Tensor) -> None:
        """In backward: adds to the gradient of a parameter of `module(...)`, if it wants one. In any floating dtype."""
        ...


class Block(Protocol):
    """z = f(h), by the class that a `CustomBlock` names."""

    def __init__(self, call: BlockCall) -> None:
        """Keeps what it needs of the call; weights are those of this moment."""
        ...

    def forward(self, h_TD: Tensor) -> tuple[Tensor, Kept]:
        """Returns (z [T, D], what backward needs beside h)."""
        ...

    def backward(self, dz_TD: Tensor, h_TD: Tensor, kept: Kept, *, need_dh: bool) -> Tensor | None:
        """Returns dh [T, D], None only where it is not needed. May write over `kept`, not over dz or h."""
        ...
