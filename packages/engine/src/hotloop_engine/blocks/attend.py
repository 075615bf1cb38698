"""Attention as one layer has it: its shape, the rows of the batch, and the backend that is chosen for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from hotloop_core.plan import key_heads_at_once

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
    """Attention of one layer over one batch: all heads at once or, in a very long batch, some after others.

    backend: its name, None for the fastest that can.
    """

    shape: AttentionShape
    sequences: Sequences
    backend: str | None = None
    deterministic: bool = False

    def forward(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> tuple[Tensor, ...]:
        """Returns (o_THK, the log-sum-exp, fp32, of each group of heads)."""
        groups = self._groups(q_THK.shape[0])
        if len(groups) == 1:
            return self._chosen(q_THK, k_TGK).forward(
                q_THK, k_TGK, v_TGK, self.sequences, **self._options()
            )
        o_THK = torch.empty(q_THK.shape, dtype=q_THK.dtype, device=q_THK.device)
        sums: list[Tensor] = []
        for some, keys in groups:
            q, k, v = q_THK[:, some], k_TGK[:, keys], v_TGK[:, keys]
            _, lse = self._chosen(q, k).forward(
                q, k, v, self.sequences, out=o_THK[:, some], **self._options()
            )
            sums.append(lse)
        return o_THK, *sums

    def backward(
        self,
        do_THK: Tensor,
        q_THK: Tensor,
        k_TGK: Tensor,
        v_TGK: Tensor,
        kept: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (dq, dk, dv). kept: what forward returned."""
        groups = self._groups(q_THK.shape[0])
        o_THK, *sums = kept
        if len(groups) == 1:
            return self._chosen(q_THK, k_TGK).backward(
                do_THK, q_THK, k_TGK, v_TGK, o_THK, sums[0], self.sequences, **self._options()
            )
        dq_THK, dk_TGK, dv_TGK = (
            torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_THK, k_TGK, v_TGK)
        )
        for (some, keys), lse in zip(groups, sums, strict=True):
            q, k, v = q_THK[:, some], k_TGK[:, keys], v_TGK[:, keys]
            self._chosen(q, k).backward(
                do_THK[:, some],
                q,
                k,
                v,
                o_THK[:, some],
                lse,
                self.sequences,
                out=(dq_THK[:, some], dk_TGK[:, keys], dv_TGK[:, keys]),
                **self._options(),
            )
        return dq_THK, dk_TGK, dv_TGK

    def _groups(self, tokens: int) -> list[tuple[slice, slice]]:
        """Query heads and key heads to take at once; one pair for all as a rule."""
        shape = self.shape
        each = shape.heads // shape.kv_heads
        step = key_heads_at_once(tokens, shape.heads, shape.kv_heads, shape.head_dim)
        return [
            (slice(i * each, (i + step) * each), slice(i, i + step))
            for i in range(0, shape.kv_heads, step)
        ]

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
