"""Inverted dropout whose mask is a function of a seed   Srivastava et al., JMLR 2014, in the scaled form."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from hotloop_engine.ops._select import CUDA, EVERYWHERE, implementation, register

if TYPE_CHECKING:
    from torch import Tensor

register("dropout", "triton", partial(import_module, f"{__name__}.kernel"), CUDA)
register("dropout", "reference", partial(import_module, f"{__name__}.reference"), EVERYWHERE)


def dropout(x_TK: Tensor, p: float, seed: int, *, impl: str | None = None) -> Tensor:
    """x with each element zeroed with probability p, the rest divided by 1 - p.

    The mask depends on seed, position and implementation alone, so that backward applies the same function to the
    gradient. x: [T, K] of any floating dtype and row stride; the result is contiguous. 0 < p <= 1; at 1 all is zero.
    """
    return implementation("dropout", x_TK.device, impl).forward(x_TK, p=p, seed=seed)
