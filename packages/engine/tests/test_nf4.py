from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hotloop_core.errors import CheckpointError, NoImplementationError, UnsupportedError
from hotloop_core.kernels import FourBitWeight
from hotloop_engine.ops.nf4 import dequantize_4bit, from_bitsandbytes
from hotloop_testkit.numerics import poisoned_buffers

bnb = pytest.importorskip("bitsandbytes")
IMPLS = ["reference", "triton"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(16, 64), (7, 33), (5, 15), (3, 104), (130, 72), (1, 1)]  # odd K, odd N*K, K < blocksize


def quantized(
    shape: tuple[int, int],
    *,
    dtype: torch.dtype = torch.bfloat16,
    kind: str = "nf4",
    nested: bool = True,
    blocksize: int = 64,
    device: str = "cpu",
    storage: torch.dtype = torch.uint8,
) -> torch.nn.Parameter:
    weight = bnb.nn.Params4bit(
        torch.randn(shape, dtype=dtype),
        requires_grad=False,
        blocksize=blocksize,
        compress_statistics=nested,
        quant_type=kind,
        quant_storage=storage,
    )
    return weight.to(device)


def bitsandbytes_says(weight: torch.nn.Parameter) -> torch.Tensor:
    return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)


def expected(weight: torch.nn.Parameter, impl: str) -> torch.Tensor:
    """What bitsandbytes says; its fp32 values truncated where Triton's interpreter makes bf16.

    (The interpreter truncates fp32 to bf16; on a GPU, Triton rounds to the nearest.)
    """
    values = bitsandbytes_says(weight)
    if impl != "triton" or weight.is_cuda or values.dtype != torch.bfloat16:
        return values
    exact = torch.empty(values.shape)
    dequantize_4bit(from_bitsandbytes(weight), out=exact, impl="reference")
    assert torch.equal(exact.bfloat16(), values)
    return (exact.view(torch.int32) & -65536).view(torch.float32).bfloat16()


def wide_buffer(shape: tuple[int, int], dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """NaN everywhere, three more rows, a row pitch of a multiple of 64, columns to spare."""
    pitch = (shape[1] + 1 + 63) // 64 * 64
    return torch.full((shape[0] + 3, pitch), float("nan"), dtype=dtype, device=device)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind, nested", itertools.product(("nf4", "fp4"), (True, False)))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantize_4bit_is_bit_equal_to_bitsandbytes(impl, dtype, kind, nested, shape) -> None:
    weight = quantized(shape, dtype=dtype, kind=kind, nested=nested)
    with poisoned_buffers():
        ours = dequantize_4bit(from_bitsandbytes(weight), impl=impl)
    assert ours.dtype == dtype
    assert torch.equal(ours, expected(weight, impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("blocksize", [32, 128, 512, 4096])
def test_every_blocksize_of_bitsandbytes_is_bit_equal(impl, blocksize) -> None:
    weight = quantized((40, 264), blocksize=blocksize)
    ours = dequantize_4bit(from_bitsandbytes(weight), impl=impl)
    assert torch.equal(ours, expected(weight, impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_more_blocks_than_one_nested_block_holds(impl) -> None:
    weight = quantized((300, 72))  # 338 blocks of 64, 256 of them in the first nested block
    ours = dequantize_4bit(from_bitsandbytes(weight), impl=impl)
    assert torch.equal(ours, expected(weight, impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_corner_of_a_wide_buffer_is_filled_and_nothing_beside_it(impl, dtype, shape) -> None:
    weight = quantized(shape, dtype=dtype)
    buffer = wide_buffer(shape, dtype)
    corner = buffer[2 : 2 + shape[0], : shape[1]]
    assert dequantize_4bit(from_bitsandbytes(weight), out=corner, impl=impl) is corner
    assert torch.equal(corner, expected(weight, impl))
    assert int(buffer.isnan().sum()) == buffer.numel() - corner.numel()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_corner_that_starts_off_alignment_is_filled_alike(impl) -> None:
    weight = quantized((6, 64))
    buffer = wide_buffer((6, 71), torch.bfloat16)
    corner = buffer[:6, 7:71]
    dequantize_4bit(from_bitsandbytes(weight), out=corner, impl=impl)
    assert torch.equal(corner, expected(weight, impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_out_of_another_dtype_is_rounded_once_from_fp32(impl) -> None:
    weight = from_bitsandbytes(quantized((16, 64)))
    exact = dequantize_4bit(weight, out=torch.empty(16, 64), impl="reference")
    dtypes = DTYPES if impl == "reference" else DTYPES[1:]  # the interpreter truncates to bf16
    for dtype in dtypes:
        out = dequantize_4bit(weight, out=torch.empty(16, 64, dtype=dtype), impl=impl)
        assert torch.equal(out, exact.to(dtype))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_storage_of_another_dtype_holds_the_same_bytes(impl, storage) -> None:
    weight = quantized((16, 64), storage=storage)
    ours = dequantize_4bit(from_bitsandbytes(weight), impl=impl)
    assert torch.equal(ours, expected(weight, impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_packed_bytes_off_word_alignment_are_read_alike(impl) -> None:
    weight = from_bitsandbytes(quantized((8, 64), dtype=torch.float16))
    shifted = torch.cat((torch.zeros(1, dtype=torch.uint8), weight.packed))[1:]
    moved = dataclasses.replace(weight, packed=shifted)
    assert torch.equal(dequantize_4bit(moved, impl=impl), dequantize_4bit(weight, impl="reference"))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_weight_without_rows_gives_an_empty_result(impl) -> None:
    weight = dataclasses.replace(
        from_bitsandbytes(quantized((1, 64))),
        packed=torch.empty(0, dtype=torch.uint8),
        absmax=torch.empty(0, dtype=torch.uint8),
        shape=(0, 64),
    )
    assert dequantize_4bit(weight, impl=impl).shape == (0, 64)


@pytest.mark.parametrize("lookup", ["l1", "gather"])
def test_each_variant_of_the_table_lookup_gives_the_same_bits(lookup) -> None:
    from hotloop_engine.ops.nf4 import kernel

    weight = from_bitsandbytes(quantized((24, 88), dtype=torch.float16))
    out = torch.empty(24, 88, dtype=torch.float16)
    assert torch.equal(
        kernel.forward(weight, out=out, lookup=lookup), dequantize_4bit(weight, impl="reference")
    )


def test_a_view_of_a_weight_copies_nothing_and_keeps_no_subclass() -> None:
    parameter = quantized((16, 64))
    weight = from_bitsandbytes(parameter)
    assert type(weight.packed) is torch.Tensor
    assert weight.packed.data_ptr() == parameter.data_ptr()
    assert weight.absmax is parameter.quant_state.absmax
    assert isinstance(weight.nested_offset, torch.Tensor)  # never read on the host


def test_a_weight_that_is_not_quantised_yet_is_refused_with_the_next_step() -> None:
    waiting = bnb.nn.Params4bit(torch.randn(4, 64), requires_grad=False)
    for weight in (waiting, torch.nn.Parameter(torch.randn(4, 64))):
        with pytest.raises(UnsupportedError, match="move the layer"):
            from_bitsandbytes(weight)


def test_a_shard_of_the_packed_data_is_refused() -> None:
    weight = quantized((16, 64))
    weight.data = weight.data[:100]
    with pytest.raises(CheckpointError, match="512 packed bytes, found 100"):
        from_bitsandbytes(weight)


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(64, 16, dtype=torch.bfloat16),
        torch.empty(64, 16, dtype=torch.bfloat16).t(),
        torch.empty(16, 64, dtype=torch.float64),
    ],
    ids=["shape", "strides", "dtype"],
)
def test_a_buffer_that_does_not_fit_is_refused(out) -> None:
    with pytest.raises(UnsupportedError, match="cannot dequantise"):
        dequantize_4bit(from_bitsandbytes(quantized((16, 64))), out=out)


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(NoImplementationError):
        dequantize_4bit(from_bitsandbytes(quantized((16, 64))), impl="fast")


def test_four_bit_weights_hash_by_identity() -> None:
    weight = from_bitsandbytes(quantized((16, 64)))
    assert isinstance(weight, FourBitWeight)
    assert len({weight, weight, dataclasses.replace(weight)}) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(14336, 4096), (4096, 14336), (1024, 4096), (999, 1001)])
@pytest.mark.parametrize(
    "kind, nested, dtype", [("nf4", True, DTYPES[0]), ("fp4", False, DTYPES[1])]
)
@pytest.mark.parametrize("lookup", ["l1", "gather"])
def test_real_shapes_are_bit_equal_to_bitsandbytes_on_cuda(shape, kind, nested, dtype, lookup):
    from hotloop_engine.ops.nf4 import kernel

    weight = quantized(shape, dtype=dtype, kind=kind, nested=nested, device="cuda")
    buffer = wide_buffer(shape, dtype, "cuda")
    corner = buffer[1 : 1 + shape[0], : shape[1]]
    kernel.forward(from_bitsandbytes(weight), out=corner, lookup=lookup)
    assert torch.equal(corner, bitsandbytes_says(weight))
    assert int(buffer.isnan().sum()) == buffer.numel() - corner.numel()


@pytest.mark.gpu
def test_the_triton_kernel_does_not_synchronise_the_host() -> None:
    weight = from_bitsandbytes(quantized((256, 512), device="cuda"))
    out = torch.empty(256, 512, dtype=torch.bfloat16, device="cuda")
    dequantize_4bit(weight, out=out)
    torch.cuda.set_sync_debug_mode("error")
    try:
        dequantize_4bit(weight, out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
