"""What common cards can do: memory, sustained rates and the link to the host."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

from hotloop_core.errors import ConfigError

from .amounts import parse_bytes

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Card:
    """A card and its sustained rates.

    memory: bytes that one process can allocate, its CUDA context already taken off. gemm_tflops:
    dense 16-bit matrix products with fp32 accumulation. attention_tflops: (forward, backward) of
    causal attention over very long sequences; attention_half: the sequence lengths at which it
    reaches half of that. copy_gbs: bytes read and written on the device, 1e9 a second. link_gbs: to
    host memory, each way. launch_ms: (forward, backward) that the host needs to queue one layer.
    bf16: in hardware. measured: False where the rates are derived from the maker's data sheet
    rather than measured.
    """

    name: str
    memory: int
    gemm_tflops: float
    attention_tflops: tuple[float, float]
    copy_gbs: float
    link_gbs: float
    attention_half: tuple[float, float] = (784.0, 1272.0)
    launch_ms: tuple[float, float] = (2.1, 2.8)
    bf16: bool = True
    measured: bool = False

    def attention_rate(self, longest: int) -> tuple[float, float]:
        """TFLOP/s (forward, backward) at a sequence length: peak * S / (S + half)."""
        forward, backward = (
            peak * longest / (longest + half)
            for peak, half in zip(self.attention_tflops, self.attention_half, strict=True)
        )
        return forward, backward


def from_data_sheet(
    name: str, memory: int, peak_tflops: float, gbs: float, link_gbs: float, *, bf16: bool = True
) -> Card:
    """0.69 of the peak GEMM rate and 0.88 of the memory's rate, which the measured H100 keeps up;
    attention as there.
    """
    gemm = 0.69 * peak_tflops
    return Card(
        name=name,
        memory=memory - CONTEXT,
        gemm_tflops=gemm,
        attention_tflops=(0.88 * gemm, 0.82 * gemm),
        copy_gbs=0.88 * gbs,
        link_gbs=link_gbs,
        bf16=bf16,
    )


CONTEXT = int(0.6 * GIB)
"""Bytes of a CUDA context, which no allocation can have."""

CARDS: tuple[Card, ...] = (
    from_data_sheet("T4", int(14.7 * GIB), 65, 320, 12, bf16=False),
    from_data_sheet("RTX 3090", int(23.7 * GIB), 71, 936, 25),
    from_data_sheet("RTX 4090", int(23.6 * GIB), 165, 1008, 25),
    from_data_sheet("RTX 5090", int(31.4 * GIB), 210, 1792, 50),
    from_data_sheet("A10", int(22.5 * GIB), 125, 600, 25),
    from_data_sheet("A100 40GB", int(39.4 * GIB), 312, 1555, 25),
    from_data_sheet("A100 80GB", int(79.2 * GIB), 312, 2039, 25),
    from_data_sheet("L40S", int(44.4 * GIB), 362, 864, 25),
    Card(
        name="H100",
        memory=int(78.5 * GIB),
        gemm_tflops=680.0,
        attention_tflops=(600.0, 561.0),
        copy_gbs=2960.0,
        link_gbs=55.0,
        measured=True,
    ),
    from_data_sheet("H200", int(139.8 * GIB), 989, 4800, 55),
    from_data_sheet("B200", int(178.3 * GIB), 2250, 8000, 55),
)
"""Memory is what the driver reports. Links: PCIe 3.0, 4.0 and 5.0 with 16 lanes carry 12, 25 and 55 GB/s.

The H100 (SXM) was measured: 680 TFLOP/s sustained; cuDNN's causal attention 434 and 346 at 2,048 tokens, 586 and
540 at 32,768, which the two lengths at half rate reproduce; copies; the link. Its host needed 2.7 and 4.6 ms to queue
a layer before the way to a launch was shortened (benchmarks/LOG.md); 2.0 and 3.5 are what the rows since then allow.
Other hosts are taken to be as fast."""

REFERENCE = next(card for card in CARDS if card.measured)
"""Its ratios rank plans where the card is unknown; no times are printed then."""


def find_card(name: str) -> Card:
    """The card of a name such as "H100", "rtx4090" or "NVIDIA A100-SXM4-80GB", or of its numbers:
    memory, peak 16-bit rate, memory's rate, the link's: "24GiB,165TFLOP/s,1008GB/s,25GB/s".

    Raises:
        ConfigError: no card, or more than one, has that name.

    """
    if not isinstance(name, str):
        raise ConfigError(f"card={name!r}: expected a name, its numbers ({EXAMPLE!r}) or a Card")
    if "," in name:
        return _from_numbers(name)
    asked = _words(name)
    found = [c for c in CARDS if _words(c.name) <= asked] or [
        c for c in CARDS if asked and asked <= _words(c.name)
    ]
    if any(words <= asked for words in _OTHERS):
        found = []
    if len(found) != 1:
        known = ", ".join(card.name for card in found or CARDS)
        what = "could be any of" if len(found) > 1 else "is not in the table; it has"
        raise ConfigError(
            f"card {name!r} {what} {known}. Name one, or give its numbers: {EXAMPLE!r}."
        )
    return found[0]


_OTHERS = ({"laptop"}, {"ti"}, {"super"}, {"nvl"}, {"mig"}, {"h100", "pcie"})
"""Words that make another card of a name in the table, one with other rates or a part of it."""

EXAMPLE = "24GiB,165TFLOP/s,1008GB/s,25GB/s"
_NUMBER = r"\s*(\d+(?:\.\d+)?)\s*"
_NUMBERS = re.compile(
    rf"{_NUMBER}(GiB|GB),{_NUMBER}TFLOP(?:/s|S),{_NUMBER}GB/s,{_NUMBER}GB/s\s*", re.IGNORECASE
)


def _from_numbers(text: str) -> Card:
    match = _NUMBERS.fullmatch(text)
    if match is None or not all(float(match[i]) > 0 for i in (1, 3, 4, 5)):
        raise ConfigError(
            f"card {text!r}: expected memory, the data sheet's 16-bit rate, the memory's rate and the "
            f"host link's, such as {EXAMPLE!r}"
        )
    memory = parse_bytes(f"{match[1]}{match[2]}")
    if memory <= CONTEXT:
        raise ConfigError(
            f"card {text!r}: expected more memory than the {CONTEXT / GIB:.1f} GiB of a CUDA context"
        )
    rates = (float(match[i]) for i in (3, 4, 5))
    return from_data_sheet("the card given", memory, *rates)


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
        free = int(pynvml.nvmlDeviceGetMemoryInfo(handle).free) - CONTEXT
        return str(pynvml.nvmlDeviceGetName(handle)), free
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _words(name: str) -> frozenset[str]:
    spaced = re.sub(r"(rtx)(\d)", r"\1 \2", name.lower())
    spaced = re.sub(r"(\d) (gi?b)\b", r"\1\2", spaced)
    return frozenset(re.findall(r"[a-z]*\d+[a-z]*|[a-z]+", spaced)) - {"nvidia", "geforce", "tesla"}
