"""Which storage type each tensor of a file gets, as llama.cpp's own quantiser chooses.

Source: `src/llama-quant.cpp` of llama.cpp. The names are those that its users know.
"""

from __future__ import annotations

from collections.abc import Callable
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
        Block("Q2_K", 10, 256, 84),
        Block("Q3_K", 11, 256, 110),
        Block("Q4_K", 12, 256, 144),
        Block("Q5_K", 13, 256, 176),
        Block("Q6_K", 14, 256, 210),
        Block("IQ4_NL", 20, 32, 18),
        Block("IQ4_XS", 23, 256, 136),
        Block("MXFP4", 39, 32, 17),
    )
}

_NARROWER = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
}
"""What stands in for a type of 256 values where a row is no multiple of 256."""

_NORMS = {"before_attention", "after_attention", "before_mlp", "after_mlp", "final_norm"}
_ALWAYS_F32 = _NORMS | {"q_norm", "k_norm", "router"}
_VALUES = {"v", "qkv", "kv_b"}
"""Value projections, alone or with what they are fused with."""
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Where a config may say how many experts there are."""


@dataclass(frozen=True)
class Place:
    """Where in its model a tensor is. queries: query heads to a value head; imatrix: errors are weighted."""

    layer: int
    layers: int
    queries: int
    experts: int
    imatrix: bool


When = Callable[[Place], bool]
Rules = tuple[tuple["When", str], ...]
"""Types in order of preference, each with its condition; the base type where none holds."""


def _always(at: Place) -> bool:
    return True


def _first(layers: int) -> When:
    return lambda at: at.layer < layers


def _leading(part: int) -> When:
    return lambda at: at.layer < at.layers // part


def _sensitive(at: Place) -> bool:
    """The first and last eighth, and every third layer between."""
    first = at.layers // 8
    return at.layer < first or at.layer >= 7 * at.layers // 8 or (at.layer - first) % 3 == 2


def _shared(at: Place) -> bool:
    return at.queries >= 4


def _leading_weighted(at: Place) -> bool:
    return at.imatrix and at.layer < at.layers // 8


def _leading_unweighted(at: Place) -> bool:
    return not at.imatrix and at.layer < at.layers // 8


@dataclass(frozen=True)
class Mix:
    """A file type. number: llama.cpp's `general.file_type`. base: the type of most tensors.

    value, down, output: rules for value, down and attention output projections. eight: the type of the
    attention's output where there are exactly eight experts, in place of those rules; None is the base type.
    """

    name: str
    number: int
    base: str
    summary: str
    value: Rules = ()
    down: Rules = ()
    output: Rules = ()
    eight: str | None = None


_MORE: Rules = ((_sensitive, "Q6_K"),)
_IQ4: dict[str, Rules] = {
    "value": ((_shared, "Q5_K"),),
    "down": ((_leading_unweighted, "Q5_K"),),
}

MIXES = {
    mix.name: mix
    for mix in (
        Mix("q8_0", 7, "Q8_0", "8.5 bits a weight, hardly distinguishable from 16 bits"),
        Mix(
            "q4_k_m", 15, "Q4_K", "about 4.8 bits, the usual choice",
            value=_MORE, down=_MORE, eight="Q5_K",
        ),
        Mix("q5_k_m", 17, "Q5_K", "about 5.7 bits", value=_MORE, down=_MORE),
        Mix("q6_k", 18, "Q6_K", "6.6 bits"),
        Mix(
            "q4_k_s", 14, "Q4_K", "about 4.6 bits",
            value=((_first(4), "Q5_K"),), down=((_leading(8), "Q5_K"),), eight="Q5_K",
        ),
        Mix("q5_k_s", 16, "Q5_K", "about 5.5 bits"),
        Mix(
            "q3_k_l", 13, "Q3_K", "about 4.3 bits",
            value=((_always, "Q5_K"),), down=((_always, "Q5_K"),), output=((_always, "Q5_K"),),
        ),
        Mix(
            "q3_k_m", 12, "Q3_K", "about 3.9 bits",
            value=((_first(2), "Q5_K"), (_always, "Q4_K")),
            down=((_leading(16), "Q5_K"), (_always, "Q4_K")),
            output=((_always, "Q4_K"),), eight="Q5_K",
        ),
        Mix("q3_k_s", 11, "Q3_K", "about 3.5 bits", eight="Q5_K"),
        Mix(
            "q2_k", 10, "Q2_K", "about 3.2 bits, noticeably worse",
            value=((_shared, "Q4_K"), (_always, "Q3_K")),
            down=((_always, "Q3_K"),), output=((_always, "Q3_K"),), eight="Q5_K",
        ),
        Mix("iq4_xs", 30, "IQ4_XS", "about 4.3 bits, unevenly spaced", **_IQ4, eight="Q5_K"),
        Mix("iq4_nl", 25, "IQ4_NL", "4.5 bits, unevenly spaced", **_IQ4, eight="Q5_K"),
        Mix("mxfp4", 38, "MXFP4", "experts in 4.25 bits as in gpt-oss, everything else as q8_0"),
        Mix(
            "q4_0", 2, "Q4_0", "4.5 bits, the oldest format, runs everywhere",
            down=((_leading_weighted, "Q4_1"),),
        ),
        Mix("q4_1", 3, "Q4_1", "5 bits, with an offset per block"),
        Mix("q5_0", 8, "Q5_0", "5.5 bits", down=((_leading_weighted, "Q5_1"),)),
        Mix("q5_1", 9, "Q5_1", "6 bits, with an offset per block"),
        Mix("bf16", 32, "BF16", "as trained, unquantised"),
        Mix("f16", 1, "F16", "unquantised, for hardware without bfloat16"),
        Mix("f32", 0, "F32", "unquantised, for checking"),
    )
}  # fmt: skip

ALIASES = {
    "not_quantized": "bf16",
    "fast_quantized": "q8_0",
    "quantized": "q4_k_m",
    "q4_k": "q4_k_m",
    "q5_k": "q5_k_m",
    "q3_k": "q3_k_m",
    "mxfp4_moe": "mxfp4",
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


def storage(
    mix: Mix, entry: TensorEntry, model: ModelFacts, *, tied: bool, imatrix: bool = False
) -> Choice:
    """The storage type of one tensor; imatrix: the file is made with an importance matrix."""
    if len(entry.shape) == 1 or entry.part != "weight" or entry.role in _ALWAYS_F32:
        return Choice(BLOCKS["F32"])
    wanted = _wanted(mix, entry, model, tied=tied, imatrix=imatrix)
    fitting = wanted
    columns = entry.shape[-1]
    if columns % BLOCKS[fitting].values:
        fitting = _NARROWER.get(fitting, fitting)
    if columns % BLOCKS[fitting].values:
        fitting = "F16"
    return Choice(BLOCKS[fitting], None if fitting == wanted else wanted)


def _wanted(mix: Mix, entry: TensorEntry, model: ModelFacts, *, tied: bool, imatrix: bool) -> str:
    if BLOCKS[mix.base].values == 1:
        return mix.base
    if entry.role == "head" or (tied and entry.role == "embedding"):
        narrow = entry.shape[-1] % BLOCKS[mix.base].values != 0
        return "Q8_0" if narrow or mix.base in ("Q8_0", "MXFP4") else "Q6_K"
    if mix.base == "MXFP4":
        return "MXFP4" if len(entry.shape) == 3 else "Q8_0"
    if entry.layer is None:
        return mix.base
    experts = next((int(model.config[key]) for key in _EXPERT_COUNTS if model.config.get(key)), 0)
    at = Place(entry.layer, model.layers, model.heads // model.kv_heads, experts, imatrix)
    if entry.role in _VALUES:
        return _value(mix, at)
    if entry.role == "k" and experts == 8:
        return "Q8_0"  # small beside eight experts
    if entry.role == "o":
        return (mix.eight or mix.base) if experts == 8 else _first_of(mix.output, at, mix.base)
    if entry.role.endswith("down"):
        return _first_of(mix.down, at, mix.base)
    return mix.base


def _value(mix: Mix, at: Place) -> str:
    if at.experts == 8:
        return "Q8_0"
    kind = _first_of(mix.value, at, mix.base)
    if at.layers == 80 and at.queries > 1 and kind in ("Q3_K", "Q4_K"):
        return "Q5_K"  # 70B: 8 query heads share each value, so its bits count eightfold
    return kind


def _first_of(rules: Rules, at: Place, base: str) -> str:
    return next((kind for holds, kind in rules if holds(at)), base)
