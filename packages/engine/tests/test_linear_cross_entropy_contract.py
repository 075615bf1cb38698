from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import pytest
import torch
from hotloop_core.errors import ConfigError, GradientError, UnsupportedError
from hotloop_core.kernels import HeadLossOptions
from hotloop_engine.ops.linear_cross_entropy import (
    TrainedRows,
    chunking,
    linear_cross_entropy,
    linear_log_probs,
    shift_labels,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Head(NamedTuple):
    hidden: Tensor
    weight: Tensor
    labels: Tensor


def head(
    T: int,
    V: int,
    D: int,
    *,
    train: str = "hidden weight",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Head:
    """Every third label is ignored; `train` names what needs a gradient."""
    hidden = torch.randn(T, D, dtype=dtype, device=device)
    weight = torch.randn(V, D, dtype=dtype, device=device)
    labels = torch.randint(V, (T,), device=device)
    labels[2::3] = -100
    wanted = train.split()
    return Head(
        hidden.requires_grad_("hidden" in wanted), weight.requires_grad_("weight" in wanted), labels
    )


class Counting(TorchDispatchMode):
    """Counts the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "train, in_forward, in_backward",
    [("", 1, 0), ("hidden", 2, 0), ("hidden weight", 3, 0), ("weight", 2, 0)],
)
def test_the_summed_loss_takes_no_gemm_that_it_does_not_need(
    train, in_forward, in_backward
) -> None:
    one = head(9, 37, 24, train=train)
    with Counting() as forward:
        loss = linear_cross_entropy(one.hidden, one.weight, one.labels)
    assert forward.calls["mm"] + forward.calls["addmm_"] == in_forward
    if train:
        with Counting() as backward:
            loss.backward()
        assert backward.calls["mm"] + backward.calls["addmm_"] == in_backward


def test_without_grad_no_gradient_is_made() -> None:
    one = head(9, 37, 24)
    with torch.no_grad(), Counting() as counted:
        loss = linear_cross_entropy(one.hidden, one.weight, one.labels)
        out = linear_log_probs(one.hidden, one.weight, one.labels, entropy=True)
    assert counted.calls["mm"] == 2  # one each
    assert not loss.requires_grad and not out.loss.requires_grad


@pytest.mark.parametrize("per_token, gemms", [(False, 2), (True, 2)])
def test_a_frozen_head_takes_two_gemms_also_for_log_probabilities(per_token, gemms) -> None:
    one = head(9, 37, 24, train="hidden")
    with Counting() as counted:
        if per_token:
            linear_log_probs(one.hidden, one.weight, one.labels).log_prob.sum().backward()
        else:
            linear_cross_entropy(one.hidden, one.weight, one.labels).backward()
    assert counted.calls["mm"] == gemms


def test_an_entropy_that_may_be_differentiated_costs_no_gemm_until_it_is() -> None:
    one = head(9, 37, 24, train="hidden")

    def tokens():
        return linear_log_probs(
            one.hidden, one.weight, one.labels, entropy=True, entropy_gradient=True
        )

    with Counting() as unused:
        tokens().log_prob.sum().backward()
    assert unused.calls["mm"] == 2
    with Counting() as used:
        out = tokens()
        (out.log_prob.sum() + out.entropy.sum()).backward()
    assert used.calls["mm"] == 4


def test_a_second_backward_raises_by_name() -> None:
    one = head(6, 11, 4, train="hidden")
    loss = linear_cross_entropy(one.hidden, one.weight, one.labels)
    loss.backward(retain_graph=True)
    first = one.hidden.grad.clone()
    with pytest.raises(GradientError, match="second time"):
        loss.backward()
    assert torch.equal(one.hidden.grad, first)


def test_a_second_backward_through_recomputed_logits_gives_the_same_gradient() -> None:
    one = head(6, 11, 4)
    total = linear_log_probs(one.hidden, one.weight, one.labels).log_prob.sum()
    total.backward(retain_graph=True)
    first = one.weight.grad.clone()
    total.backward()
    assert torch.equal(one.weight.grad, 2 * first)


def test_a_gradient_of_the_gradient_raises() -> None:
    one = head(6, 11, 4)
    loss = linear_cross_entropy(one.hidden, one.weight, one.labels)
    with pytest.raises(GradientError, match="create_graph"):
        torch.autograd.grad(loss, one.hidden, create_graph=True)


@pytest.mark.parametrize(
    "hidden, weight, labels",
    [
        (torch.randn(3, 4), torch.randn(5, 6), torch.zeros(3, dtype=torch.int64)),
        (torch.randn(3, 4), torch.randn(5, 4), torch.zeros(4, dtype=torch.int64)),
        (torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.int32)),
        (torch.randn(3, 4), torch.randn(5, 4).bfloat16(), torch.zeros(3, dtype=torch.int64)),
    ],
    ids=["hidden size", "tokens", "label dtype", "head dtype"],
)
def test_operands_that_do_not_go_together_are_refused(hidden, weight, labels) -> None:
    with pytest.raises(UnsupportedError, match=r"expected|Cast one"):
        linear_cross_entropy(hidden, weight, labels)


def test_the_triton_kernels_refuse_fp64() -> None:
    one = head(3, 11, 4, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match="reference"):
        linear_cross_entropy(one.hidden, one.weight, one.labels, impl="triton")


@pytest.mark.parametrize(
    "arguments",
    [
        {"softcap": 0.0},
        {"temperature": 0.0},
        {"label_smoothing": 1.5},
        {"z_loss": -1.0},
        {"scale": float("nan")},
    ],
    ids=str,
)
def test_options_without_a_meaning_are_refused(arguments) -> None:
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        HeadLossOptions(**arguments)


def test_entropy_gradient_without_entropy_and_bad_chunks_and_foreign_rows_are_refused() -> None:
    one = head(3, 11, 4)
    with pytest.raises(ConfigError, match="entropy=True"):
        linear_log_probs(one.hidden, one.weight, one.labels, entropy_gradient=True)
    with pytest.raises(ConfigError, match="at least 1"):
        linear_cross_entropy(one.hidden, one.weight, one.labels, chunk_tokens=0)
    with pytest.raises(ConfigError, match="count the labels that you pass"):
        linear_cross_entropy(one.hidden, one.weight, one.labels, rows=TrainedRows(one.labels[1:]))


def test_rows_counted_beforehand_give_the_same_loss() -> None:
    one = head(9, 37, 24)
    rows = TrainedRows(one.labels)
    assert rows.count == 6
    assert torch.equal(rows.select(0, 6), (one.labels != -100).nonzero()[:, 0])
    assert torch.equal(
        linear_cross_entropy(one.hidden, one.weight, one.labels, rows=rows),
        linear_cross_entropy(one.hidden, one.weight, one.labels),
    )


@pytest.mark.parametrize("multiprocessors", [1, 28, 132])
@pytest.mark.parametrize("vocabulary", [100, 32_000, 128_256, 262_144])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [0, 1, 63, 2048, 16_384, 100_001])
def test_a_tile_of_logits_fits_its_bytes_and_is_never_taller_than_what_is_trained(
    vocabulary, dtype, count, multiprocessors, monkeypatch
) -> None:
    monkeypatch.setattr(chunking, "_multiprocessors", lambda device: multiprocessors)
    weight = torch.empty(vocabulary, 3584, device="meta")
    chunk = chunking.chunk_tokens(count, weight, dtype, None)
    assert chunk * vocabulary * dtype.itemsize <= chunking.TILE_BYTES
    assert 1 <= chunk < count + 128 + (count == 0)
    chunks = max(1, -(-count // chunk))
    if multiprocessors == 1 and count:  # then nothing speaks against even chunks
        assert count - (chunks - 1) * chunk > chunk - chunks * 128


@pytest.mark.parametrize(
    "vocabulary, width, rounds", [(128_256, 4096, 16), (152_064, 3584, 15), (256_000, 3584, 15)]
)
def test_the_gradient_of_16_384_tokens_takes_the_fewest_rounds_of_an_h100(
    vocabulary, width, rounds, monkeypatch
) -> None:
    monkeypatch.setattr(chunking, "_multiprocessors", lambda device: 132)
    weight = torch.empty(vocabulary, width, device="meta")
    chunk = chunking.chunk_tokens(16_384, weight, torch.bfloat16, None)
    full, rest = divmod(16_384, chunk)
    found = full * chunking._rounds(chunk, width, 132) + chunking._rounds(rest, width, 132)
    assert found == rounds


def test_shifted_labels_are_those_of_the_next_token_and_end_with_each_packed_row() -> None:
    labels = torch.arange(12).view(2, 6)
    assert shift_labels(labels).tolist() == [[1, 2, 3, 4, 5, -100], [7, 8, 9, 10, 11, -100]]
    packed = labels.view(1, 12)
    cu_seqlens = torch.tensor([0, 0, 3, 8, 8, 12], dtype=torch.int32)  # two of them empty
    shifted = shift_labels(packed, ignore_index=-1, cu_seqlens_S1=cu_seqlens)
    assert shifted.tolist() == [[1, 2, -1, 4, 5, 6, 7, -1, 9, 10, 11, -1]]
    assert packed.tolist() == [list(range(12))]


@pytest.mark.gpu
def test_a_frozen_head_of_128_256_classes_takes_less_than_one_gib_beside_its_gradient() -> None:
    hidden = torch.randn(16_384, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(128_256, 4096, device="cuda", dtype=torch.bfloat16) / 64
    labels = torch.randint(128_256, (16_384,), device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(hidden, weight, labels).backward()
    extra = torch.cuda.max_memory_allocated() - before - hidden.nbytes
    assert extra < 2**30


@pytest.mark.gpu
def test_rows_counted_beforehand_leave_no_synchronisation_with_the_host() -> None:
    one = head(512, 32_000, 256, train="hidden", dtype=torch.bfloat16, device="cuda")
    linear_cross_entropy(one.hidden, one.weight, one.labels, num_items=3).backward()
    rows = TrainedRows(one.labels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(one.hidden, one.weight, one.labels, rows=rows, num_items=3).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
