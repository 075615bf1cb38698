"""What this machine is and can do, measured where it is cheap to measure."""

from __future__ import annotations

import importlib.metadata as metadata
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from hotloop_engine.attention import BackendRow

GIB = 2**30
_LINK_BYTES = 2**28
"""Enough for the link to reach its rate, and a few milliseconds at any."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fact. verdict: fast, slow or missing where it matters for speed, else empty; meaning: why."""

    what: str
    found: str
    meaning: str = ""
    verdict: Literal["fast", "slow", "missing", ""] = ""


def findings() -> list[Finding]:
    """Host, packages, then the device."""
    return [*_host(), *_packages(), *_device()]


def attention_backends() -> list[BackendRow]:
    """The engine's table for this device."""
    import torch
    from hotloop_engine.attention import table

    return table(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _host() -> list[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count()
    return [
        Finding(
            what="system",
            found=f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        ),
        Finding(what="cpu", found=f"{cores} cores"),
        Finding(
            what="host memory",
            found=f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free",
            meaning="bounds what can be offloaded",
        ),
    ]


def _packages() -> list[Finding]:
    return [_package(name, why) for name, why in _WANTED.items()]


_WANTED = {
    "torch": "required",
    "transformers": "required",
    "peft": "required",
    "triton": "our kernels; without it only the torch references run",
    "bitsandbytes": "4-bit loading and 8-bit optimizers",
    "flash-attn-4": "the fastest attention on Hopper and newer: `uv add 'hotloop-engine[fa4]'`",
    "datasets": "Parquet files and data sets on the hub: `uv add 'hotloop[train]'`",
    "matplotlib": "the loss plot: `uv add 'hotloop[train]'`",
}


def _package(name: str, why: str) -> Finding:
    try:
        return Finding(what=name, found=metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(what=name, found="not installed", meaning=why, verdict="missing")


def _device() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = (
            "this torch is built without CUDA"
            if built is None
            else f"torch is built for CUDA {built} and finds no driver"
        )
        return [
            Finding(
                what="gpu",
                found="none",
                meaning=f"{why}; everything runs on the CPU through the torch references",
                verdict="slow",
            )
        ]
    cards = [found for index in range(torch.cuda.device_count()) for found in _card(index)]
    return [*cards, _products()]


def _products() -> Finding:
    from hotloop_engine.gemm import library_version

    version = library_version()
    if version is None:
        return Finding(
            what="matrix products",
            found="torch",
            meaning="torch's cuBLASLt was not found; large products take the algorithm that torch picks",
            verdict="slow",
        )
    return Finding(
        what="matrix products",
        found=f"cuBLASLt {version}",
        meaning="large ones by the algorithm that is fastest here, found out in the third step or so",
        verdict="fast",
    )


def _card(index: int) -> list[Finding]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    capability = (properties.major, properties.minor)
    bf16 = capability >= (8, 0)
    up, down = _link(index)
    return [
        Finding(
            what=f"gpu {index}",
            found=f"{properties.name}, compute capability {capability[0]}.{capability[1]}",
        ),
        Finding(
            what="driver", found=_driver(), meaning=f"torch is built for CUDA {torch.version.cuda}"
        ),
        Finding(what="device memory", found=f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"),
        Finding(
            what="bfloat16",
            found="in hardware" if bf16 else "emulated",
            meaning="the dtype of choice" if bf16 else "fp16 with a loss scale is used instead",
            verdict="fast" if bf16 else "slow",
        ),
        Finding(
            what="host link",
            found=f"{up:.0f} GB/s to the device, {down:.0f} GB/s back",
            meaning="offloading hides behind compute"
            if min(up, down) > 10
            else "offloading will cost time",
            verdict="fast" if min(up, down) > 10 else "slow",
        ),
    ]


def _driver() -> str:
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError as error:
        return f"unknown ({error})"


def _link(index: int) -> tuple[float, float]:
    """GB/s from pinned host memory to the device and back, the better of three copies each."""
    import torch

    device = torch.device("cuda", index)
    on_host = torch.empty(_LINK_BYTES, dtype=torch.uint8, pin_memory=True)
    on_device = torch.empty(_LINK_BYTES, dtype=torch.uint8, device=device)

    def rate(target: torch.Tensor, source: torch.Tensor) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times: list[float] = []
        for _ in range(4):  # the first one warms up
            start.record()
            target.copy_(source, non_blocking=True)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return _LINK_BYTES / min(times[1:]) / 1e6

    with torch.cuda.device(device):
        return rate(on_device, on_host), rate(on_host, on_device)
