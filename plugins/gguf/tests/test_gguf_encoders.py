"""Encoders against ggml's own, through ctypes where llama-cpp-python is installed, and its decoder."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from hotloop_core.errors import ExportError
from hotloop_gguf import encoders
from hotloop_gguf.encoders import encode
from hotloop_gguf.mixes import BLOCKS
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
KINDS = [kind for kind in BLOCKS if kind not in PLAIN]
Ggml = Callable[[torch.Tensor, str, torch.Tensor | None], np.ndarray]


def encoded(x: torch.Tensor, kind: str, importance: torch.Tensor | None = None) -> np.ndarray:
    parts = encode(x, BLOCKS[kind], "w", importance)
    return np.frombuffer(b"".join(bytes(part) for part in parts), np.uint8)


def decoded(data: np.ndarray, kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    number = gguf.GGMLQuantizationType(BLOCKS[kind].number)
    return torch.from_numpy(dequantize(data.reshape(shape[0], -1), number).copy())


def rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@pytest.fixture(scope="module")
def ggml() -> Ggml:
    """ggml's quantiser: (x, kind, importance) -> bytes."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        pytest.skip("needs the interop group: llama-cpp-python")
    library = ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libggml-base.so"))
    function = library.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    wide, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [ctypes.c_int, pointer, pointer, wide, wide, wide, pointer]

    def quantise(x: torch.Tensor, kind: str, importance: torch.Tensor | None) -> np.ndarray:
        block, x = BLOCKS[kind], x.contiguous()
        out = np.zeros(x.numel() // block.values * block.bytes, np.uint8)
        weights = None if importance is None else importance.data_ptr()
        size = function(block.number, x.data_ptr(), out.ctypes.data, 0, *x.shape, weights)
        assert size == out.nbytes
        return out

    return quantise


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    normal = random(96, 512) * 0.02
    outliers = normal.clone()
    outliers[::7, ::61] *= 30
    wide = torch.exp2(40 * torch.rand(8, 256, generator=generator) - 30)
    halves = normal.clone()
    halves[:, ::32] = 0.0
    halves[3:9] = 0.0
    return {
        "normal": normal,
        "bfloat16": random(64, 512).bfloat16().float() * 0.05,
        "outliers": outliers,
        "positive": normal.abs() + 0.01,
        "negative": -normal.abs() - 0.01,
        "mostly zeros": normal * (torch.rand(96, 512, generator=generator) < 0.05) + 0.0,
        "zero rows": halves,
        "zeros": torch.zeros(2, 256),
        "equal": torch.full((2, 256), 0.3),
        "equal, negative": torch.full((2, 256), -0.3),
        "tied extremes": torch.tensor([1.0, -1.0] * 256).reshape(2, 256),
        "wide range": wide,
        "wide range, both signs": wide * random(8, 256).sign(),
        "tiny": random(4, 256) * 1e-12,
        "below what counts": random(4, 256) * 1e-16,
        "large": random(8, 512) * 15000,
        "no multiple of the lanes": random(3, 768),
    }


def importance_of(x: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(x.shape[1], generator=generator) ** 4 + 1e-5


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_ggmls(kind: str, weighted: bool, ggml: Ggml) -> None:
    different = []
    for case, x in inputs().items():
        importance = importance_of(x) if weighted else None
        if not np.array_equal(encoded(x, kind, importance), ggml(x, kind, importance)):
            different.append(case)
    assert different == []


HALVES = st.floats(-60000, 60000, width=16, allow_subnormal=False)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(values=arrays.arrays(np.float16, (2, 256), elements=HALVES, fill=HALVES))
def test_bytes_are_ggmls_for_any_halves(kind: str, ggml: Ggml, values: np.ndarray) -> None:
    x = torch.from_numpy(values.astype(np.float32))
    assert np.array_equal(encoded(x, kind), ggml(x, kind, None))


@pytest.mark.parametrize(
    "kind, limit",
    [
        ("Q8_0", 0.006), ("Q6_K", 0.018), ("Q5_1", 0.039), ("Q5_K", 0.037), ("Q5_0", 0.044),
        ("Q4_1", 0.080), ("Q4_K", 0.075), ("IQ4_XS", 0.078), ("IQ4_NL", 0.081), ("Q4_0", 0.087),
        ("MXFP4", 0.12), ("Q3_K", 0.16), ("Q2_K", 0.31),
    ],
)  # fmt: skip
def test_blocks_decode_close_to_what_they_encode(kind: str, limit: float) -> None:
    x = inputs()["normal"]
    assert rms(decoded(encoded(x, kind), kind, tuple(x.shape)) - x) < limit * rms(x)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("Q8_0", "MXFP4")])
def test_importance_lowers_the_error_where_it_counts(kind: str) -> None:
    x = inputs()["normal"]
    importance = importance_of(x)

    def error(data: np.ndarray) -> float:
        return rms((decoded(data, kind, tuple(x.shape)) - x) * importance.sqrt())

    assert error(encoded(x, kind, importance)) < error(encoded(x, kind))


def test_each_expert_has_importance_of_its_own() -> None:
    x = inputs()["normal"].reshape(3, 32, 512)
    importance = torch.rand(3, 512)
    one_by_one = [encoded(x[i], "Q4_K", importance[i]) for i in range(3)]
    assert np.array_equal(encoded(x, "Q4_K", importance), np.concatenate(one_by_one))
    shared = [encoded(x[i], "Q4_K", importance[0]) for i in range(3)]
    assert np.array_equal(encoded(x, "Q4_K", importance[0]), np.concatenate(shared))


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_encode_to_zeros(kind: str) -> None:
    assert decoded(encoded(torch.zeros(2, 256), kind), kind, (2, 256)).abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_subnormal_values_decode_to_almost_zero(kind: str) -> None:
    x = torch.full((2, 256), 1e-42) * torch.tensor([1.0, -1.0]).repeat(128)
    assert decoded(encoded(x, kind), kind, (2, 256)).abs().max() < 1e-37


def test_mxfp4_holds_what_float16_cannot() -> None:
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)) * 1e20
    assert rms(decoded(encoded(x, "MXFP4"), "MXFP4", (2, 64)) - x) < 0.15 * rms(x)


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_types_are_torchs_own_rounding(kind: str) -> None:
    x = inputs()["normal"]
    expected = x.to(PLAIN[kind]).view(torch.uint8).numpy().reshape(-1)
    assert np.array_equal(encoded(x, kind), expected)


@pytest.mark.parametrize("kind", [*(k for k in KINDS if k != "MXFP4"), "F16"])
def test_a_value_beyond_float16_is_refused_by_name(kind: str) -> None:
    x = torch.zeros(1, 256)
    x[0, 5] = -1e5
    with pytest.raises(ExportError, match=r"w: a value of 1e\+05"):
        encoded(x, kind)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_value_that_is_not_finite_is_refused_by_name(kind: str, broken: float) -> None:
    x = torch.zeros(2, 256)
    x[1, 77] = broken
    with pytest.raises(ExportError, match="w holds NaN or infinity"):
        encoded(x, kind)


@pytest.mark.parametrize(
    "importance, found",
    [
        (torch.ones(128), r"\(128,\)"),
        (torch.full((256,), -1.0), "-1"),
        (torch.tensor(1.0), r"\(\)"),
    ],
    ids=["another width", "negative", "no vector"],
)
def test_importance_that_does_not_fit_is_refused(importance: torch.Tensor, found: str) -> None:
    with pytest.raises(ExportError, match=f"w: importance.*{found}.*expected \\(256,\\)"):
        encoded(torch.ones(2, 256), "Q4_K", importance)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q3_K", "IQ4_XS"])
def test_encoding_does_not_depend_on_dtype_strides_parts_or_threads(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = inputs()["normal"].bfloat16()
    whole = encoded(x.float(), kind)
    assert np.array_equal(whole, encoded(x, kind))
    assert np.array_equal(whole, encoded(x.T.contiguous().T, kind))
    assert np.array_equal(whole, encoded(x.reshape(3, 32, 512), kind))
    monkeypatch.setattr(encoders, "_VALUES", {"cpu": 1024})
    assert np.array_equal(whole, encoded(x, kind))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert np.array_equal(whole, encoded(x, kind))
    finally:
        torch.set_num_threads(before)


def test_a_tensor_is_encoded_in_parts_of_bounded_size() -> None:
    x = torch.zeros(5000, 512, dtype=torch.bfloat16)
    sizes = [len(part) for part in encode(x, BLOCKS["Q4_K"], "w")]
    assert sum(sizes) == x.numel() // 256 * 144
    assert max(sizes) <= (1 << 19) // 256 * 144 and len(sizes) > 2


def test_threads_are_given_back_to_torch() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        parts = encode(torch.zeros(600, 512), BLOCKS["Q8_0"], "w")
        assert len(next(parts)) > 0 and torch.get_num_threads() == 1
        parts.close()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
