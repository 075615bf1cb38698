from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from hotloop_core import TensorEntry
from hotloop_core.errors import ExportError
from hotloop_core.files import Behind, ahead


def test_ahead_gives_the_items_in_order_made_by_another_thread() -> None:
    makers: set[int] = set()

    def items() -> Iterator[int]:
        for i in range(20):
            makers.add(threading.get_ident())
            yield i

    assert list(ahead(items())) == list(range(20))
    assert makers.isdisjoint({threading.get_ident()})


def test_ahead_makes_the_next_while_one_is_used_and_no_more() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(10):
            made.append(i)
            yield i

    source = ahead(items(), depth=1)
    assert next(source) == 0
    time.sleep(0.2)
    assert made == [0, 1, 2]  # one waits, one is offered
    source.close()
    assert "hotloop-ahead" not in {thread.name for thread in threading.enumerate()}


def test_an_error_comes_in_its_items_place() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("second")

    source = ahead(items())
    assert next(source) == 1
    with pytest.raises(ValueError, match="second"):
        next(source)


def test_behind_works_in_order_and_waits_for_the_last() -> None:
    done: list[int] = []

    def work(item: int) -> None:
        time.sleep(0.01)
        done.append(item)

    with Behind(work, depth=1) as later:
        for i in range(8):
            later.put(i)
    assert done == list(range(8))


@pytest.mark.parametrize("count", [1, 50])
def test_an_error_behind_is_raised_and_nothing_more_is_done(count: int) -> None:
    done: list[int] = []

    def work(item: int) -> None:
        done.append(item)
        raise OSError("full")

    with pytest.raises(OSError, match="full"), Behind(work) as later:
        for i in range(count):
            later.put(i)
    assert done == [0]


def test_an_error_in_front_is_not_replaced_by_one_behind() -> None:
    def work(item: int) -> None:
        raise OSError("behind")

    with pytest.raises(ValueError, match="front"), Behind(work) as later:
        later.put(1)
        raise ValueError("front")


def entry(tensor: torch.Tensor, *, lazy: bool, calls: list[str]) -> TensorEntry:
    def load() -> torch.Tensor:
        calls.append("load")
        return tensor

    def rows(start: int, stop: int) -> torch.Tensor:
        calls.append(f"{start}:{stop}")
        return tensor[start:stop]

    return TensorEntry(
        name="w", role="q", part="weight", layer=0, shape=tuple(tensor.shape), dtype="float32",
        load=load, rows=rows if lazy else None,
    )  # fmt: skip


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("shape", [(10, 4), (10,), (3, 2, 4), ()])
def test_parts_put_together_are_the_tensor(shape: tuple[int, ...], lazy: bool) -> None:
    tensor, calls = torch.randn(shape), []
    parts = list(entry(tensor, lazy=lazy, calls=calls).parts(12, multiple=2))
    whole = torch.cat([part for _, part in parts]) if shape else parts[0][1]
    assert torch.equal(whole, tensor)
    assert [start for start, _ in parts] == sorted({start for start, _ in parts})
    assert all(start % 2 == 0 for start, _ in parts)
    assert ("load" in calls) == (not lazy or not shape)


def test_a_block_of_rows_is_about_as_large_as_asked() -> None:
    calls: list[str] = []
    list(entry(torch.zeros(10, 4), lazy=True, calls=calls).parts(12))
    assert calls == ["0:3", "3:6", "6:9", "9:10"]


@pytest.mark.parametrize("lazy", [True, False])
def test_a_tensor_of_another_shape_than_announced_is_refused(lazy: bool) -> None:
    wrong = TensorEntry(
        name="w", role="q", part="weight", layer=0, shape=(4, 4), dtype="float32",
        load=lambda: torch.zeros(1), rows=(lambda *_: torch.zeros(1)) if lazy else None,
    )  # fmt: skip
    with pytest.raises(ExportError, match="w was announced with shape"):
        list(wrong.parts(8))
