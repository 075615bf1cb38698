"""The loops over a tensor's values that encoding spends its time in, declared once.

`cpu` compiles them with numba and `gpu` runs them in Triton; everything else of an encoder is torch on
whichever device the tensor is. Both give the same bits, and ggml's: every sum runs over a group's
values in their order, in float32, no product is contracted into a sum, rounding is half to even.

G groups, n values in a group. x_Gn and weight_Gn are float32 and contiguous, q_Gn is uint8, every other
result is float32 [G].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

TINY = 1e-15
"""A group whose largest value is below this counts as zero, as in ggml."""


@dataclass(frozen=True)
class Grid:
    """The stretches that an affine search tries: levels + first + i step, i = 0 .. steps - 1."""

    levels: int
    first: float
    step: float
    steps: int
    absolute: bool = False
    """Candidates are compared by absolute instead of squared error."""


@dataclass(frozen=True)
class Table:
    """Rounding to uneven values: codes of the values in order, and the middle between each two of them."""

    codes: tuple[int, ...]
    middles: tuple[float, ...]


class Searches(Protocol):
    """Law: both implementations return the same bits."""

    def largest(self, x_Gn: Tensor) -> Tensor:
        """The largest absolute value of each group."""
        ...

    def sums(self, x_Gn: Tensor) -> Tensor:
        """Sum of each group, from its first value to its last."""
        ...

    def root(self, x: Tensor) -> Tensor:
        """The square root, correctly rounded, which `torch.sqrt` is not on a CPU."""
        ...

    def affine(
        self, x_Gn: Tensor, weight_Gn: Tensor | None, grid: Grid
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(scale, low, q_Gn) for x about scale q - low, with low >= 0 and q in 0..grid.levels.

        Candidates are q = round(stretch (x + low) / (max + low)) with the best low so far, from -min on;
        for each, scale and low solve the weighted normal equations, low not below 0. The one of the
        least weighted error is kept. None weighs by rms(group) + |x|, for absolute errors by |x|.
        """
        ...

    def symmetric(
        self, x_Gn: Tensor, weight_Gn: Tensor | None, limit: int
    ) -> tuple[Tensor, Tensor]:
        """(scale, q_Gn) for x about scale (q - limit), q in 0..2 limit - 1.

        Candidates are q = round(-(limit + i/10) x / extreme) for i in -9..9; each with the scale of
        weighted least squares. None weighs by x^2. A group of zeros has scale and, as in ggml, q 0.
        """
        ...

    def descent(self, x_Gn: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        """The same, weighed by x^2, by five rounds of coordinate descent on q from i = 0."""
        ...

    def positive(self, x_Gn: Tensor, weight_Gn: Tensor, levels: int) -> tuple[Tensor, Tensor]:
        """(scale, q_Gn) for x about scale q, x >= 0 and q in 0..levels: a grid, then coordinate descent."""
        ...

    def table(self, x_Gn: Tensor, weight_Gn: Tensor | None) -> Tensor:
        """The scale for x about scale v, v one of `tables.IQ4`: 15 candidates, each with least squares.

        None weighs by x^2.
        """
        ...

    def round_affine(
        self, x_Gn: Tensor, scale: Tensor, low: Tensor, levels: int, q_Gn: Tensor
    ) -> None:
        """q = round((x + low) / scale) in 0..levels, in place; a group whose scale is 0 keeps its q."""
        ...

    def round_symmetric(self, x_Gn: Tensor, scale: Tensor, limit: int, q_Gn: Tensor) -> None:
        """q = limit + round(x / scale) in 0..2 limit - 1, in place; a group whose scale is 0 keeps its q."""
        ...

    def even(self, x_Gn: Tensor, levels: int, *, offset: bool) -> Tensor:
        """The bytes of blocks of 32 with q in 0..levels, laid out as `parts.even_block` does; levels 15 or 31.

        With an offset x is about scale q + low, from a block's minimum to its maximum. Without, x is about
        scale (q - (levels + 1) / 2), and the value farthest from 0, of equals the first, has q = 0. q is the
        whole part of a quotient and a half, and the quotient a product with 1 / scale.
        """
        ...

    def nearest(self, x_Gn: Tensor, inverse: Tensor, table: Table) -> Tensor:
        """q_Gn = table.codes[how many of table.middles are at or below x inverse]."""
        ...

    def round_away(self, x_Gn: Tensor, inverse: Tensor) -> Tensor:
        """q_Gn in int8 = round(x inverse), halves away from zero."""
        ...
