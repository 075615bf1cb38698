"""NF4 by bitsandbytes: the configuration of a load, and quantising a model that is already in
memory.
"""

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


def quantize_(
    model: PreTrainedModel, layers: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Replaces each linear layer under the path `layers` by its NF4 form, in place, one weight at a
    time.

    As a load with `nf4_config` would have made it: the config says so, and save_pretrained writes
    it.
    """
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers.quantizers import AutoHfQuantizer

    config = nf4_config(dtype)
    blocks = model.get_submodule(layers)
    names = [n for n, module in blocks.named_modules() if type(module) is torch.nn.Linear]
    for name in names:
        linear = blocks.get_submodule(name)
        with torch.device("meta"):
            four_bit = Linear4bit(
                linear.in_features,
                linear.out_features,
                linear.bias is not None,
                compute_dtype=dtype,
                compress_statistics=True,
                quant_type="nf4",
            )
        weight = Params4bit(
            linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        four_bit.weight = weight.to(device)
        four_bit.weight.module = four_bit
        if linear.bias is not None:
            four_bit.bias = torch.nn.Parameter(linear.bias.data.to(device), requires_grad=False)
        blocks.set_submodule(name, four_bit.train(linear.training))
    model.to(device)
    model.config.quantization_config = config
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    model.quantization_method = config.quant_method
    model.is_quantized = model.is_loaded_in_4bit = True
