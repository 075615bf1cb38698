"""Rows in bins as a data set for Trainer, the order they are trained in, and the collator that lays them end to end.

    dataset = PackedDataset(rows, capacity=2048)
    trainer = PackedTrainer(model, args, train_dataset=dataset, data_collator=collate)

Nothing is ever padded. With plain `Trainer` and one process the same two arguments do; `PackedTrainer` adds even shares
for several processes, and loss weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from hotloop_core.errors import DataError
from hotloop_core.packing import MASKED, Overlong, PackedBatch, Packing, pack, pack_stream
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from .render import Row

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import datasets
    from torch import Tensor

WEIGHTS = "loss_weights"
"""The key of a weighted batch's weights, fp32 [1, T]."""


class PackedDataset(Dataset[list[Row]]):
    """Item i is the list of rows in bin i.

    packing: which rows lie in which bin: the same for the same lengths, capacity and seed.
    epoch: which epoch's order `PackedSampler` gives.
    """

    def __init__(
        self,
        rows: Sequence[Row | Mapping[str, Any]],
        *,
        capacity: int,
        packed: bool = True,
        seed: int = 0,
        overlong: Overlong = "error",
        divisible_by: int = 1,
    ) -> None:
        """Measures the rows and packs them; they are read again, one by one, as they are trained.

        Args:
            rows: mappings with input_ids and optionally labels (default: the ids; -100 is not trained) and weights
                (of the loss: one number, or one a token). A `datasets.Dataset` is such a sequence.
            capacity: tokens in a bin.
            packed: several rows to a bin; False: each row has one of its own.
            seed: of the bins and of their order.
            overlong: what becomes of rows longer than a bin, as in `hotloop_core.packing.pack`.
            divisible_by: processes x per-device batch size, so that all take equally many full batches.

        Raises:
            DataError: a row is empty or too long, or there are too few for so many processes.

        """
        self._rows = rows
        self.seed, self.epoch = seed, 0
        found = pack([len(as_row(row)) for row in rows], capacity, seed=seed, overlong=overlong)
        if not packed:
            found = replace(found, bounds=np.arange(len(found.rows) + 1))
        self.packing: Packing = found.divisible(divisible_by)

    def __len__(self) -> int:
        return len(self.packing)

    def __getitem__(self, index: int) -> list[Row]:
        return [as_row(self._rows[p.row])[p.start : p.stop] for p in self.packing[index]]

    def set_epoch(self, epoch: int) -> None:
        """Trainer and accelerate call this where they do not reach the sampler (a resumed run on several processes)."""
        self.epoch = epoch

    def to_datasets(self) -> datasets.Dataset:
        """The bins in the columns of TRL's own packing: input_ids, labels, seq_lengths.

        Give it to `SFTTrainer` with padding_free=True and dataset_kwargs={"skip_prepare_dataset": True}.

        Raises:
            DataError: a row has loss weights, which TRL would not see.

        """
        import datasets

        def bins() -> Iterator[dict[str, list[int]]]:
            for index in range(len(self)):
                rows = self[index]
                if any(row.weights is not None for row in rows):
                    raise DataError(
                        "a row has loss weights, which TRL's trainer does not use; train with "
                        "hotloop.training.trainer.PackedTrainer, or leave them out"
                    )
                yield {
                    "input_ids": np.concatenate([row.ids for row in rows]).tolist(),
                    "labels": np.concatenate([row.labels for row in rows]).tolist(),
                    "seq_lengths": [len(row) for row in rows],
                }

        return datasets.Dataset.from_list(list(bins()))


class PackedStream(IterableDataset[list[Row]]):
    """Bins of rows that arrive one by one, packed within a bounded buffer; each iteration reads the rows again.

    For rows that do not fit into memory or have no end. A resumed Trainer reads past the bins that were trained. In one
    process and one DataLoader worker: who shares a stream among several gives each a stream of its own.
    """

    def __init__(
        self,
        rows: Iterable[Row | Mapping[str, Any]],
        *,
        capacity: int,
        buffer: int = 4096,
        seed: int = 0,
        overlong: Overlong = "error",
    ) -> None:
        """Arguments as those of `PackedDataset`, and how many rows wait for company at most."""
        self._rows = rows
        self._options: dict[str, Any] = {"buffer": buffer, "seed": seed, "overlong": overlong}
        self._capacity = capacity

    def __iter__(self) -> Iterator[list[Row]]:
        """Yields a bin at a time.

        Raises:
            DataError: a row is empty or too long, or several processes or workers would read the same rows.

        """
        worker = get_worker_info()
        readers = 1 if worker is None else worker.num_workers
        readers *= torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if readers > 1:
            raise DataError(
                f"{readers} processes or DataLoader workers would each train all rows of one stream. Use one (with "
                "dataloader_num_workers at most 1), or a PackedDataset, which is dealt out among them."
            )
        for bin in pack_stream(map(as_row, self._rows), self._capacity, **self._options):
            yield [row[piece.start : piece.stop] for piece, row in bin]


class PackedSampler(Sampler[int]):
    """The bins in the order of `Packing.order`, anew in each epoch, the same for the same seed.

    Trainer deals batches to its processes one by one, so each gets its share of every step.
    """

    def __init__(self, dataset: PackedDataset, *, ranks: int = 1, each: int = 1) -> None:
        """Takes a data set, the number of processes, and the bins in a batch of each.

        Raises:
            DataError: several processes, and the bins do not divide among their batches.

        """
        self._dataset, self._ranks, self._each = dataset, ranks, each
        self._order()

    def _order(self) -> list[int]:
        data = self._dataset
        order = data.packing.order(
            ranks=self._ranks, each=self._each, seed=data.seed, epoch=data.epoch
        )
        return order.tolist()

    def __iter__(self) -> Iterator[int]:
        return iter(self._order())

    def __len__(self) -> int:
        return len(self._dataset)

    def set_epoch(self, epoch: int) -> None:
        """The data set remembers it, so that this and `PackedDataset.set_epoch` are one thing."""
        self._dataset.set_epoch(epoch)


def as_row(example: Row | Mapping[str, Any]) -> Row:
    """A row of tokens from a mapping with input_ids, labels (default: the ids) and weights (default: none).

    Raises:
        DataError: labels or weights of another length, ids or labels that are no whole numbers, padding, or neither a
            row nor a mapping with input_ids.

    """
    if isinstance(example, Row):
        return example
    if not isinstance(example, Mapping) or "input_ids" not in example:
        found = sorted(example) if isinstance(example, Mapping) else type(example).__name__
        raise DataError(
            f"found a row {found}; expected a mapping with input_ids. Tokenise it first"
        )
    ids = _whole_numbers("input_ids", example["input_ids"])
    given = example.get("labels")
    labels = ids if given is None else _whole_numbers("labels", given)
    mask = example.get("attention_mask")
    if mask is not None and not np.asarray(mask).all():
        raise DataError(
            "a row has padding (zeros in its attention_mask), which would be trained like its tokens; tokenise with "
            "padding=False, packing needs none"
        )
    weights = example.get("weights")
    if weights is not None:
        given = np.asarray(weights, dtype=np.float32)
        weights = np.full(ids.shape, given) if given.ndim == 0 else given
    if (
        ids.ndim != 1
        or labels.shape != ids.shape
        or (weights is not None and weights.shape != ids.shape)
    ):
        shapes = [None if x is None else x.shape for x in (ids, labels, weights)]
        raise DataError(
            f"a row with input_ids, labels and weights of shapes {shapes}; expected one list of ids, and as many "
            "labels and weights"
        )
    return Row(ids, labels, weights)


def _whole_numbers(name: str, values: Any) -> np.ndarray:
    """int32; what that cannot hold is refused, as numpy would cut or wrap it."""
    found = np.asarray(values)
    whole = found.astype(np.int32) if found.dtype.kind in "iu" or not found.size else None
    if whole is None or (whole != found).any():
        raise DataError(
            f"found a row whose {name} are {found.dtype}, such as {found.reshape(-1)[0]!r}; expected whole numbers "
            "of 32 bits, as tokenizers give them"
        )
    return whole


def collate(bins: Sequence[Sequence[Row]]) -> dict[str, Tensor]:
    """The bins of one batch as input_ids, labels and position_ids, each int64 [1, T]; positions restart with each row.

    They alone say where rows begin: offsets [S + 1] have another first dimension than the rest, and accelerate slices
    every tensor of a batch from a stream by that of the first, which leaves one offset and all rows as one.

    Raises:
        DataError: no token of the batch is trained, so its loss would be 0 / 0; or a row has loss weights, which a
            plain Trainer would pass by.

    """
    batch = _batch(bins)
    if batch.weights is not None:
        raise DataError(
            "a row has loss weights, which Trainer does not use; pass data_collator=collate_weighted to "
            "hotloop.training.trainer.PackedTrainer, which does"
        )
    return _inputs(batch)


def collate_weighted(bins: Sequence[Sequence[Row]]) -> dict[str, Tensor]:
    """As `collate`, with loss_weights (fp32 [1, T]) where a row of the batch has any. For `PackedTrainer`."""
    batch = _batch(bins)
    inputs = _inputs(batch)
    return inputs if batch.weights is None else {**inputs, WEIGHTS: batch.weights[None]}


def _inputs(batch: PackedBatch) -> dict[str, Tensor]:
    tensors = {
        "input_ids": batch.input_ids,
        "labels": batch.labels,
        "position_ids": batch.position_ids,
    }
    return {name: tensor[None] for name, tensor in tensors.items()}


def _batch(bins: Sequence[Sequence[Row]]) -> PackedBatch:
    rows = [row for rows in bins for row in rows]
    weighted = any(row.weights is not None for row in rows)
    batch = PackedBatch.from_rows(
        [row.ids.tolist() for row in rows],
        [row.labels.tolist() for row in rows],
        weights=[1.0 if row.weights is None else row.weights.tolist() for row in rows]
        if weighted
        else None,
    )
    if bool((batch.labels == MASKED).all()):
        raise DataError(
            f"a batch of {len(rows)} rows and {len(batch.labels)} tokens has no trained token; "
            'look at the rows with `hotloop data`, or set data.loss_on = "all"'
        )
    return batch
