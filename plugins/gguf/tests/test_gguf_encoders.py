"""Encoders against ggml's own, through ctypes where llama-cpp-python is installed, and its decoder."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hotloop_core.errors import ExportError
from hotloop_gguf.encoders import encode
from hotloop_gguf.mixes import BLOCKS

LEGACY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
K_QUANTS = ("Q4_K", "Q5_K", "Q6_K")


def encoded(x: torch.Tensor, kind: str) -> np.ndarray:
    return np.frombuffer(b"".join(bytes(part) for part in encode(x, BLOCKS[kind], "w")), np.uint8)


def decoded(data: np.ndarray, kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    number = gguf.GGMLQuantizationType(BLOCKS[kind].number)
    return torch.from_numpy(gguf.quants.dequantize(data.reshape(shape[0], -1), number).copy())


def rms_error(x: torch.Tensor, data: np.ndarray, kind: str) -> float:
    return float((decoded(data, kind, tuple(x.shape)) - x).square().mean().sqrt())


@pytest.fixture(scope="module")
def ggml() -> Any:
    """ggml's quantiser: (x, kind) -> bytes."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        pytest.skip("needs the interop group: llama-cpp-python")
    library = ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libggml-base.so"))
    function = library.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    wide, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [ctypes.c_int, pointer, pointer, wide, wide, wide, pointer]

    def quantise(x: torch.Tensor, kind: str) -> np.ndarray:
        block, x = BLOCKS[kind], x.contiguous()
        out = np.zeros(x.numel() // block.values * block.bytes, np.uint8)
        size = function(block.number, x.data_ptr(), out.ctypes.data, 0, *x.shape, None)
        assert size == out.nbytes
        return out

    return quantise


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(96, 512, generator=generator) * 0.02
    outliers = normal.clone()
    outliers[::7, ::61] *= 30
    return {
        "normal": normal,
        "outliers": outliers,
        "positive": normal.abs() + 0.01,
        "with-zeros": normal * (torch.rand(96, 512, generator=generator) < 0.05) + 0.0,
        "equal": torch.full((2, 256), 0.3),
        "tied-extremes": torch.tensor([1.0, -1.0] * 256).reshape(2, 256),
        "wide-range": torch.exp2(40 * torch.rand(8, 256, generator=generator) - 30),
        "tiny": torch.randn(4, 256, generator=generator) * 1e-12,
    }


@pytest.mark.parametrize("kind", LEGACY)
@pytest.mark.parametrize("case", inputs())
def test_legacy_blocks_are_ggmls_bit_for_bit(kind: str, case: str, ggml: Any) -> None:
    x = inputs()[case]
    assert np.array_equal(encoded(x, kind), ggml(x, kind))


@pytest.mark.parametrize("kind", K_QUANTS)
@pytest.mark.parametrize("case", inputs())
def test_k_quant_error_is_no_larger_than_ggmls(kind: str, case: str, ggml: Any) -> None:
    x = inputs()[case]
    assert rms_error(x, encoded(x, kind), kind) <= rms_error(x, ggml(x, kind), kind) * (1 + 1e-6)


@pytest.mark.parametrize(
    "kind, limit", [("Q8_0", 0.006), ("Q6_K", 0.018), ("Q5_K", 0.037), ("Q4_K", 0.075)]
)
def test_blocks_decode_close_to_what_they_encode(kind: str, limit: float) -> None:
    x = inputs()["normal"]
    assert rms_error(x, encoded(x, kind), kind) < limit * float(x.square().mean().sqrt())


@pytest.mark.parametrize("kind", [*LEGACY, *K_QUANTS])
def test_zeros_encode_to_zeros(kind: str) -> None:
    assert decoded(encoded(torch.zeros(2, 256), kind), kind, (2, 256)).abs().max() == 0


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_plain_types_are_torchs_own_rounding(kind: str) -> None:
    x = inputs()["normal"]
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    assert np.array_equal(encoded(x, kind), x.to(dtype).view(torch.uint8).numpy().reshape(-1))


@pytest.mark.parametrize("kind", [*LEGACY, *K_QUANTS, "F16"])
def test_a_value_beyond_float16_is_refused_by_name(kind: str) -> None:
    x = torch.zeros(1, 256)
    x[0, 5] = -1e5
    with pytest.raises(ExportError, match=r"w: a value of 1e\+05"):
        encoded(x, kind)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_encoding_does_not_depend_on_dtype_strides_or_parts(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = inputs()["normal"].bfloat16()
    whole = encoded(x.float(), kind)
    assert np.array_equal(whole, encoded(x, kind))
    assert np.array_equal(whole, encoded(x.T.contiguous().T, kind))
    monkeypatch.setattr("hotloop_gguf.encoders._ELEMENTS", {"cpu": 1024})
    assert np.array_equal(whole, encoded(x, kind))
