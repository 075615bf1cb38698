"""What common cards can do: memory, sustained rates and the link to the host."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

from hotloop_core.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Card:
    """A card and its sustained rates.

    memory: bytes that one process can allocate, its CUDA context already taken off. gemm_tflops:
    dense 16-bit matrix products with fp32 accumulation. attention_tflops: (forward, backward) of
    causal attention. copy_gbs: bytes read and written on the device, 1e9 a second. link_gbs: to
    host memory, each way. bf16: in hardware.
    measured: False where the rates are derived from the maker's data sheet rather than measured.
    """

    name: str
    memory: int
    gemm_tflops: float
    attention_tflops: tuple[float, float]
    copy_gbs: float
    link_gbs: float
    bf16: bool = True
    measured: bool = False


def _from_data_sheet(
    name: str, gib: float, peak_tflops: float, gbs: float, link_gbs: float, *, bf16: bool = True
) -> Card:
    """0.7 of the peak GEMM rate and 0.88 of the memory's rate, which the measured H100 keeps up;
    attention as there.
    """
    gemm = 0.7 * peak_tflops
    return Card(
        name=name,
        memory=int((gib - 0.6) * GIB),
        gemm_tflops=gemm,
        attention_tflops=(0.62 * gemm, 0.5 * gemm),
        copy_gbs=0.88 * gbs,
        link_gbs=link_gbs,
        bf16=bf16,
    )


CARDS: tuple[Card, ...] = (
    _from_data_sheet("T4", 14.7, 65, 320, 12, bf16=False),
    _from_data_sheet("RTX 3090", 23.7, 71, 936, 25),
    _from_data_sheet("RTX 4090", 23.6, 165, 1008, 25),
    _from_data_sheet("RTX 5090", 31.4, 210, 1792, 50),
    _from_data_sheet("A10", 22.5, 125, 600, 25),
    _from_data_sheet("A100 40GB", 39.4, 312, 1555, 25),
    _from_data_sheet("A100 80GB", 79.2, 312, 2039, 25),
    _from_data_sheet("L40S", 44.4, 362, 864, 25),
    Card(
        name="H100",
        memory=int(78.5 * GIB),
        gemm_tflops=680.0,
        attention_tflops=(420.0, 340.0),
        copy_gbs=2960.0,
        link_gbs=55.0,
        measured=True,
    ),
    _from_data_sheet("H200", 139.8, 989, 4800, 55),
    _from_data_sheet("B200", 178.3, 2250, 8000, 55),
)
"""Memory is what the driver reports, in GiB, less 0.6 GiB for a CUDA context. The H100's rates are
measured (SXM)."""

REFERENCE = next(card for card in CARDS if card.measured)
"""Its ratios rank plans where the card is unknown; no times are printed then."""


def find_card(name: str) -> Card:
    """The card of a name such as "H100", "rtx4090" or "NVIDIA A100-SXM4-80GB".

    Raises:
        ConfigError: no card, or more than one, has that name.

    """
    asked = _words(name)
    found = [c for c in CARDS if _words(c.name) <= asked] or [
        c for c in CARDS if asked and asked <= _words(c.name)
    ]
    if "laptop" in asked:  # another, slower card under the same number
        found = []
    if len(found) != 1:
        known = ", ".join(card.name for card in found or CARDS)
        what = "could be any of" if len(found) > 1 else "is not in the table; it has"
        raise ConfigError(f"card {name!r} {what} {known}. Name one, or pass a planner.Card.")
    return found[0]


def present_card() -> tuple[str, int] | None:
    """(name, free bytes) of the card that this process would use, or None; loads no torch where
    none is loaded.
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        if not torch.cuda.is_available():
            return None
        device = torch.cuda.current_device()
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        return torch.cuda.get_device_name(device), free
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        context = int(0.6 * GIB)
        free = int(pynvml.nvmlDeviceGetMemoryInfo(handle).free) - context
        return str(pynvml.nvmlDeviceGetName(handle)), free
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _words(name: str) -> frozenset[str]:
    spaced = re.sub(r"(rtx)(\d)", r"\1 \2", name.lower())
    return frozenset(re.findall(r"[a-z]*\d+[a-z]*|[a-z]+", spaced)) - {"nvidia", "geforce", "tesla"}
