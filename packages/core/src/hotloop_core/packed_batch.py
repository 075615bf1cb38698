"""Rows laid end to end as one batch, with all that a model needs to keep them apart."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

from hotloop_core.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

MASKED = -100
"""The label that a loss ignores."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedBatch:
    """Rows laid end to end; T tokens in all. Tensors are on the CPU.

    input_ids, labels, position_ids: int64 [T]; positions restart at 0 with each row; the first
        label of each row is `MASKED`, since the token before it belongs to another row.
    cu_seqlens: int32 [rows + 1], where each row begins, and T.  longest: tokens of the longest row.
    row_ids: int64 [T], which of the rows each token came from; -1 for padding.
    weights: fp32 [T], what the loss of predicting each token is multiplied by, or None: all 1.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    longest: int
    row_ids: Tensor
    weights: Tensor | None = None

    @staticmethod
    def from_rows(
        rows: Sequence[Sequence[int]],
        labels: Sequence[Sequence[int]] | None = None,
        *,
        weights: Sequence[float | Sequence[float]] | None = None,
        length: int | None = None,
        pad_id: int = 0,
    ) -> PackedBatch:
        """Lays the rows end to end, without padding unless a `length` is asked for.

        Padding comes last, as one more sequence whose labels are all masked. Labels default to the
        ids; they are those of the same tokens, not shifted, as transformers expects them. `weights`
        has for each row one number, or one for each of its tokens, like its labels.

        Raises:
            DataError: no rows, an empty row, ids or labels that are no whole numbers, labels or
                weights that do not fit, weights that are negative or not finite, or more tokens
                than `length`.

        """
        import torch

        sizes = [len(row) for row in rows]
        if not sizes or min(sizes) < 1:
            raise DataError(
                f"rows of {sizes} tokens; expected one row or more, none of them empty."
            )
        if labels is not None and [len(row) for row in labels] != sizes:
            raise DataError(
                f"labels of {[len(row) for row in labels]} tokens for rows of {sizes}; expected "
                "one label a token."
            )
        total = sum(sizes)
        padding = 0 if length is None else length - total
        if padding < 0:
            raise DataError(f"{total} tokens do not fit into a batch of {length}.")
        ids = [token for row in rows for token in row] + [pad_id] * padding
        known = rows if labels is None else labels
        targets = [target for row in known for target in row] + [MASKED] * padding
        spans = sizes + ([padding] if padding else [])
        sizes_S = torch.tensor(spans)
        starts_S = sizes_S.cumsum(0) - sizes_S
        labels_T = _whole_numbers("labels", targets)
        labels_T[starts_S] = MASKED
        row_ids_T = torch.repeat_interleave(torch.arange(len(spans)), sizes_S)
        return PackedBatch(
            input_ids=_whole_numbers("ids", ids),
            labels=labels_T,
            position_ids=torch.arange(len(ids)) - starts_S[row_ids_T],
            cu_seqlens=torch.cat([starts_S, torch.tensor([len(ids)])]).to(torch.int32),
            longest=max(spans),
            row_ids=row_ids_T.where(row_ids_T < len(sizes), -1),
            weights=None if weights is None else _weights(weights, sizes, padding),
        )

    def model_inputs(self) -> dict[str, Tensor | int]:
        """Keyword arguments for a transformers model's forward, as one row [1, T].

        Weights are not among them: no transformers model takes any, and most would ignore them.
        `hotloop.training.loss.weighted_loss` takes both.
        """
        return {
            "input_ids": self.input_ids[None],
            "labels": self.labels[None],
            "position_ids": self.position_ids[None],
            "cu_seq_lens_q": self.cu_seqlens,
            "cu_seq_lens_k": self.cu_seqlens,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
        }


def _whole_numbers(name: str, values: list[int]) -> Tensor:
    import torch

    values_T = torch.tensor(values)
    if values_T.dtype != torch.int64 or values_T.dim() != 1:
        raise DataError(
            f"{name} make a {values_T.dtype} tensor of shape {tuple(values_T.shape)}; expected rows "
            "of whole numbers."
        )
    return values_T


def _weights(
    weights: Sequence[float | Sequence[float]], sizes: Sequence[int], padding: int
) -> Tensor:
    import torch

    rows = [
        torch.full((size,), float(given)) if isinstance(given, Real) else torch.tensor(given)
        for given, size in zip(weights, sizes, strict=False)
    ]
    if len(weights) != len(sizes) or [len(row) for row in rows] != list(sizes):
        raise DataError(
            f"weights for {[len(row) for row in rows]} tokens, rows of {list(sizes)}; expected one "
            "number for each row, or one for each of its tokens."
        )
    weights_T = torch.cat([*(row.float() for row in rows), torch.zeros(padding)])
    if not bool((weights_T.isfinite() & (weights_T >= 0)).all()):
        raise DataError("a loss weight is negative or not finite; expected numbers from 0.")
    return weights_T
