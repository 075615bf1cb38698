"""Which storage type each tensor of a file gets, as llama.cpp's own quantiser chooses.

Source: `src/llama-quant.cpp` of llama.cpp. The names are those that its users know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .writer import Block

if TYPE_CHECKING:
    from hotloop_core import ModelFacts, TensorEntry

BLOCKS = {
    block.name: block
    for block in (
        Block("F32", 0, 1, 4),
        Block("F16", 1, 1, 2),
        Block("BF16", 30, 1, 2),
        Block("Q4_0", 2, 32, 18),
        Block("Q4_1", 3, 32, 20),
        Block("Q5_0", 6, 32, 22),
        Block("Q5_1", 7, 32, 24),
        Block("Q8_0", 8, 32, 34),
        Block("Q4_K", 12, 256, 144),
        Block("Q5_K", 13, 256, 176),
        Block("Q6_K", 14, 256, 210),
    )
}

_NARROWER = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What stands in for a type of 256 values where a row is no multiple of 256."""

_NORMS = {"before_attention", "after_attention", "before_mlp", "after_mlp", "final_norm"}
_ALWAYS_F32 = _NORMS | {"q_norm", "k_norm", "router"}


@dataclass(frozen=True)
class Mix:
    """A file type. number: llama.cpp's `general.file_type`. base: the type of most tensors.

    more: the type of value and down projections in the layers that quantisation hurts most; early:
    of value projections in the first 4 layers and of down projections in the first eighth.
    """

    name: str
    number: int
    base: str
    summary: str
    more: str | None = None
    early: str | None = None


MIXES = {
    mix.name: mix
    for mix in (
        Mix("q8_0", 7, "Q8_0", "8.5 bits a weight, hardly distinguishable from 16 bits"),
        Mix("q4_k_m", 15, "Q4_K", "about 4.8 bits, the usual choice", more="Q6_K"),
        Mix("q5_k_m", 17, "Q5_K", "about 5.7 bits", more="Q6_K"),
        Mix("q6_k", 18, "Q6_K", "6.6 bits"),
        Mix("q4_k_s", 14, "Q4_K", "about 4.6 bits", early="Q5_K"),
        Mix("q5_k_s", 16, "Q5_K", "about 5.5 bits"),
        Mix("q4_0", 2, "Q4_0", "4.5 bits, the oldest format, runs everywhere"),
        Mix("q4_1", 3, "Q4_1", "5 bits, with an offset per block"),
        Mix("q5_0", 8, "Q5_0", "5.5 bits"),
        Mix("q5_1", 9, "Q5_1", "6 bits, with an offset per block"),
        Mix("bf16", 32, "BF16", "as trained, unquantised"),
        Mix("f16", 1, "F16", "unquantised, for hardware without bfloat16"),
        Mix("f32", 0, "F32", "unquantised, for checking"),
    )
}

ALIASES = {
    "not_quantized": "bf16",
    "fast_quantized": "q8_0",
    "quantized": "q4_k_m",
    "q4_k": "q4_k_m",
    "q5_k": "q5_k_m",
    "fp16": "f16",
    "float16": "f16",
    "bfloat16": "bf16",
    "fp32": "f32",
    "float32": "f32",
}


@dataclass(frozen=True)
class Choice:
    """A tensor's storage type; wanted: what the mix asked for, where its width does not allow that."""

    block: Block
    wanted: str | None = None


def storage(mix: Mix, entry: TensorEntry, model: ModelFacts, *, tied: bool) -> Choice:
    """The storage type of one tensor."""
    if len(entry.shape) == 1 or entry.role in _ALWAYS_F32:
        return Choice(BLOCKS["F32"])
    wanted = _wanted(mix, entry, model, tied=tied)
    fitting = wanted
    columns = entry.shape[-1]
    if columns % BLOCKS[fitting].values:
        fitting = _NARROWER.get(fitting, fitting)
    if columns % BLOCKS[fitting].values:
        fitting = "F16"
    return Choice(BLOCKS[fitting], None if fitting == wanted else wanted)


def _wanted(mix: Mix, entry: TensorEntry, model: ModelFacts, *, tied: bool) -> str:
    if BLOCKS[mix.base].values == 1:
        return mix.base
    if entry.role == "head" or (tied and entry.role == "embedding"):
        narrow = entry.shape[-1] % BLOCKS[mix.base].values != 0
        return "Q8_0" if narrow or mix.base == "Q8_0" else "Q6_K"
    if entry.layer is None:
        return mix.base
    layer, layers, kind = entry.layer, model.layers, mix.base
    if entry.role in ("v", "down") and mix.more is not None and _sensitive(layer, layers):
        kind = mix.more
    elif mix.early is not None and (
        (entry.role == "v" and layer < 4) or (entry.role == "down" and layer < layers // 8)
    ):
        kind = mix.early
    if entry.role == "v" and layers == 80 and model.heads != model.kv_heads and kind == "Q4_K":
        return "Q5_K"  # 70B: 8 query heads share each value, so its bits count eightfold
    return kind


def _sensitive(layer: int, layers: int) -> bool:
    """The first and last eighth, and every third layer between."""
    first = layers // 8
    return layer < first or layer >= 7 * layers // 8 or (layer - first) % 3 == 2
