"""Storage types against those that llama.cpp's own quantiser chooses for models of the same sizes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hotloop_core import TensorEntry, discover, facts_of
from hotloop_core.gguf import NAMES
from hotloop_gguf.mixes import ALIASES, MIXES, storage

FAMILIES = discover()
EXPERTS = {
    "gate": "blk.{layer}.ffn_gate_exps",
    "up": "blk.{layer}.ffn_up_exps",
    "down": "blk.{layer}.ffn_down_exps",
}


@dataclass(frozen=True)
class Sizes:
    architecture: str
    layers: int
    hidden: int = 512
    intermediate: int = 1024
    heads: int = 8
    kv_heads: int = 2
    experts: int = 0
    tied: bool = False


SIZES = {
    "llama": Sizes("llama", 16),
    "llama, few heads share": Sizes("llama", 11, kv_heads=4),
    "llama 70B": Sizes("llama", 80),
    "smollm": Sizes("llama", 30, hidden=576, intermediate=1536, heads=9, kv_heads=3, tied=True),
    "mixtral": Sizes("llama", 32, experts=8),
    "gemma2": Sizes("gemma2", 26, hidden=2304, intermediate=9216, kv_heads=4, tied=True),
    "gemma3": Sizes("gemma3", 18, hidden=640, intermediate=2048, heads=4, kv_heads=1, tied=True),
    "qwen2": Sizes("qwen2", 24, hidden=896, intermediate=4864, heads=14, tied=True),
    "qwen3": Sizes("qwen3", 36, kv_heads=8),
    "qwen3moe": Sizes("qwen3moe", 48, experts=128),
    "odd widths": Sizes("llama", 9, hidden=264, intermediate=416),
    "no width of 32": Sizes("llama", 2, hidden=72, intermediate=200),
}


def entries(sizes: Sizes) -> list[TensorEntry]:
    head = sizes.hidden // sizes.heads
    d, i, kv = sizes.hidden, sizes.intermediate, sizes.kv_heads * head
    stack = (sizes.experts,) if sizes.experts else ()
    shapes = {
        "q": (d, d), "k": (kv, d), "v": (kv, d), "o": (d, d),
        "gate": (*stack, i, d), "up": (*stack, i, d), "down": (*stack, d, i),
    }  # fmt: skip
    ends = {"embedding": (32000, d)} | ({} if sizes.tied else {"head": (32000, d)})
    found = [(role, None, shape) for role, shape in ends.items()]
    found += [(role, n, shape) for n in range(sizes.layers) for role, shape in shapes.items()]
    return [
        TensorEntry(
            name=f"{role}.{layer}", role=role, part="weight", layer=layer, shape=shape,
            dtype="float32", load=lambda: torch.empty(0),
        )
        for role, layer, shape in found
    ]  # fmt: skip


def facts(sizes: Sizes) -> Any:
    config = {
        "model_type": "llama",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "vocab_size": 32000,
        "hidden_act": "silu",
        "tie_word_embeddings": sizes.tied,
    }
    config |= {"num_local_experts": sizes.experts} if sizes.experts else {}
    return facts_of(FAMILIES.match(config), config)


def name_of(entry: TensorEntry, sizes: Sizes) -> str:
    names = NAMES | (EXPERTS if sizes.experts else {})
    return names[entry.role].format(layer=entry.layer) + ".weight"


class _Sizes(ctypes.Structure):
    _fields_ = [("architecture", ctypes.c_char_p)] + [
        (name, ctypes.c_uint32)
        for name in ("d", "i", "layers", "heads", "kv_heads", "experts", "k_head", "v_head")
    ]


class _Pool(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("bare", ctypes.c_bool)]


Chooser = Callable[[Sizes, int], list[int]]


@pytest.fixture(scope="module")
def chooser() -> Chooser:
    """(sizes, file type) -> llama.cpp's type number of each of `entries(sizes)`.

    By the functions of libllama that its own tests of these rules use; their names are C++'s.
    """
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs the interop group")
    folder = Path(llama_cpp.__file__).parent / "lib"
    library, ggml = (ctypes.CDLL(str(folder / f"lib{name}.so")) for name in ("llama", "ggml-base"))
    pointer = ctypes.c_void_p
    names = {
        "model": "_Z31llama_quant_model_from_metadataPK22llama_quant_model_desc",
        "start": "_Z16llama_quant_initPK11llama_modelPK27llama_model_quantize_params",
        "choose": "_Z25llama_quant_compute_typesP19quantize_state_impl11llama_ftypePP11ggml_tensor"
        "P9ggml_typem",
    }
    if not all(hasattr(library, name) for name in names.values()):
        pytest.skip("this build of llama.cpp does not export its rules")
    model, start, choose = (getattr(library, name) for name in names.values())
    model.restype, model.argtypes = pointer, [pointer]
    start.restype, start.argtypes = pointer, [pointer, pointer]
    choose.restype = None
    choose.argtypes = [pointer, ctypes.c_int, pointer, pointer, ctypes.c_size_t]
    ggml.ggml_init.restype, ggml.ggml_init.argtypes = pointer, [_Pool]
    ggml.ggml_free.restype, ggml.ggml_free.argtypes = None, [pointer]
    wide = [ctypes.c_int64] * 3
    ggml.ggml_new_tensor_3d.restype = pointer
    ggml.ggml_new_tensor_3d.argtypes = [pointer, ctypes.c_int, *wide]
    ggml.ggml_set_name.restype, ggml.ggml_set_name.argtypes = pointer, [pointer, ctypes.c_char_p]

    def chosen(sizes: Sizes, number: int) -> list[int]:
        head = sizes.hidden // sizes.heads
        described = _Sizes(
            sizes.architecture.encode(), sizes.hidden, sizes.intermediate, sizes.layers,
            sizes.heads, sizes.kv_heads, sizes.experts, head, head,
        )  # fmt: skip
        parameters = llama_cpp.llama_model_quantize_default_params()
        state = start(model(ctypes.addressof(described)), ctypes.addressof(parameters))
        listed = entries(sizes)
        pool = ggml.ggml_init(_Pool(1000 * (len(listed) + 1), None, True))
        tensors = (pointer * len(listed))()
        for n, entry in enumerate(listed):
            columns, rows, stack = (*reversed(entry.shape), 1)[:3]
            tensors[n] = ggml.ggml_new_tensor_3d(pool, 0, columns, rows, stack)
            ggml.ggml_set_name(tensors[n], name_of(entry, sizes).encode())
        types = (ctypes.c_int * len(listed))()
        choose(state, number, tensors, types, len(listed))
        ggml.ggml_free(pool)
        return list(types)

    return chosen


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("quant", [name for name in MIXES if name not in ("f32", "f16", "bf16")])
def test_every_tensor_gets_the_type_that_llama_cpp_gives_it(
    quant: str, case: str, chooser: Chooser
) -> None:
    sizes, mix = SIZES[case], MIXES[quant]
    model = facts(sizes)
    theirs = chooser(sizes, mix.number)
    different = {
        entry.name: (ours.block.name, number)
        for entry, number in zip(entries(sizes), theirs, strict=True)
        if (ours := storage(mix, entry, model, tied=sizes.tied)).block.number != number
    }
    assert different == {}


def chosen(quant: str, role: str, layer: int, **options: Any) -> str:
    sizes = Sizes("llama", 16)
    entry = next(e for e in entries(sizes) if (e.role, e.layer) == (role, layer))
    return storage(MIXES[quant], entry, facts(sizes), tied=False, **options).block.name


def test_an_importance_matrix_changes_the_first_down_projections_of_some_mixes() -> None:
    """As in llama.cpp's `llama_tensor_get_type_impl`, where it asks for `has_imatrix`."""
    without = {q: [chosen(q, "down", n) for n in (0, 1, 2)] for q in ("q4_0", "q5_0", "iq4_xs")}
    weighted = {
        q: [chosen(q, "down", n, imatrix=True) for n in (0, 1, 2)]
        for q in ("q4_0", "q5_0", "iq4_xs")
    }
    assert without == {
        "q4_0": ["Q4_0"] * 3,
        "q5_0": ["Q5_0"] * 3,
        "iq4_xs": ["Q5_K", "Q5_K", "IQ4_XS"],
    }
    assert weighted == {
        "q4_0": ["Q4_1", "Q4_1", "Q4_0"],
        "q5_0": ["Q5_1", "Q5_1", "Q5_0"],
        "iq4_xs": ["IQ4_XS"] * 3,
    }


def test_a_bias_is_never_quantised_even_where_it_has_two_dimensions() -> None:
    entry = TensorEntry(
        name="b", role="down", part="bias", layer=0, shape=(8, 512), dtype="float32",
        load=lambda: torch.empty(0),
    )  # fmt: skip
    assert storage(MIXES["q4_k_m"], entry, facts(SIZES["mixtral"]), tied=False).block.name == "F32"


def test_every_alias_names_a_mix() -> None:
    assert set(ALIASES.values()) <= set(MIXES)
    assert set(ALIASES).isdisjoint(MIXES)
