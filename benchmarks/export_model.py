"""An 8B bf16 checkpoint and a LoRA adapter, from a warm page cache to GGUF files.

    python benchmarks/export_model.py [--smoke] [--device cuda] [--quant q4_k_m] [--repeat 2] [--folder DIR]

Writes a random checkpoint of Llama-3-8B's shape (16 GB) and a rank-16 adapter on every projection, then exports it,
each time in a process of its own, in which only imports are not timed: opening the files, merging, encoding, hashing,
writing and syncing are. The first run also compiles kernels. One JSON line each: seconds, bytes, peak bytes on the
device, peak bytes of host memory (all of the process, file pages apart), and the seconds that only reading the
checkpoint takes. Correct first: the file must hold every tensor, and the bytes of all runs must be the same.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from load_model import SHAPE, anonymous_peak, make_checkpoint
from measure import DEVICE, SMOKE, arguments, environment

RANK = 16


def make_model(folder: Path) -> Path:
    """The checkpoint, with a tokenizer that GGUF knows; gives the folder of the adapter on it."""
    from hotloop_testkit.tiny import tokenizer
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    base, adapter = folder / "base", folder / "adapter"
    for made in (base, adapter):
        made.mkdir(parents=True, exist_ok=True)
    if not (base / "config.json").is_file():
        make_checkpoint(base)
    words = tokenizer(320)
    words.save_pretrained(base)
    words.save_pretrained(adapter)
    settings = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    settings.base_model_name_or_path = str(base)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
        shapes = {
            name.replace(".default", ""): tuple(tensor.shape)
            for name, tensor in get_peft_model(plain, settings).named_parameters()
            if ".lora_" in name
        }
    torch.manual_seed(0)
    save_file(
        {name: 0.01 * torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()},
        adapter / "adapter_model.safetensors",
    )
    settings.inference_mode = True
    settings.save_pretrained(str(adapter))
    return adapter


def export_once(adapter: Path, out: Path, quants: list[str], device: str) -> dict[str, Any]:
    """One timed export, in this process."""
    import hotloop_gguf.export  # noqa: F401 - imports are not timed
    import peft  # noqa: F401
    import transformers  # noqa: F401
    from hotloop.exporting import export, open_checkpoint

    if device == "cuda":
        torch.zeros(1, device=device)
        torch.cuda.reset_peak_memory_stats()
    with anonymous_peak() as host:
        begin = time.perf_counter()
        model, tokenizer = open_checkpoint(str(adapter))
        opened = time.perf_counter()
        report = export(
            model, tokenizer, out, format="gguf", quant=quants, device=device, name="bench",
            overwrite=True,
        )  # fmt: skip
        seconds = time.perf_counter() - begin
    layers = SHAPE["num_hidden_layers"]
    assert report.tensors == 9 * layers + 3, f"{report.tensors} tensors for {layers} layers"
    return {
        "seconds": round(seconds, 2),
        "open_s": round(opened - begin, 2),
        "bytes": report.bytes,
        "device_peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else 0,
        "host_peak_bytes": host[0],
        "sha256": [file.sha256[:16] for file in report.files],
    }


def read_all(folder: Path) -> float:
    """Seconds to read every weight file once, which also warms the page cache."""
    block = bytearray(1 << 24)
    begin = time.perf_counter()
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as data:
            while data.readinto(block):
                pass
    return time.perf_counter() - begin


def main() -> None:
    """Makes the model, exports it `--repeat` times, prints a row for each."""
    parser = arguments(__doc__)
    parser.add_argument("--device", default=DEVICE.type, choices=["cuda", "cpu"])
    parser.add_argument(
        "--quant", default="q4_k_m", help="one or several, with commas, in one pass"
    )
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is kept for a next time")
    parser.add_argument("--once", type=Path, help="one export of this adapter's folder (internal)")
    options = parser.parse_args()
    quants = options.quant.split(",")
    if options.once is not None:
        folder = options.once.parent
        print(json.dumps(export_once(options.once, folder / "out", quants, options.device)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        adapter = make_model(folder)
        read_all(folder / "base")
        read_s = read_all(folder / "base")
        hashes: set[str] = set()
        for number in range(options.repeat):
            command = [sys.executable, __file__, "--once", str(adapter), "--quant", options.quant]
            command += ["--device", options.device] + (["--smoke"] if SMOKE else [])
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
            hashes.add(str(row.pop("sha256")))
            assert len(hashes) == 1, "two exports of one model differ"
            shape = {"shape": SHAPE, "rank": RANK, "quants": quants, "run": number}
            what = {"what": "export_model", "device": options.device, "read_s": round(read_s, 2)}
            mark = {"smoke": True} if SMOKE else {}
            print(json.dumps(what | shape | row | environment() | mark), flush=True)


if __name__ == "__main__":
    main()
