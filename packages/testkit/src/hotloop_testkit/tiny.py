"""Small models, batches and a tokenizer for the suites."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hotloop_core import FamilySpec
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

Model = Any
"""A transformers model, or a PEFT model over one: their attributes are not known to a type checker."""
LENGTH = 40
ROWS = 3
LORA_STD = 0.02
NORM_STD = 0.1
BIAS_STD = 0.01
"""Small: a bias that all values of attention share cancels in the gradients of q and k, and what is left of them is
rounding, in any attention that keeps only its output (measured with 0.1: 5 % error of these in bf16)."""

BLOCK = 32
"""Of NF4. bitsandbytes 0.50 on a CPU dequantises a weight wrongly whose rows end inside a block."""

SMALL: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
"""What every `tiny_config` needs and no family is known by: `LlamaConfig(**SMALL, num_hidden_layers=2)`.

The number of layers is the family's to say, two at least and one of each kind; so is what sets it apart, such as a
head size or a window. A config whose keys are not called as Llama's are spells out its own numbers.
Widths are whole blocks of NF4. `initializer_range` is large, so that attention is far from uniform: a Llama's logits
without any rotation are off by 54 % with 0.1, and by 0.8 % with 0.02, the default of most configs.
"""


def build(config: PreTrainedConfig, seed: int = 0) -> Model:
    """The ...ForCausalLM of a config in fp32, with norms and biases that are not all one or zero."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
    model = cast("Model", AutoModelForCausalLM.from_config(config))  # pyright: ignore[reportUnknownMemberType]
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            std = BIAS_STD if name.endswith("bias") else NORM_STD
            parameter.data += std * torch.randn_like(parameter)
    return model.train()


def with_lora(model: Model, spec: FamilySpec, seed: int = 1) -> Model:
    """Adapters on every projection that the family describes, B not zero, so that each gradient counts."""
    from hotloop.lora import projections
    from peft import LoraConfig, get_peft_model

    paths = projections(spec, model.config.to_dict())
    targets = [path.rpartition(".")[2] for path in paths.values()]
    torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
    adapted: Model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=LORA_STD)
    return adapted


def quantise_(model: Model, spec: FamilySpec) -> Model:
    """The projections that the family describes in bitsandbytes' NF4 with nested statistics, in place; the model."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit
    from hotloop.loading.quantize import settle_
    from hotloop.lora import projections

    paths = projections(spec, model.config.to_dict()).values()
    for layer in model.get_submodule(spec.layers):
        for path in paths:
            plain = layer.get_submodule(path)
            has_bias = plain.bias is not None
            new: Any = Linear4bit(
                plain.in_features, plain.out_features, bias=has_bias, quant_type="nf4"
            )
            make: Any = Params4bit
            new.weight = make(
                plain.weight.data, requires_grad=False, quant_type="nf4", blocksize=BLOCK
            )
            new.bias = plain.bias
            layer.set_submodule(path, new)
    model.to("cpu")  # quantises
    settle_(model, torch.float32)
    return model


def batch(kind: str, vocabulary: int, seed: int = 3) -> dict[str, Tensor]:
    """A batch of `kind` "dense", "padded" (left and right) or "packed" (lengths 1 and 2 among them)."""
    rows = 1 if kind == "packed" else ROWS
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (rows, LENGTH * ROWS // rows), generator=generator)
    inputs = {"input_ids": ids, "labels": ids.clone()}
    if kind == "padded":
        mask = torch.ones_like(ids)
        mask[0, LENGTH - 11 :], mask[1, :7] = 0, 0
        inputs["attention_mask"] = mask
    if kind == "packed":
        lengths = (31, 1, 2, LENGTH * ROWS - 34)
        inputs["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    return inputs


def gradients(model: Model, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The loss and each gradient of one step, by name."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Fails where two sets of tensors differ in name or in any bit."""
    assert found.keys() == expected.keys()
    changed = [name for name in found if not torch.equal(found[name], expected[name])]
    assert not changed, f"{len(changed)} of {len(found)} differ: {', '.join(changed[:5])}"


def tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with GPT-2's pre-tokenizer and `size` tokens, three of them special (size at least 259)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", "<pad>", *alphabet]
    merges: list[tuple[str, str]] = []
    for first in alphabet:
        for second in alphabet:
            if len(words) < size:
                words.append(first + second)
                merges.append((first, second))
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
