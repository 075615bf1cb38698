"""Block encoders: values to ggml's bytes, the same bytes as ggml's own encoder writes.

The layouts are torch code that runs on whichever device the tensor is; the loops that search scales are
compiled, by numba on a CPU (`cpu`) and by Triton on a GPU (`gpu`), and give the same bits.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from math import isfinite
from typing import TYPE_CHECKING

from hotloop_core.errors import ExportError
from hotloop_core.exporter import round_tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from torch import Tensor

    from hotloop_gguf.writer import Block

    from .searches import Searches

    Encoder = Callable[[Tensor, Tensor | None, Searches], Tensor]

_VALUES = {"cpu": 1 << 18, "cuda": 1 << 23}
"""Values encoded at once, on a CPU by each thread. Each takes about 20 bytes on the way."""
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

    """
    if tensor.dim() > 2:
        for i, part in enumerate(tensor):
            own = importance if importance is None or importance.dim() == 1 else importance[i]
            yield from encode(part, block, name, own)
        return
    rows = tensor.reshape(-1, tensor.shape[-1])
    if importance is not None:
        importance = _checked(importance, rows, name)
    step = max(1, _VALUES.get(tensor.device.type, _VALUES["cpu"]) // rows.shape[1])
    blocks = [rows[start : start + step] for start in range(0, len(rows), step)]
    yield from _in_order(lambda part: _bytes(_encoded(part, block, name, importance)), blocks)


def _in_order(work: Callable[[Tensor], memoryview], blocks: list[Tensor]) -> Iterator[memoryview]:
    """What `work` gives for each block, in their order, on a CPU by as many threads as torch uses.

    torch itself has one thread meanwhile: its threads would wait for one another after each of the many
    small steps, which costs more than it gains. Few results are kept waiting, for the memory's sake.
    """
    import torch

    threads = torch.get_num_threads()
    if blocks[0].device.type != "cpu" or min(threads, len(blocks)) < 2:
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
    if importance.shape != rows.shape[1:] or not bool((importance >= 0).all().item()):
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

    return gpu.SEARCHES if device == "cuda" else cpu.SEARCHES


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    return tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
