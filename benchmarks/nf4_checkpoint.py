"""Writes a checkpoint of a real shape with random weights that are NF4 already, as bitsandbytes stores them.

    python benchmarks/nf4_checkpoint.py llama3-70b FOLDER

A 70B in 16 bit takes 141 GB and has to be quantised; this one takes 40 GB, made as fast as the disk writes. Every
layer has the same random bytes, and rows of the embedding repeat: nothing that is timed depends on that.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from step import SHAPES

if TYPE_CHECKING:
    from torch import Tensor

BLOCK, NESTED_BLOCK = 64, 256
REPEATED = 4096  # random rows of the embedding and the head
OFFSET, SPREAD = 0.03, 0.005  # of the blocks' absmax: weights with a standard deviation near 0.02


def four_bit(rows: int, columns: int) -> dict[str, Tensor]:
    """A random weight [rows, columns] as it is stored: the name's ending -> tensor."""
    import bitsandbytes.functional as bnb

    state: Any = bnb.quantize_4bit(
        torch.zeros(BLOCK, BLOCK, dtype=torch.bfloat16), quant_type="nf4", compress_statistics=True
    )[1]
    like = state.as_dict(packed=True)
    about = json.loads(bytes(like["quant_state.bitsandbytes__nf4"].tolist()))
    about |= {"shape": [rows, columns], "nested_offset": OFFSET}
    blocks = rows * columns // BLOCK
    return {
        "": torch.randint(0, 256, (rows * columns // 2, 1), dtype=torch.uint8),
        ".absmax": torch.randint(0, 256, (blocks,), dtype=torch.uint8),
        ".quant_map": like["quant_map"].clone(),
        ".nested_absmax": torch.full((-(-blocks // NESTED_BLOCK),), SPREAD),
        ".nested_quant_map": like["nested_quant_map"].clone(),
        ".quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(about).encode()), dtype=torch.uint8
        ),
    }


def layer_again(first: Path, number: int) -> list[str]:
    """Writes the file of another layer: the first one's bytes under that layer's names, which it returns."""
    with first.open("rb") as source:
        size = int.from_bytes(source.read(8), "little")
        header = source.read(size).decode().replace(".layers.0.", f".layers.{number}.")
        header += " " * (-len(header) % 8)
        with first.with_name(f"model-{number}.safetensors").open("wb") as target:
            target.write(len(header).to_bytes(8, "little") + header.encode())
            shutil.copyfileobj(source, target, 2**24)
    return [name for name in json.loads(header) if name != "__metadata__"]


def write(shape: dict[str, Any], folder: Path) -> None:
    """The checkpoint, a file a layer, with a tokenizer."""
    from hotloop.loading.quantize import nf4_config
    from hotloop_testkit.tiny import tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.quantizers import AutoHfQuantizer

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    known = {key: value for key, value in shape.items() if key != "model_type"}
    config = AutoConfig.for_model(shape["model_type"], pad_token_id=0, **known)
    quantizer: Any = AutoHfQuantizer.from_config(nf4_config(torch.bfloat16))
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        quantizer.preprocess_model(model=model, device_map={"": "cpu"}, checkpoint_files=None)
    ends: dict[str, Tensor] = {}
    layer: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        path, _, key = name.rpartition(".")
        if name in model.all_tied_weights_keys or (".layers." in name and ".layers.0." not in name):
            continue
        into = layer if ".layers." in name else ends
        module = model.get_submodule(path)
        if type(module).__name__ == "Linear4bit" and key == "weight":
            stored = four_bit(module.out_features, module.in_features)
            into.update({name + ending: value for ending, value in stored.items()})
        elif tensor.ndim == 1:
            into[name] = torch.ones(tensor.shape, dtype=torch.bfloat16)
        else:
            rows = torch.empty(REPEATED, tensor.shape[1], dtype=torch.bfloat16).uniform_(
                -0.03, 0.03
            )
            into[name] = rows.repeat(-(-tensor.shape[0] // REPEATED), 1)[: tensor.shape[0]]
    names = dict.fromkeys(ends, "model-ends.safetensors") | dict.fromkeys(
        layer, "model-0.safetensors"
    )
    save_file(ends, folder / "model-ends.safetensors", metadata={"format": "pt"})
    save_file(layer, folder / "model-0.safetensors", metadata={"format": "pt"})
    for number in range(1, config.num_hidden_layers):
        again = layer_again(folder / "model-0.safetensors", number)
        names |= dict.fromkeys(again, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": names}), encoding="utf-8"
    )
    config.quantization_config = nf4_config(torch.bfloat16).to_dict()
    config.save_pretrained(folder)
    tokenizer(320).save_pretrained(folder)


if __name__ == "__main__":
    write(SHAPES[sys.argv[1]], Path(sys.argv[2]))
