"""Attention as one layer has it: its shape, the rows of the batch, and the backend that is chosen for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hotloop_engine.attention import choose, request

if TYPE_CHECKING:
    from torch import Tensor

    from hotloop_engine.attention import Sequences


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """What kind of attention a layer has; the fields are those of `hotloop_core.ModelFacts`."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Attend:
    """Attention of one layer over one batch. backend: its name, None for the fastest that can."""

    shape: AttentionShape
    sequences: Sequences
    backend: str | None = None
    deterministic: bool = False

    def forward(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (o_THK, log-sum-exp fp32)."""
        return self._chosen(q_THK, k_TGK).forward(
            q_THK, k_TGK, v_TGK, self.sequences, **self._options()
        )

    def backward(
        self,
        do_THK: Tensor,
        q_THK: Tensor,
        k_TGK: Tensor,
        v_TGK: Tensor,
        kept: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (dq, dk, dv). kept: what forward returned."""
        return self._chosen(q_THK, k_TGK).backward(
            do_THK, q_THK, k_TGK, v_TGK, *kept, self.sequences, **self._options()
        )

    def _chosen(self, q_THK: Tensor, k_TGK: Tensor) -> Any:
        asked = request(
            q_THK,
            k_TGK,
            self.sequences,
            window=self.shape.window,
            softcap=self.shape.softcap,
            deterministic=self.deterministic,
        )
        return choose(asked, q_THK.device, self.backend)

    def _options(self) -> dict[str, Any]:
        return {
            "scale": self.shape.scale,
            "window": self.shape.window,
            "softcap": self.shape.softcap,
            "deterministic": self.deterministic,
        }
