"""Labels before they meet the head: shifted by one token, and which rows of them are trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def shift_labels(
    labels_BS: Tensor, *, ignore_index: int = -100, cu_seqlens_S1: Tensor | None = None
) -> Tensor:
    """The label of each token's successor: out[b, s] = labels[b, s + 1], the last one ignored.

    Args:
        labels_BS: int64, any leading dimensions; it is left as it is.
        ignore_index: what marks a position without a label.
        cu_seqlens_S1: where packed sequences begin in the flattened labels, and their total; the
            first label of a sequence then trains no token of the sequence before it.

    Returns:
        A new tensor of the same shape. No host synchronisation.

    """
    shifted_BS = labels_BS.new_full(labels_BS.shape, ignore_index)
    shifted_BS[..., :-1] = labels_BS[..., 1:]
    if cu_seqlens_S1 is not None and labels_BS.numel():
        # An empty first sequence ends at -1, the last position, which is ignored anyway.
        ignored = shifted_BS.new_full((), ignore_index)
        shifted_BS.view(-1).index_put_((cu_seqlens_S1[1:].long() - 1,), ignored)
    return shifted_BS


class TrainedRows:
    """The rows whose label is not ignored, in order, found without stopping the host.

    The count is needed on the host to size the GEMMs. Made when labels arrive, before the layers
    run, it has crossed to the host long before the loss asks for it; made by the loss itself, the
    host waits there for the device once per call.
    """

    def __init__(self, labels: Tensor, *, ignore_index: int = -100) -> None:
        """Starts on the labels (already shifted), int64 of any shape, on their device."""
        ignored_T = labels.reshape(-1) == ignore_index
        self.total = ignored_T.numel()
        self._index_T = ignored_T.to(torch.uint8).argsort(stable=True)
        self._count = (self.total - ignored_T.sum()).to("cpu", non_blocking=True)
        self._arrived = None
        if labels.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(labels.device))

    @property
    def count(self) -> int:
        """How many rows are trained. Waits for the number, not for the device's other work."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return int(self._count)

    def select(self, start: int, stop: int) -> Tensor | slice:
        """The trained rows number `start` to `stop`: int64 indices, or a slice where all are."""
        if self.count == self.total:
            return slice(start, stop)
        return self._index_T[start:stop]
