"""Every kernel is compiled for cards that are not here: it fits each one's shared memory, and its registers.

Run as a script, `test_kernels_compile.py CAPABILITY PART`, this calls the ops on CPU tensors under a driver that only
compiles, and prints what each kernel takes. In the tests there may be Triton's interpreter only, which is chosen
before Triton is imported.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

SHARED_BYTES = {
    75: 64 * 1024,
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    120: 99 * 1024,
}
"""What a program may take, by compute capability: CUDA C++ Programming Guide, table of technical specifications."""

MULTIPROCESSORS = {75: 40, 80: 108, 86: 84, 89: 128, 90: 132, 120: 170}
TOKENS = 2048


def taken(capability: int, part: str) -> dict[str, dict[str, int]]:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", __file__, str(capability), part]
    run = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("capability", [86, 90, 120])
def test_attention_fits_the_shared_memory_of_the_card(capability: int, head_size: int) -> None:
    found = taken(capability, f"attention{head_size}")
    assert len(found) == (5 if capability == 90 and head_size == 256 else 4)
    assert all(one["shared"] <= SHARED_BYTES[capability] for one in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize(
    ("capability", "dtype"), [(80, "bf16"), (89, "bf16"), (80, "fp32"), (90, "fp32")]
)
def test_attention_spills_next_to_no_register(capability: int, dtype: str, head_size: int) -> None:
    found = taken(capability, f"attention{head_size} {dtype}")
    assert len(found) == 4
    assert all(one["stack"] <= 64 for one in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("part", ["norms", "rope", "rows", "weights"])
@pytest.mark.parametrize("capability", [75, 80, 89, 90])
def test_an_op_fits_the_shared_memory_of_the_card(capability: int, part: str) -> None:
    found = taken(capability, part)
    assert found
    assert all(one["shared"] <= SHARED_BYTES[capability] for one in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("capability", [75, 89, 90])
def test_weights_and_their_adapters_spill_no_register_at_any_rank(capability: int) -> None:
    found = taken(capability, "weights")
    assert any("rank 256" in name for name in found)
    spilled = {name for name, one in found.items() if one["stack"] and "sums" not in name}
    assert not spilled


class CompilingDriver:
    """A device that is not there, of some compute capability."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_stream(self, device: int) -> int:
        return 0


def empty(*size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*size, dtype=dtype)


def norms(dtype: torch.dtype) -> None:
    from hotloop_engine.ops.layer_norm import kernel as layer_norm
    from hotloop_engine.ops.rms_norm import kernel as rms_norm

    for width in (64, 896, 4096, 8192, 16384):
        for kind in (dtype, torch.float32):
            x, w = empty(TOKENS, width, dtype=kind), empty(width, dtype=kind)
            _, rstd, _ = rms_norm.forward(x, w, eps=1e-5, residual_TD=x)
            for dw in (False, True):
                rms_norm.backward(x, x, w, rstd, dresidual_TD=x, need_dw=dw)
            layer_norm.forward(x, w, w, eps=1e-5, residual_TD=x)
            layer_norm.backward(x, x, w, rstd, rstd, dresidual_TD=x, need_dw=True)


def rope(dtype: torch.dtype) -> None:
    from hotloop_core.kernels import HeadNorm
    from hotloop_engine.ops.rope import kernel

    for heads, kv_heads, size, rotated in ((32, 8, 128, 128), (16, 8, 256, 256), (5, 2, 100, 60)):
        for kind in (dtype, torch.float32):
            q, k = (empty(TOKENS, n, size, dtype=kind) for n in (heads, kv_heads))
            table = empty(TOKENS, rotated, dtype=torch.float32)
            norm = HeadNorm(w_K=empty(size, dtype=kind), eps=1e-6)
            both = {"q_norm": norm, "k_norm": norm}
            kernel.forward(q, k, table, table, out_q=q, out_k=k)
            kernel.forward(q, k, table, table, **both)
            kernel.backward(q, k, table, table, q_THK=q, k_TGK=k, need_dw=True, **both)


def rows(dtype: torch.dtype) -> None:
    from hotloop_core.kernels import HeadLossOptions
    from hotloop_engine.ops.dropout import kernel as dropout
    from hotloop_engine.ops.glu import kernel as glu
    from hotloop_engine.ops.linear_cross_entropy import kernel as loss

    gate = empty(TOKENS, 14336, dtype=dtype)
    for activation in ("silu", "gelu", "gelu_tanh"):
        glu.forward(gate, gate, activation=activation)
        glu.backward_(gate, gate, gate, activation=activation)
    dropout.forward(gate, p=0.1, seed=3)
    numbers, labels = empty(8, dtype=torch.float32), torch.zeros(8, dtype=torch.int64)
    for options in (HeadLossOptions(), HeadLossOptions(softcap=30.0, label_smoothing=0.1)):
        for kind in (dtype, torch.float32):
            logits = empty(8, 128_256, dtype=kind)
            loss.forward_(
                logits, labels, options=options, dloss_T=numbers, want_entropy=True,
                moments_2T=empty(2, 8, dtype=torch.float32),
            )  # fmt: skip
            loss.backward_(
                logits, labels, numbers, numbers, options=options,
                dloss_T=numbers, dlog_prob_T=numbers, dentropy_T=numbers,
            )  # fmt: skip
            loss.scale_rows_(gate, empty(TOKENS, dtype=torch.float32))


def four_bit(n: int, k: int, dtype: torch.dtype) -> Any:
    from hotloop_core.kernels import FourBitWeight

    def numbers(size: int) -> torch.Tensor:
        return empty(size, dtype=torch.float32)

    return FourBitWeight(
        packed=empty(n * k // 2, dtype=torch.uint8), absmax=empty(n * k // 64, dtype=torch.uint8),
        code=numbers(16), blocksize=64, shape=(n, k), dtype=dtype, kind="nf4",
        nested_absmax=numbers(n * k // 64 // 256 + 1), nested_code=numbers(256),
        nested_offset=torch.tensor(0.0),
    )  # fmt: skip


def weights(dtype: torch.dtype) -> None:
    from hotloop_engine.ops.adapter_glu import kernel as adapter_glu
    from hotloop_engine.ops.adapter_gradients import kernel as gradients
    from hotloop_engine.ops.lora_linear import LinearGroup, LinearView, Lora, kernel
    from hotloop_engine.ops.nf4 import kernel as nf4

    for k in (4096, 4090):
        nf4.forward(four_bit(64, k, dtype), out=empty(64, k, dtype=dtype))
    for rank in (3, 16, 256):
        lora = Lora(
            a_RK=empty(rank, 4096, dtype=torch.float32), b_NR=empty(64, rank, dtype=torch.float32),
            scale=0.5,
        )  # fmt: skip
        view = LinearView(weight=four_bit(64, 4096, dtype), bias=empty(64, dtype=dtype), lora=lora)
        for count in (1, 3):
            group = LinearGroup([view] * count, dtype, torch.device("cpu"))
            group.columns = -(-group.columns // 64) * 64  # as on CUDA
            columns = group.columns
            Compiled.label = f"rank {rank} x {count}"
            kernel.extend(group, empty(group.n + columns, 4096 + columns, dtype=dtype))
            kernel.fill_columns(
                group, empty(group.n, columns, dtype=dtype), empty(columns, 4096, dtype=dtype)
            )
    Compiled.label = "sums"
    if Compiled.capability < 80:  # `fits` leaves them to cuBLAS there
        return
    wide = empty(TOKENS, 4096, dtype=dtype)
    for rank in (16, 48):
        narrow = empty(TOKENS, rank, dtype=dtype)
        gradients.column_sums(wide, narrow, row_scale_T=empty(TOKENS, dtype=torch.float32))
        adapter_glu.backward_(wide, wide, wide, narrow, narrow, activation="silu")


def attention(head_size: int, dtype: torch.dtype) -> None:
    """Forward and backward with a window and a soft cap, the most that they hold."""
    from hotloop_engine.attention import Sequences, kernel
    from hotloop_engine.attention.interface import Inputs

    q, k = (empty(256, heads, head_size, dtype=dtype) for heads in (4, 2))
    sequences = Sequences.dense(4, 64, "cpu")
    inputs = Inputs(q, k, k, sequences, scale=0.1, window=48, softcap=50.0, deterministic=True)
    with mock.patch.object(kernel, "_is_hopper", lambda _: Compiled.capability == 90):
        lse = kernel.attention_forward(inputs, q)
        kernel.attention_backward(inputs, q, q, lse, (q, k, k))


class Compiled:
    """What each launch took; the launches themselves do not happen."""

    capability = 0
    label = ""
    found: dict[str, dict[str, int]] = {}  # noqa: RUF012 - one process, one part


def stack_bytes(cubin: bytes) -> int:
    """What a thread keeps in memory because it has no register for it."""
    import triton

    tool = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(int(number) for number in re.findall(r"STACK:(\d+)", said))


def main(capability: int, part: str) -> None:
    import triton
    from hotloop_engine.ops import kernel as common
    from hotloop_engine.ops.adapter_gradients import kernel as gradients
    from hotloop_engine.ops.rms_norm import kernel as rms_norm
    from triton.runtime.jit import JITFunction

    Compiled.capability = capability
    triton.runtime.driver.set_active(CompilingDriver(capability))
    compile_and_launch: Callable[..., Any] = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool = False, **options: Any):
        kernel = compile_and_launch(self, *arguments, grid=grid, warmup=True, **options)
        name = f"{Compiled.label} {self.fn.__name__} {kernel.hash[:8]}"
        stack = stack_bytes(kernel.asm["cubin"])
        Compiled.found[name] = {"shared": kernel.metadata.shared, "stack": stack}
        return kernel

    dtype = torch.float16 if capability < 80 else torch.bfloat16
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(common, "DIRECT", False),
        mock.patch.object(common, "multiprocessors", lambda _: MULTIPROCESSORS[capability]),
        mock.patch.object(rms_norm, "multiprocessors", lambda _: MULTIPROCESSORS[capability]),
        mock.patch.object(gradients, "multiprocessors", lambda _: MULTIPROCESSORS[capability]),
    ):
        if part.startswith("attention"):
            head_size, _, kind = part.removeprefix("attention").partition(" ")
            attention(int(head_size), torch.float32 if kind == "fp32" else dtype)
        else:
            {"norms": norms, "rope": rope, "rows": rows, "weights": weights}[part](dtype)
    print(json.dumps(Compiled.found))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
