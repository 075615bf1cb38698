"""Packing: short rows side by side in bins of one capacity, each row still a sequence of its own.

packing = pack([len(row) for row in rows], capacity=2048)
for bin in packing:
    batch = PackedBatch.from_rows([rows[piece.row][piece.start : piece.stop] for piece in bin])
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

from hotloop_core.bin_packing import best_fit_decreasing, least_bins
from hotloop_core.errors import ConfigError, DataError
from hotloop_core.packed_batch import MASKED, PackedBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    Integers = NDArray[np.int64]

__all__ = ["MASKED", "Overlong", "PackedBatch", "Packing", "Piece", "pack", "pack_stream"]

Row = TypeVar("Row")
Overlong = Literal["error", "cut", "split"]
"""Rows longer than a bin are refused, cut at its capacity, or split into documents of their own."""


class Piece(NamedTuple):
    """Tokens `start` to `stop` of a row; a whole row unless it was cut or split."""

    row: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Packing:
    """Which pieces lie in which bin. A sequence of bins, each a list of `Piece`.

    rows, starts, stops: int64 [P], one entry a piece, in the order of the bins.
    bounds: int64 [bins + 1]; bin b holds the pieces bounds[b] to bounds[b + 1].
    rows_overlong, tokens_dropped: rows longer than the capacity, and what cutting them lost.
    least_bins: no packing of these pieces needs fewer bins.
    """

    capacity: int
    rows: Integers
    starts: Integers
    stops: Integers
    bounds: Integers
    rows_overlong: int
    tokens_dropped: int
    least_bins: int

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> list[Piece]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"bin {index} of {len(self)}")
        index %= len(self)
        span = slice(int(self.bounds[index]), int(self.bounds[index + 1]))
        columns = (self.rows[span], self.starts[span], self.stops[span])
        return [Piece(*piece) for piece in zip(*(c.tolist() for c in columns), strict=True)]

    def __iter__(self) -> Iterator[list[Piece]]:
        return (self[index] for index in range(len(self)))

    @property
    def bin_tokens(self) -> Integers:
        """The tokens in each bin, int64 [bins]."""
        import numpy as np

        ends = np.concatenate([[0], np.cumsum(self.stops - self.starts)])
        return np.diff(ends[self.bounds])

    @property
    def tokens(self) -> int:
        """All tokens in all bins."""
        return int((self.stops - self.starts).sum())

    @property
    def utilisation(self) -> float:
        """The share of the bins' places that hold a token."""
        return self.tokens / (self.capacity * len(self)) if len(self) else 1.0

    @property
    def rows_per_bin(self) -> float:
        """Pieces in a bin, on average."""
        return len(self.rows) / len(self) if len(self) else 0.0

    def __str__(self) -> str:
        return (
            f"{len(self.rows)} rows in {len(self)} bins of {self.capacity} (at least "
            f"{self.least_bins} are needed): {self.utilisation:.2%} used, {self.rows_per_bin:.1f} "
            f"rows a bin, {self.rows_overlong} rows too long, {self.tokens_dropped} tokens dropped"
        )

    def divisible(self, by: int) -> Packing:
        """The same pieces in a number of bins that divides by `by`, as several processes need it.

        The bins of most pieces are halved until it does; where it does already, this is `self`.

        Raises:
            ConfigError: `by` is below 1.
            DataError: there are too few pieces for so many bins.

        """
        import numpy as np

        if by < 1:
            raise ConfigError(f"bins that divide by {by}; expected at least 1.")
        extra = -len(self) % by
        if not extra:
            return self
        if len(self) + extra > len(self.rows):
            raise DataError(
                f"{len(self.rows)} rows in {len(self)} bins cannot make bins whose number divides "
                f"by {by}, which as many processes and batches need. Train with fewer of them, "
                "pack the rows if they are not packed, or bring more rows."
            )
        bounds = self.bounds
        for _ in range(extra):
            at = int(np.diff(bounds).argmax())
            bounds = np.insert(bounds, at + 1, (bounds[at] + bounds[at + 1]) // 2)
        return replace(self, bounds=bounds)

    def order(self, *, ranks: int = 1, each: int = 1, seed: int = 0, epoch: int = 0) -> Integers:
        """In which order the bins are trained in one epoch: int64 [bins], every bin once.

        A step takes the next ranks x each bins, `each` for rank 0, then `each` for rank 1, and so
        on. Bins of about one size make a step, dealt out so that no rank waits for another; the
        steps are shuffled by the seed and the epoch.

        Raises:
            ConfigError: `ranks` or `each` below 1, `seed` or `epoch` below 0.
            DataError: several ranks, and the bins do not divide by ranks x each: see `divisible`.

        """
        import numpy as np

        if ranks < 1 or each < 1:
            raise ConfigError(f"ranks={ranks}, each={each}; expected at least 1 of both.")
        _check_seeds(seed=seed, epoch=epoch)
        whole = len(self) // (ranks * each) * ranks * each
        if ranks > 1 and whole < len(self):
            raise DataError(
                f"{len(self)} bins do not divide by {ranks} processes x {each}, so that some would "
                f"train more than others; use packing.divisible({ranks * each})."
            )
        by_size = np.argsort(-self.bin_tokens, kind="stable")
        dealt = by_size[:whole].reshape(-1, each, ranks)
        dealt[:, 1::2] = dealt[:, 1::2, ::-1]  # there and back, as cards are dealt fairly
        steps = dealt.transpose(0, 2, 1)
        steps[1::2] = steps[1::2, ::-1].copy()  # the larger share of a step falls to each in turn
        steps = steps[np.random.default_rng([seed, epoch]).permutation(len(steps))]
        return np.concatenate([steps.reshape(-1), by_size[whole:]])

    def split(self, ranks: int, *, seed: int = 0) -> list[Packing]:
        """One packing for each process: as many bins each, and at each step about as many tokens.

        Raises:
            ConfigError, DataError: as `divisible`.

        """
        shared = self.divisible(ranks)
        steps = shared.order(ranks=ranks, seed=seed).reshape(-1, ranks)
        return [shared._with_bins(steps[:, rank].tolist()) for rank in range(ranks)]

    def _with_bins(self, order: Iterable[int]) -> Packing:
        import numpy as np

        spans = [(int(self.bounds[b]), int(self.bounds[b + 1])) for b in order]
        take = np.concatenate([np.arange(0), *(np.arange(*span) for span in spans)])
        return _packing(
            self.capacity,
            (self.rows[take], self.starts[take], self.stops[take]),
            np.cumsum([0, *(stop - start for start, stop in spans)]),
            self.rows_overlong,
            self.tokens_dropped,
        )


def pack(
    lengths: Sequence[int] | Integers,
    capacity: int,
    *,
    seed: int = 0,
    overlong: Overlong = "error",
) -> Packing:
    """Packs rows of these lengths into bins. The same arguments give the same packing.

    The seed decides which of equally long rows meet, and the order of the bins.

    Raises:
        ConfigError: the capacity is no positive whole number, the seed is negative, or `overlong`
            none of its three values.
        DataError: lengths are no whole numbers, a row is empty, or longer than the capacity under
            overlong="error".

    """
    import numpy as np

    _check(capacity, overlong, seed)
    given = _integers(lengths)
    (rows, starts, stops), rows_overlong = _fitted(given, capacity, overlong)
    sizes = stops - starts
    random = np.random.default_rng(seed)
    shuffled = random.permutation(sizes.size)
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    bins, count = best_fit_decreasing(sizes[order], capacity)
    bins = random.permutation(count)[bins]
    by_bin = np.argsort(bins, kind="stable")
    order = order[by_bin]
    bounds = np.searchsorted(bins[by_bin], np.arange(count + 1))
    pieces = (rows[order], starts[order], stops[order])
    dropped = int(given.sum()) - int(sizes.sum())
    return _packing(capacity, pieces, bounds, rows_overlong, dropped)


def pack_stream(
    rows: Iterable[Row],
    capacity: int,
    *,
    length: Callable[[Row], int] = len,  # type: ignore[assignment]
    buffer: int = 4096,
    seed: int = 0,
    overlong: Overlong = "error",
) -> Iterator[list[tuple[Piece, Row]]]:
    """Packs rows as they come, holding at most `buffer` of them; yields a bin at a time.

    When the buffer is full it is packed, the fuller half of the bins goes out, and half of the rows
    at least, while the rows of the others wait for better company. `Piece.row` counts the rows of the stream from 0.

    Raises:
        ConfigError: as `pack`, or a buffer of less than 1.
        DataError: as `pack`.

    """
    import numpy as np

    _check(capacity, overlong, seed)
    if buffer < 1:
        raise ConfigError(f"buffer={buffer}; expected at least 1 row.")
    waiting: list[tuple[Piece, Row]] = []

    def packed(everything: bool) -> Iterator[list[tuple[Piece, Row]]]:
        packing = pack([piece.stop - piece.start for piece, _ in waiting], capacity, seed=seed)
        fullest = np.argsort(-packing.bin_tokens, kind="stable").tolist()
        # Half of the rows too: full bins of one row each would leave the buffer all but full.
        gone = np.cumsum(np.diff(packing.bounds)[fullest])
        half = max((len(fullest) + 1) // 2, int(np.searchsorted(2 * gone, len(waiting))) + 1)
        out = fullest if everything else fullest[:half]
        bins = [[waiting[piece.row] for piece in packing[index]] for index in out]
        kept = sorted(piece.row for index in fullest[len(out) :] for piece in packing[index])
        waiting[:] = [waiting[index] for index in kept]
        yield from bins

    for number, row in enumerate(rows):
        alone = _integers([length(row)])
        (_, starts, stops), _ = _fitted(alone, capacity, overlong, first=number)
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            waiting.append((Piece(number, start, stop), row))
        while len(waiting) >= buffer:  # again where one row was split into more pieces than that
            yield from packed(everything=False)
    if waiting:
        yield from packed(everything=True)


def _check(capacity: int, overlong: str, seed: int) -> None:
    if not isinstance(capacity, Integral) or capacity < 1:
        raise ConfigError(f"capacity={capacity!r}; expected a whole number of tokens, at least 1.")
    if overlong not in ("error", "cut", "split"):
        raise ConfigError(f'overlong={overlong!r}; expected "error", "cut" or "split".')
    _check_seeds(seed=seed)


def _check_seeds(**seeds: int) -> None:
    for name, value in seeds.items():
        if not isinstance(value, Integral) or value < 0:
            raise ConfigError(f"{name}={value!r}; expected a whole number from 0.")


def _integers(lengths: Sequence[int] | Integers) -> Integers:
    import numpy as np

    found = np.asarray(lengths)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise DataError(
            f"lengths are {found.dtype} of shape {found.shape}; expected one whole number a row."
        )
    return found.astype(np.int64)


def _fitted(
    sizes: Integers, capacity: int, overlong: Overlong, *, first: int = 0
) -> tuple[tuple[Integers, Integers, Integers], int]:
    """(rows, starts, stops) of the pieces of rows numbered from `first`, and how many rows were too long."""
    import numpy as np

    if sizes.size and sizes.min() < 1:
        where = int(np.flatnonzero(sizes < 1)[0])
        raise DataError(
            f"row {first + where} has {sizes[where]} tokens; expected at least 1. Drop it."
        )
    over = int((sizes > capacity).sum())
    if over and overlong == "error":
        raise DataError(
            f"{over} rows are longer than {capacity} tokens, the longest (row "
            f"{first + sizes.argmax()}) has {sizes.max()}. Raise the capacity (max_seq_len), or "
            'pass overlong="cut" or overlong="split".'
        )
    if overlong == "cut":
        sizes = np.minimum(sizes, capacity)
    counts = -(-sizes // capacity)
    rows = np.repeat(np.arange(sizes.size), counts)
    within = np.arange(rows.size) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = within * capacity
    return (first + rows, starts, np.minimum(sizes[rows], starts + capacity)), over


def _packing(
    capacity: int,
    pieces: tuple[Integers, Integers, Integers],
    bounds: Integers,
    rows_overlong: int,
    tokens_dropped: int,
) -> Packing:
    rows, starts, stops = pieces
    return Packing(
        capacity=capacity,
        rows=rows,
        starts=starts,
        stops=stops,
        bounds=bounds,
        rows_overlong=rows_overlong,
        tokens_dropped=tokens_dropped,
        least_bins=least_bins(stops - starts, capacity),
    )
