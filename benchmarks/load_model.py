"""Loading an 8B bf16 checkpoint from a warm page cache to NF4: Hotloop, Hotloop with streamed layers, transformers.

    python benchmarks/load_model.py [--smoke] [--readers hotloop,streamed,transformers] [--folder DIR]

Writes a random checkpoint of that shape in four shards (16 GB), then loads it once in a process of its own for each
reader; imports and CUDA's start are not timed, tokenizer and checks are. One JSON line each: seconds, peak and final
bytes on the device, peak bytes of host memory (all, and without file pages). Correct first: the rows carry a digest
of every tensor, and the run fails where readers disagree.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from measure import DEVICE, SMOKE, arguments, environment

if TYPE_CHECKING:
    from collections.abc import Iterator

READERS = ("hotloop", "streamed", "transformers")
SHARDS = 4
SHAPE = {
    "hidden_size": 128 if SMOKE else 4096,
    "intermediate_size": 256 if SMOKE else 14336,
    "num_hidden_layers": 2 if SMOKE else 32,
    "num_attention_heads": 4 if SMOKE else 32,
    "num_key_value_heads": 2 if SMOKE else 8,
    "vocab_size": 512 if SMOKE else 128256,
}


def make_checkpoint(folder: Path) -> None:
    """Llama of SHAPE; all layers hold the same random values, since their time to read does not depend on them."""
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    config = LlamaConfig(**SHAPE, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    ).save_pretrained(folder)
    with torch.device("meta"):
        shapes = {
            name: tuple(tensor.shape)
            for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()
        }
    values = {}
    for shape in set(shapes.values()):
        random = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_(0, 0.02)
        values[shape] = memoryview(random.cpu().view(-1).view(torch.uint8).numpy())
    total = sum(len(values[shape]) for shape in shapes.values())
    shards: list[list[str]] = [[] for _ in range(SHARDS)]
    done = 0
    for name, shape in shapes.items():
        shards[min(SHARDS - 1, done * SHARDS // total)].append(name)
        done += len(values[shape])
    files = [f"model-{i + 1:05}-of-{SHARDS:05}.safetensors" for i in range(SHARDS)]
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def write(file: str, names: list[str]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in names:
            size = len(values[shapes[name]])
            offsets = [at, at + size]
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": offsets}
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb", buffering=0) as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                left = values[shapes[name]]
                while len(left):
                    left = left[opened.write(left) :]

    with ThreadPoolExecutor(SHARDS) as pool:
        list(pool.map(write, files, shards))


def load_once(reader: str, folder: Path) -> dict[str, Any]:
    """Loads in this process; the row."""
    import bitsandbytes  # noqa: F401 - imports are not what is timed
    import hotloop.homes  # noqa: F401
    import peft  # noqa: F401
    import transformers
    from hotloop.loading import load
    from hotloop.loading.quantize import nf4_config
    from hotloop_core import LayerPlan, Plan

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    cuda = DEVICE.type == "cuda"
    if cuda:
        torch.zeros(1, device=DEVICE)
        torch.cuda.reset_peak_memory_stats()
    with anonymous_peak() as anonymous:
        begin = time.perf_counter()
        if reader == "transformers":
            options = {"device_map": {"": DEVICE}} if cuda else {}
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.bfloat16,
                quantization_config=nf4_config(torch.bfloat16),
                **options,
            )
        else:
            away = reader == "streamed"
            plan = Plan(
                layers=(LayerPlan(streamed=away),) * SHAPE["num_hidden_layers"],
                tokens=0,
                longest=0,
                embedding_on_host=away,
                head_on_host=away,
            )
            model, _ = load(folder, dtype=torch.bfloat16, plan=plan, wire=False, device=str(DEVICE))
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    return {
        "benchmark": "load_model",
        "reader": reader,
        "seconds": round(seconds, 2),
        "peak_device_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
        "device_bytes": torch.cuda.memory_allocated() if cuda else 0,
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_host_anonymous_bytes": anonymous[0],
        "checkpoint_bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
        "digest": digest(model),
        "transformers": transformers.__version__,
    }


@contextmanager
def anonymous_peak() -> Iterator[list[int]]:
    """The most anonymous memory that the process holds meanwhile, in bytes, looked at every 20 ms."""
    found, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            status = Path("/proc/self/status").read_text()
            line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
            found[0] = max(found[0], int(line.split()[1]) * 1024)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        stop.set()
        watcher.join()


def digest(model: Any) -> str:
    """Of every tensor's bytes, as sums over each, in order of names."""
    total = 0
    for name, tensor in sorted(model.state_dict().items()):
        if "quant_state" in name:  # JSON text in a tensor, made when it is asked for
            continue
        flat = tensor.to(DEVICE).reshape(-1).view(torch.uint8)
        words = flat[: flat.numel() // 4 * 4].view(torch.int32)
        total = (total * 31 + int(words.sum(dtype=torch.int64)) + int(flat.sum())) % 2**61
    return f"{total:x}"


def main() -> None:
    """Makes the checkpoint, or loads it as a child of that run."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--readers", default=",".join(READERS))
    parser.add_argument("--folder", type=Path, help="where to write 16 GB; default a temporary one")
    parser.add_argument("--child", help="(used by this script)")
    options = parser.parse_args()
    if DEVICE.type == "cpu" and not options.smoke:
        parser.error("found no CUDA device to load to; --smoke only shows that the script runs.")
    if options.child:
        print(json.dumps(load_once(options.child, options.folder)), flush=True)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        begin = time.perf_counter()
        make_checkpoint(folder)
        print(f"wrote the checkpoint in {time.perf_counter() - begin:.1f} s", file=sys.stderr)
        digests = set()
        for reader in options.readers.split(","):
            command = [sys.executable, __file__, "--child", reader, "--folder", str(folder)]
            child = subprocess.run(
                [*command, *(["--smoke"] if SMOKE else [])],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            row = json.loads(child.stdout.splitlines()[-1])
            digests.add(row["digest"])
            print(json.dumps(row | environment() | ({"smoke": True} if SMOKE else {})), flush=True)
    if len(digests) > 1:
        sys.exit("the readers do not agree on the weights; the times above mean nothing")


if __name__ == "__main__":
    main()
