"""What one linear projection is at the moment of a call: its weight, its bias, its active adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from hotloop_core.kernels import FourBitWeight


@dataclass(frozen=True, kw_only=True, eq=False)
class Lora:
    """An active adapter: y += scale * dropout(x) A^T B^T   arXiv:2106.09685 eq. 3.

    a_RK and b_NR in any floating dtype (they are cast to the compute dtype, their gradients come back in theirs).
    dropout: probability in force for this call, 0 in evaluation.
    """

    a_RK: Tensor
    b_NR: Tensor
    scale: float
    dropout: float = 0.0

    @property
    def rank(self) -> int:
        """R, the number of rows of A."""
        return self.a_RK.shape[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearView:
    """y = x W^T + bias + adapter(x). weight: [N, K] in 16 or 32 bits, or in bitsandbytes' 4-bit layout."""

    weight: Tensor | FourBitWeight
    bias: Tensor | None = None
    lora: Lora | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N output features, K input features)."""
        n, k = self.weight.shape
        return n, k

    @property
    def trains(self) -> bool:
        """Whether the base weight wants a gradient (full fine-tuning)."""
        return isinstance(self.weight, Tensor) and self.weight.requires_grad

    def identity(self) -> tuple[object, ...]:
        """Equal for two views exactly where they hold the same tensors, of the same dtypes, and numbers."""
        lora = self.lora
        parts = () if lora is None else (id(lora.a_RK), id(lora.b_NR), lora.scale, lora.dropout)
        dtypes = (tensor.dtype for tensor in self.tensors())  # `.to()` keeps a parameter's identity
        return (id(self.weight), id(self.bias), *parts, *dtypes)

    def tensors(self) -> list[Tensor]:
        """Every tensor of this projection that autograd may ask a gradient for."""
        found = [self.weight] if isinstance(self.weight, Tensor) else []
        found += [] if self.bias is None else [self.bias]
        return found + ([] if self.lora is None else [self.lora.a_RK, self.lora.b_NR])
