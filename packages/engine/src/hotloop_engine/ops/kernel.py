"""What the Triton kernels share: the machine they run on, the dtype they compute in, row tiles."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from hotloop_core.errors import ConfigError, UnsupportedError

INTERPRETED: bool = triton.knobs.runtime.interpret
"""True where kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1 at import)."""

_NO_ASSEMBLY = tl.constexpr(INTERPRETED)

FUSED = {"enable_fp_fusion": True}
"""For every launch that says nothing else: more exact, and Triton's default differs between versions."""


@triton.jit
def wide(x):
    """Returns x in the dtype that ops compute in: fp64 for fp64, fp32 for everything narrower."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def reciprocal(x):
    """Returns 1 / x, in fp32 by the card's instruction: off by one unit in the last place, 0 for x above 1e38."""
    if _NO_ASSEMBLY or x.dtype != tl.float32:
        return 1 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;",
            constraints="=f,f",
            args=[x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def exp(x):
    """Returns e^x."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def sigmoid(x):
    """Returns 1 / (1 + e^-x)."""
    return reciprocal(1 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def made_once(x):
    """Returns x [16-bit], which the compiler then does not make a second time in another layout.

    Where a matrix product wants an operand in other registers than a store does, Triton may compute the operand twice
    from its inputs instead of moving it.
    """
    if _NO_ASSEMBLY:
        return x
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;",
            constraints="=r,r",
            args=[x],
            dtype=x.dtype,
            is_pure=False,
            pack=2,
        )


def cdiv(total: int, size: int) -> int:
    """How many parts of `size` make `total`. Triton's own is one of its functions for both sides: 5 us on the host."""
    return -(-total // size)


def power_of_2(least: int) -> int:
    """The smallest power of two that is not less; 1 for 0."""
    return 1 << max(0, least - 1).bit_length()


@cache
def multiprocessors(device: torch.device) -> int:
    """How many streaming multiprocessors the device has; 2 for the interpreter's CPU."""
    if device.type != "cuda":
        return 2  # more than one, so that tests meet partial sums and uneven shares
    return torch.cuda.get_device_properties(device).multi_processor_count


class RowTile(NamedTuple):
    """A tile of whole rows: how many rows, their padded width, and the warps that share it."""

    rows: int
    width: int
    warps: int


@cache
def row_tile(columns: int, elements_per_thread: int) -> RowTile:
    """The tile for a kernel that keeps whole rows of `columns` elements in registers.

    At least 2,048 elements a tile: with narrow rows, one row a program would leave most of the
    memory's queue empty. At most 32 warps, a block's limit on every CUDA card.

    Raises:
        UnsupportedError: rows wider than 65,536 elements do not fit a block's registers.

    """
    if columns > 65536:
        raise UnsupportedError(
            f"a Triton row kernel takes at most 65,536 columns, got {columns}; "
            'pass impl="reference".'
        )
    width = power_of_2(columns)
    rows = max(1, 2048 // width)
    return RowTile(rows, width, min(32, rows * width // (32 * elements_per_thread)))


def partial_sums(tiles: int, device: torch.device) -> int:
    """Into how many partial sums, one a program, a gradient that is summed over all rows is split.

    Eight a multiprocessor keep the memory busy whatever number of them is resident; eight tiles
    each at the least, so that writing the partial sums stays small against reading the rows.
    """
    return max(1, min(8 * multiprocessors(device), tiles // 8))


def require_unit_last(**tensors: torch.Tensor | None) -> None:
    """Refuses a tensor whose last dimension is not contiguous: the kernels would read beside it."""
    for name, tensor in tensors.items():
        if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] == 1 or not tensor.numel():
            continue
        raise UnsupportedError(
            f"{name} has strides {tensor.stride()}; the last must be 1. Make it contiguous."
        )


DIRECT = True
"""Whether `launch` goes past Triton's own dispatch once a kernel is compiled."""

_compiled: dict[tuple[object, ...], Any] = {}


class Resolved(NamedTuple):
    """Arguments of a launch with all that there is to look up about them.

    values: what Triton's launcher takes for them: addresses, for tensors. key: what a compiled kernel depends on.
    device: the index of the card that their tensors are on, None where there are none.
    """

    arguments: tuple[object, ...]
    values: tuple[object, ...]
    key: tuple[object, ...]
    device: int | None


NOTHING = Resolved((), (), (), None)


def launch(
    kernel: Any,
    programs: int,
    arguments: tuple[object, ...],
    constants: dict[str, Any],
    *,
    num_warps: int,
    before: Resolved = NOTHING,
    enable_fp_fusion: bool = True,
) -> None:
    """Launches a kernel on a grid of one dimension; the second time, without Triton's dispatch.

    Triton works out on every launch what its arguments are specialised on, and asks the driver about each address: some
    100 microseconds of host time with thirty of them, hundreds of times a step. The same facts make the key here: a
    tensor's dtype and whether its address is a multiple of 16; whether an integer is 1, a multiple of 16, or past 31
    bits. It runs on the card that the tensors are on, whichever is current.

    Args:
        kernel: a `triton.jit` function.
        programs: the grid's size.
        arguments: its arguments up to the constants, in order, behind those of `before`.
        constants: its `tl.constexpr` arguments, in the order of its signature.
        num_warps: warps a program.
        before: its first arguments, where they were looked up already.
        enable_fp_fusion: whether multiplications and additions may be fused.

    Raises:
        ConfigError: the tensors are on several devices.

    """
    if INTERPRETED or not DIRECT or _hooked():
        options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
        kernel[(programs,)](*before.arguments, *arguments, **constants, **options)
        return
    found = _look_up(arguments, before.device, kernel)
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    if found.device is not None and found.device != device:
        if found.device < 0:
            raise ConfigError(_apart(kernel, (found.device, device)))
        options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
        with torch.cuda.device(found.device):
            launch(kernel, programs, arguments, constants, before=before, **options)  # type: ignore[arg-type]
        return
    key = (kernel.fn, device, num_warps, *constants.values(), *before.key, *found.key)
    compiled = _compiled.get(key)
    if compiled is None:
        names = kernel.arg_names[len(before.arguments) + len(arguments) :]
        if list(constants) != names:
            raise AssertionError(f"{kernel.fn.__name__}: constants out of order: {list(constants)}")
        options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
        _compiled[key] = kernel[(programs,)](*before.arguments, *arguments, **constants, **options)
        return
    compiled.run(
        programs,
        1,
        1,
        driver.get_current_stream(device),
        compiled.function,
        compiled.packed_metadata,
        None,
        None,
        None,
        *before.values,
        *found.values,
        *constants.values(),
    )


_RUNTIME = triton.knobs.runtime


def _hooked() -> bool:
    """Whether somebody watches launches (a profiler of Triton's): then they go through its own dispatch."""
    hook = _RUNTIME.launch_enter_hook  # an empty chain of hooks by default
    return hook is not None and bool(getattr(hook, "calls", True))


@lru_cache(maxsize=4096)
def _of_integer(value: int) -> tuple[bool, bool, bool]:
    """What Triton compiles anew for; sizes and strides come again and again."""
    return value == 1, value % 16 == 0, value >= 2**31


_keys: dict[tuple[object, ...], int] = {}


def resolve(arguments: tuple[object, ...]) -> Resolved:
    """The first arguments of many launches, looked up once. Their memory must stay where it is while this is in use.

    Their key is a number: the tuple of some fifty parts that it stands for would be hashed at every launch.

    Raises:
        ConfigError: the tensors are on several devices.
    """
    found = _look_up(arguments, None, None)
    return found._replace(key=(_keys.setdefault(found.key, len(_keys)),))


def _look_up(arguments: tuple[object, ...], device: int | None, kernel: Any) -> Resolved:
    """device: the one that other arguments of `kernel` are on already."""
    values: list[object] = []
    key: list[object] = []
    add_value, add_key = values.append, key.append
    for argument in arguments:  # the larger part of the cost of a launch, hence the plain loop
        if isinstance(argument, int):
            add_key(_of_integer(argument))
            add_value(argument)
        elif isinstance(argument, torch.Tensor):
            address = argument.data_ptr()
            add_key(argument.dtype)
            add_key(address % 16)
            add_value(address)
            index = argument.get_device()
            if index != device:
                if device is not None:
                    raise ConfigError(_apart(kernel, (device, index)))
                device = index
        else:
            add_key(argument is None)
            add_value(argument)
    return Resolved(arguments, tuple(values), tuple(key), device)


def _apart(kernel: Any, indices: tuple[int | None, int]) -> str:
    name = "a kernel" if kernel is None else kernel.fn.__name__
    places = " and ".join(
        "the CPU" if i is None or i < 0 else f"cuda:{i}" for i in sorted(indices, key=str)
    )
    return f"{name} was given tensors on {places}; expected one CUDA device. Move them to one."


# A warp reads 32 columns of a row, 128 bytes; 64 rows in flight are 8 loads a thread.
_SUM_ROWS = 64
_SUM_COLUMNS = 32


@triton.jit
def _sum_of_parts(x_ptr, y_ptr, P, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((ROWS, COLUMNS), x_ptr.dtype.element_ty)
    for start in range(0, P, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = (row < P) & (column < D)
        total += tl.load(x_ptr + row.to(tl.int64) * D + column, mask=inside, other=0.0)
    tl.store(y_ptr + column, tl.sum(total, axis=0)[None, :], mask=column < D)


def sum_of_parts(parts: torch.Tensor) -> torch.Tensor:
    """The sums [...] of the partial sums [P, ...] that P programs left, contiguous, always in the same order."""
    if not parts.numel():
        return parts.sum(0)
    total = parts.new_empty(parts.shape[1:])
    launch(
        _sum_of_parts,
        cdiv(total.numel(), _SUM_COLUMNS),
        (parts, total, parts.shape[0], total.numel()),
        {"ROWS": _SUM_ROWS, "COLUMNS": _SUM_COLUMNS},
        num_warps=8,
    )
    return total
