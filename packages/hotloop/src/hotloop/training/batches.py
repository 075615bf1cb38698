"""Bins of rows as a data set for Trainer, and the collator that lays them end to end. Nothing is ever padded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotloop_core.errors import DataError
from hotloop_core.packing import MASKED, PackedBatch, Packing, pack
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from .render import Row


class Bins(Dataset[list["Row"]]):
    """Item i is the list of rows in bin i. Without packing every row has a bin of its own.

    packing: how the rows lie in the bins, or None. The bins are the same for the same rows, capacity and seed.
    """

    def __init__(self, rows: Sequence[Row], *, capacity: int, packed: bool, seed: int) -> None:
        self._rows = rows
        lengths = [len(row) for row in rows]
        self.packing: Packing | None = pack(lengths, capacity, seed=seed) if packed else None

    def __len__(self) -> int:
        return len(self._rows) if self.packing is None else len(self.packing)

    def __getitem__(self, index: int) -> list[Row]:
        if self.packing is None:
            return [self._rows[index]]
        return [self._rows[piece.row] for piece in self.packing[index]]


def collate(bins: Sequence[Sequence[Row]]) -> dict[str, Tensor | int]:
    """The bins of one batch as one sequence [1, T], each row at positions from 0, with its borders beside it.

    Raises:
        DataError: no token of the batch is trained, so its loss would be 0 / 0.

    """
    rows = [row for rows in bins for row in rows]
    batch = PackedBatch.from_rows(
        [row.ids.tolist() for row in rows], [row.labels.tolist() for row in rows]
    )
    if bool((batch.labels == MASKED).all()):
        raise DataError(
            f"a batch of {len(rows)} rows and {len(batch.labels)} tokens has no trained token; "
            'look at the rows with `hotloop data`, or set data.loss_on = "all"'
        )
    return batch.model_inputs()
