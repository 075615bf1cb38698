"""Block encoders: values in float32 to ggml's bytes, in torch, on whichever device the tensor is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotloop_core.errors import ExportError
from hotloop_core.exporter import round_tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from hotloop_gguf.writer import Block

_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 24}
"""Values encoded at once: on a CPU what its second-level cache holds, on a GPU what keeps it busy."""
_FLOAT16_MAX = 65504.0


def encode(tensor: Tensor, block: Block, name: str) -> Iterator[memoryview]:
    """The bytes of `tensor` in the storage type `block`, in parts, so that memory stays bounded.

    tensor: any float dtype; its last dimension is a multiple of `block.values`. name: for errors.

    Raises:
        ExportError: a value does not fit the type.

    """
    flat = tensor.reshape(-1)
    step = _ELEMENTS.get(flat.device.type, _ELEMENTS["cpu"]) * (16 if block.values == 1 else 1)
    for start in range(0, flat.numel(), step):
        yield _bytes(_encoded(flat[start : start + step], block, name))


def _encoded(values: Tensor, block: Block, name: str) -> Tensor:
    import torch

    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if block.name in plain:
        return round_tensor(values, plain[block.name], name)
    blocks = values.float().reshape(-1, block.values)
    if bool((blocks.abs().amax() > _FLOAT16_MAX).item()):
        raise ExportError(
            f"{name}: a value of {float(blocks.abs().amax()):.3g} does not fit {block.name}, whose "
            "scales are float16. Export as bf16 or f32."
        )
    return _encoder(block.name)(blocks)


def _encoder(name: str) -> Callable[[Tensor], Tensor]:
    from . import k_quants, legacy

    encoders: dict[str, Callable[[Tensor], Tensor]] = {
        "Q4_0": legacy.q4_0,
        "Q4_1": legacy.q4_1,
        "Q5_0": legacy.q5_0,
        "Q5_1": legacy.q5_1,
        "Q8_0": legacy.q8_0,
        "Q4_K": k_quants.q4_k,
        "Q5_K": k_quants.q5_k,
        "Q6_K": k_quants.q6_k,
    }
    return encoders[name]


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    return tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
