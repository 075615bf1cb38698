"""NF4 by bitsandbytes: what a load asks for, accepts, and makes sure of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hotloop_core.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from transformers import BitsAndBytesConfig, PreTrainedModel


def nf4_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantisation (QLoRA, arXiv:2305.14314), computing in `dtype`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def require_bits(config: Mapping[str, Any], bits: int) -> bool:
    """Whether a checkpoint is stored in bitsandbytes' 4 bit.

    Raises:
        UnsupportedError: it is stored in another quantised form. ConfigError: it is, and 16 bit
            were asked for.

    """
    stored = config.get("quantization_config")
    if not stored:
        return False
    method = stored.get("quant_method")
    four_bit = stored.get("load_in_4bit") or stored.get("_load_in_4bit")
    if method != "bitsandbytes" or not four_bit:
        kind = "8-bit bitsandbytes" if method == "bitsandbytes" else f"{method!r}"
        raise UnsupportedError(
            f"the checkpoint is quantised as {kind}; Hotloop trains on 16-bit checkpoints and on "
            "bitsandbytes 4-bit ones. Load the original model with bits=4."
        )
    if bits != 4:
        raise ConfigError(
            f"the checkpoint is stored in 4 bit, but bits={bits} was asked for. Pass bits=4 "
            "(load_in_4bit=True), or load the original model."
        )
    return True


def settle_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Makes every 4-bit layer compute in `dtype`, whatever its checkpoint says, and keep its
    weights as they are.

    On a CPU with AVX512-BF16, bitsandbytes rewrites a weight in place, in another layout, at its
    first evaluation: what reads the weight afterwards (the engine, an export) would read noise.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
            module.compute_type_is_set = True
            module.support_avx512bf16_for_cpu = False
