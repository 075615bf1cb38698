"""Block encoders: values to ggml's bytes, the same bytes as ggml's own encoder writes.

The layouts are torch code that runs on whichever device the tensor is; the loops that search scales are
compiled, by numba on a CPU (`cpu`) and by Triton on a GPU (`gpu`), and give the same bits.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from math import isfinite
from typing import TYPE_CHECKING

from hotloop_core.errors import ExportError, UnsupportedError
from hotloop_core.exporter import round_tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from torch import Tensor

    from hotloop_gguf.writer import Block

    from .searches import Searches

    Encoder = Callable[[Tensor, Tensor | None, Searches], Tensor]

_VALUES = {"cpu": 1 << 19, "cuda": 1 << 24}
"""Values encoded at once, on a CPU by each thread. Each takes about 20 bytes on the way."""
_SHARE = 1 << 16
"""Fewer values than these are not shared out among threads."""
_FLOAT16_MAX = 65504.0
_ENCODERS = {
    "Q4_0": "legacy",
    "Q4_1": "legacy",
    "Q5_0": "legacy",
    "Q5_1": "legacy",
    "Q8_0": "legacy",
    "Q2_K": "k_quants",
    "Q3_K": "k_quants",
    "Q4_K": "k_quants",
    "Q5_K": "k_quants",
    "Q6_K": "k_quants",
    "IQ4_NL": "tables",
    "IQ4_XS": "tables",
    "MXFP4": "tables",
}
"""The module of each quantised type's function, which has the type's name in small letters."""


def encode(
    tensor: Tensor, block: Block, name: str, importance: Tensor | None = None
) -> Iterator[memoryview]:
    """The bytes of `tensor` in the storage type `block`, in parts of some rows, so that memory stays bounded.

    tensor: [..., K], any float dtype, K a multiple of `block.values`. name: for errors. importance: float32
    [K], how much the squared error of each column matters (its mean squared input), or one such row for
    each index of the tensor's first dimension, as stacked experts have; plain types have no use for it.

    Raises:
        ExportError: a value is not finite or does not fit the type, or importance has another shape.
        UnsupportedError: the tensor is on a GPU and Triton is not installed.

    """
    if tensor.dim() > 2:
        for i, part in enumerate(tensor):
            own = importance if importance is None or importance.dim() == 1 else importance[i]
            yield from encode(part, block, name, own)
        return
    rows = tensor.reshape(-1, tensor.shape[-1])
    if importance is not None:
        importance = _checked(importance, rows, name)
    yield from _in_order(lambda part: _bytes(_encoded(part, block, name, importance)), rows)


def _in_order(work: Callable[[Tensor], memoryview], rows: Tensor) -> Iterator[memoryview]:
    """What `work` gives for blocks of the rows, in their order, on a CPU by as many threads as torch uses.

    torch itself has one thread meanwhile: its threads would wait for one another after each of the many
    small steps, which costs more than it gains. Few results are kept waiting, for the memory's sake.
    """
    import torch

    if rows.device.type == "cuda":
        yield from map(work, rows.split(max(1, _VALUES["cuda"] // rows.shape[1])))
        return
    threads = torch.get_num_threads()
    values = min(_VALUES["cpu"], max(_SHARE, -(-rows.numel() // threads)))
    blocks = rows.split(max(1, values // rows.shape[1]))
    if min(threads, len(blocks)) < 2:
        yield from map(work, blocks)
        return
    waiting: deque[Future[memoryview]] = deque()
    pool = ThreadPoolExecutor(min(threads, len(blocks)))
    torch.set_num_threads(1)
    try:
        for part in blocks:
            waiting.append(pool.submit(work, part))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _checked(importance: Tensor, rows: Tensor, name: str) -> Tensor:
    sound = bool(((importance >= 0) & importance.isfinite()).all().item())
    if importance.shape != rows.shape[1:] or not sound:
        raise ExportError(
            f"{name}: importance has shape {tuple(importance.shape)} and its least value is "
            f"{float(importance.min()):.3g}; expected ({rows.shape[1]},), one number >= 0 for each "
            "column. Collect it again for this model."
        )
    return importance.to(rows.device).float()


def _encoded(rows: Tensor, block: Block, name: str, importance: Tensor | None) -> Tensor:
    import torch

    low, high = (float(end) for end in rows.aminmax())
    largest = max(-low, high)
    if not (isfinite(low) and isfinite(high)):
        raise ExportError(
            f"{name} holds NaN or infinity, so the model that it belongs to is broken; look for the "
            "training step that made it so."
        )
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if block.name in plain:
        return round_tensor(rows, plain[block.name], name)
    if largest > _FLOAT16_MAX and block.name != "MXFP4":
        raise ExportError(
            f"{name}: a value of {largest:.3g} does not fit {block.name}, whose scales are float16. "
            "Export as bf16 or f32."
        )
    module = import_module(f".{_ENCODERS[block.name]}", __name__)
    encoder: Encoder = getattr(module, block.name.lower())
    return encoder(rows.float().contiguous(), importance, _searches(rows.device.type))


def _searches(device: str) -> Searches:
    from . import cpu, gpu

    if device != "cuda":
        return cpu.SEARCHES
    if find_spec("triton") is None:
        raise UnsupportedError(
            "a tensor to quantise is on the GPU, and Triton, which does it there, is not installed. "
            "Install triton, or move the model to the CPU: the bytes are the same."
        )
    return gpu.SEARCHES


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    return tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
