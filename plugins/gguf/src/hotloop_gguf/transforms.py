"""The transforms that a family can name for a role in its `ExportFacts.transforms`.

Each takes whole heads (`ModelFacts.head_dim` rows), as many as there are, so that large tensors pass in blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotloop_core.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotloop_core import ModelFacts
    from torch import Tensor


def rope_interleave(tensor: Tensor, facts: ModelFacts) -> Tensor:
    """Rows of each head from two halves (transformers) to even/odd pairs (ggml's NORM rope).

    tensor: [heads * head_dim, ...], a weight, a bias or B of an adapter; any number of whole heads.
    """
    halves = tensor.reshape(-1, 2, facts.head_dim // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def add_one(tensor: Tensor, facts: ModelFacts) -> Tensor:
    """1 + w in float32, for norms that transformers computes as x (1 + w) and ggml as x w."""
    return tensor.float() + 1.0


TRANSFORMS: dict[str, Callable[[Tensor, ModelFacts], Tensor]] = {
    "rope_interleave_q": rope_interleave,
    "rope_interleave_k": rope_interleave,
    "add_one": add_one,
}


def transform_named(name: str) -> Callable[[Tensor, ModelFacts], Tensor]:
    """The transform of that name.

    Raises:
        UnsupportedError: there is none.

    """
    if name not in TRANSFORMS:
        raise UnsupportedError(
            f"the family names the transform {name!r}; this exporter has {', '.join(TRANSFORMS)}. "
            "Upgrade hotloop-gguf, or correct the family's ExportFacts."
        )
    return TRANSFORMS[name]
