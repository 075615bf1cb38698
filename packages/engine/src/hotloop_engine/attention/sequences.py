"""Which tokens of a flattened batch belong together: all that attention must know of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from hotloop_core.errors import DataError, UnsupportedError
from torch import Tensor

from .shapes import SHAPES

_LARGEST = 2**31 - 1  # cu_seqlens is int32, as every attention library wants it


@dataclass(frozen=True, kw_only=True, eq=False)
class Sequences:
    """How T tokens, a batch [B, S] flattened row by row, divide into causal sequences.

    Built once per batch and shared by all layers. Every token belongs to exactly one sequence:
    padding stays where it is and forms sequences of its own, so no real token sees it, nothing is
    moved, and what comes out there is finite.

    cu_seqlens: int32 [count + 1] on the batch's device, from 0 to `tokens`, strictly increasing.
    longest: the number of tokens of the longest sequence.
    tokens: T.
    """

    cu_seqlens: Tensor
    longest: int
    tokens: int

    @property
    def count(self) -> int:
        """The number of sequences."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def dense_shape(self) -> tuple[int, int] | None:
        """(count, longest) where all sequences are equally long: [T, ...] is a dense batch."""
        return (self.count, self.longest) if self.count * self.longest == self.tokens else None

    @cached_property
    def fresh(self) -> bool:
        """Whether the batch is of a shape that has not come often enough for a plan of its own (see `Shapes`).

        Asked at the first layer and then known: all layers, and backward, take the same backend.
        """
        shape = self.dense_shape
        return shape is not None and SHAPES.is_fresh(shape)

    @cached_property
    def requests(self) -> dict[tuple[object, ...], object]:
        """What layers have asked of attention over this batch: most ask the same (see `request`)."""
        return {}

    @property
    def device(self) -> torch.device:
        """The device of the batch."""
        return self.cu_seqlens.device

    def bounds(self) -> list[tuple[int, int]]:
        """(start, stop) of each sequence. Waits for the device; free on the CPU."""
        offsets = self.cu_seqlens.tolist()
        return list(pairwise(offsets))

    def positions(self) -> Tensor:
        """int64 [T]: the place of each token in its sequence, from 0. Never waits for the device."""
        index = torch.arange(self.tokens, device=self.device)
        starts = self.cu_seqlens[:-1].long()
        return index - starts[torch.searchsorted(starts, index, right=True) - 1]

    @staticmethod
    def dense(batch: int, length: int, device: torch.device | str) -> Sequences:
        """`batch` rows of `length` tokens each, without padding. Never waits for the device."""
        tokens = batch * length
        _check_size(tokens)
        if tokens == 0:
            empty = torch.zeros(1, dtype=torch.int32, device=device)
            return Sequences(cu_seqlens=empty, longest=0, tokens=0)
        cu_seqlens = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=device)
        return Sequences(cu_seqlens=cu_seqlens, longest=length, tokens=tokens)

    @staticmethod
    def from_padding_mask(mask_BS: Tensor) -> Sequences:
        """Rows padded on the left, the right or both. One device wait.

        Args:
            mask_BS: non-zero where a token is real.

        Raises:
            UnsupportedError: a row has padding between its tokens, as packed rows may not; or several values beside 0,
                which are numbers of segments.

        """
        _check_rank(mask_BS, "attention mask")
        found_BS = mask_BS.float().cpu().numpy()
        host_BS = found_BS != 0
        most_B1 = found_BS.max(1, keepdims=True, where=host_BS, initial=-np.inf)
        if (host_BS & (found_BS != most_B1)).any():
            raise UnsupportedError(
                "attention mask: a row has several values beside 0, as masks that number packed segments have; read "
                "as padding it would let segments see each other. Pack with position_ids that restart at 0 and pass no "
                "mask."
            )
        starts_BS = host_BS & ~np.pad(host_BS, ((0, 0), (1, 0)))[:, :-1]
        split = np.flatnonzero(starts_BS.sum(axis=1) > 1)
        if split.size:
            raise UnsupportedError(
                f"attention mask: row {split[0]} has padding between its tokens; expected each "
                "row to be one run of ones, with zeros before or after it. Move the padding to one "
                "side, or pack with position_ids that restart at 0 and pass no mask."
            )
        change_BS = np.ones_like(host_BS)
        change_BS[:, 1:] = host_BS[:, 1:] != host_BS[:, :-1]
        return _from_starts(change_BS, mask_BS.device)

    @staticmethod
    def from_position_ids(position_ids_BS: Tensor, *, batch: int | None = None) -> Sequences:
        """Packed rows: a sequence begins where a position is not the one before plus one.

        One device wait. The rule is transformers' `find_packed_sequence_indices`. Plain 0, 1, 2,
        ... gives a dense batch. A single row of ids may stand for `batch` rows, as transformers
        passes it. Padding that repeats a position becomes sequences of one token.
        """
        _check_rank(position_ids_BS, "position_ids")
        rows = position_ids_BS.shape[0]
        batch = rows if batch is None else batch
        if rows not in (1, batch):
            raise DataError(
                f"position_ids have {rows} rows; expected 1 or {batch}, the batch size."
            )
        host_BS = np.broadcast_to(position_ids_BS.cpu().numpy(), (batch, position_ids_BS.shape[1]))
        starts_BS = np.ones(host_BS.shape, dtype=bool)
        starts_BS[:, 1:] = np.diff(host_BS, axis=1) != 1
        return _from_starts(starts_BS, position_ids_BS.device)

    @staticmethod
    def from_cu_seqlens(cu_seqlens: Tensor, *, tokens: int) -> Sequences:
        """Offsets that a collator made: integers from 0, never falling. One device wait.

        Empty sequences are dropped.

        Raises:
            DataError: the offsets are no integers, do not start at 0, fall, or end elsewhere than at `tokens`:
                cut offsets would let rows see each other.

        """
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            raise DataError(
                f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; expected one dimension."
            )
        if cu_seqlens.is_floating_point() or cu_seqlens.is_complex():
            raise DataError(f"cu_seqlens are {cu_seqlens.dtype}; expected integers.")
        offsets = cu_seqlens.cpu().numpy().astype(np.int64)  # unsigned ones cannot fall
        falls = bool((np.diff(offsets) < 0).any())
        if offsets[0] != 0 or falls or offsets[-1] != tokens:
            raise DataError(
                f"cu_seqlens go from {offsets[0]} to {offsets[-1]}{' and fall' if falls else ''}; "
                f"expected them to rise from 0 to {tokens}, the tokens of the batch. If something cut them "
                "(accelerate cuts every tensor of a streamed batch), set "
                "accelerator_config={'dispatch_batches': False}; if the batch is padded behind its last row, add "
                "the padding's end as a last offset."
            )
        return _from_offsets(offsets, cu_seqlens.device)


def _from_starts(starts_BS: np.ndarray, device: torch.device) -> Sequences:
    return _from_offsets(np.append(np.flatnonzero(starts_BS), starts_BS.size), device)


def _from_offsets(offsets: np.ndarray, device: torch.device) -> Sequences:
    _check_size(int(offsets[-1]))
    offsets = np.unique(np.append(offsets, 0))
    lengths = np.diff(offsets)
    host = torch.from_numpy(offsets.astype(np.int32))
    return Sequences(
        cu_seqlens=host.to(device, non_blocking=True),
        longest=int(lengths.max(initial=0)),
        tokens=int(offsets[-1]),
    )


def _check_rank(tensor: Tensor, name: str) -> None:
    if tensor.dim() != 2:
        raise UnsupportedError(
            f"{name} has shape {tuple(tensor.shape)}; expected [batch, length]. A mask over pairs "
            "of tokens is not supported: attention here is causal, packed or windowed."
        )


def _check_size(tokens: int) -> None:
    if tokens > _LARGEST:
        raise UnsupportedError(
            f"a batch of {tokens} tokens: cu_seqlens is int32, so at most {_LARGEST} fit. Use a "
            "smaller batch."
        )
