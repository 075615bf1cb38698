"""One training step of Hotloop and of what a user would take instead, measured the same way.

    python benchmarks/step.py make llama3-8b FOLDER
    python benchmarks/step.py run hotloop FOLDER --no-ckpt --settings 2x2048,8x2048
    python benchmarks/step.py run unsloth FOLDER --settings 8x2048 --bits 16
    python benchmarks/step.py run hotloop FOLDER --vram 3.4

Every framework trains the same random weights on the same tokens: LoRA of rank 16 on the seven projections, 8-bit
AdamW, bf16 autocast, as Trainer runs it. One JSON line for the load and one for each setting: tokens a second of the
median step, peak memory, and the first losses and gradient norms, which have to agree between frameworks before any
speed counts. `--vram` caps the process at so many GiB, as a smaller card would.

    hf       transformers + PEFT + bitsandbytes, SDPA attention, checkpointing unless --no-ckpt
    hf-kbit  the same after PEFT's prepare_model_for_kbit_training
    liger    hf with Liger's kernels
    unsloth  its FastLanguageModel, its offloaded checkpointing unless --no-ckpt
    hotloop  the same calls of ours
    hotloop-bnb  hotloop, but bitsandbytes' optimizer takes its own step, tensor by tensor, as in the others
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
GIB = 2**30
SHAPES: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("shapes.json").read_text(encoding="utf-8")
)
MODELS = {
    name: (shape["model_type"], {key: shape[key] for key in shape if key != "model_type"})
    for name, shape in SHAPES.items()
}
"""name -> (transformers' model type, the rest of its config)."""

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16


def make(name: str, folder: str) -> None:
    """A checkpoint with random weights in bf16, and a tokenizer of a few hundred bytes and words."""
    import torch
    from hotloop_testkit.tiny import tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, shape = MODELS[name]
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, bos_token_id=0, eos_token_id=1, pad_token_id=2, **shape),
            dtype=torch.bfloat16,
        )
    model.save_pretrained(folder, max_shard_size="4GB")
    tokenizer(320).save_pretrained(folder)


@dataclass(frozen=True)
class Wanted:
    """What is to be trained, and how."""

    framework: str
    folder: str
    bits: int = 4
    checkpointing: bool = True
    vram: float | None = None
    longest: int = 2048

    def load(self) -> Any:
        """The model with its adapters, in training mode."""
        fast = self.framework.partition("-")[0]
        if fast in ("unsloth", "hotloop"):
            model = self._fast(importlib.import_module(fast).FastLanguageModel)
        else:
            model = self._plain()
        model.config.use_cache = False
        return model.train()

    def _fast(self, fast: Any) -> Any:
        import torch

        own: dict[str, Any] = {}
        if self.framework == "unsloth":
            own = {"load_in_16bit": self.bits == 16, "local_files_only": True}
        elif self.vram is not None:
            own = {"vram": f"{self.vram}GiB"}
        model, _ = fast.from_pretrained(
            self.folder,
            max_seq_length=self.longest,
            dtype=torch.bfloat16,
            load_in_4bit=self.bits == 4,
            **own,
        )
        offload = "unsloth" if self.framework == "unsloth" else "offload"
        model = fast.get_peft_model(
            model,
            r=RANK,
            lora_alpha=RANK,
            lora_dropout=0,
            bias="none",
            target_modules=PROJECTIONS,
            use_gradient_checkpointing=offload if self.checkpointing else False,
            random_state=1,
        )
        fast.for_training(model)
        return model

    def _plain(self) -> Any:
        import torch
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
        from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

        if self.framework == "liger":
            liger: Any = importlib.import_module("liger_kernel.transformers")
            liger._apply_liger_kernel(AutoConfig.from_pretrained(self.folder).model_type)
        four_bit = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        model: Any = AutoModelForCausalLM.from_pretrained(
            self.folder,
            dtype=torch.bfloat16,
            device_map={"": 0} if torch.cuda.is_available() else None,
            attn_implementation="sdpa",
            quantization_config=four_bit if self.bits == 4 else None,
        )
        plain = {"use_reentrant": False}
        if self.framework == "hf-kbit":
            model = prepare_model_for_kbit_training(
                model,
                use_gradient_checkpointing=self.checkpointing,
                gradient_checkpointing_kwargs=plain,
            )
        elif self.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=plain)
            model.enable_input_require_grads()
        torch.manual_seed(1)
        settings = LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules=PROJECTIONS, task_type="CAUSAL_LM"
        )
        return get_peft_model(model, settings)


class Training:
    """A loaded model, its trained parameters and their optimizer.

    plain_optimizer: of a subclass, which Hotloop leaves alone.
    """

    def __init__(self, model: Any, *, plain_optimizer: bool = False) -> None:
        import torch

        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if torch.cuda.is_available():
            import bitsandbytes as bnb

            kind = bnb.optim.AdamW8bit
            if plain_optimizer:
                kind = type("Plain", (kind,), {})
            self.optimizer: Any = kind(self.parameters, lr=2e-4)
        else:
            self.optimizer = torch.optim.AdamW(self.parameters, lr=2e-4)

    def step(self, ids: Any) -> tuple[float, float, float]:
        """(seconds, loss, gradient norm) of one step on token ids [B, S]."""
        import torch

        _synchronise()
        began = time.perf_counter()
        with torch.autocast(ids.device.type, torch.bfloat16):
            loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        _synchronise()
        return time.perf_counter() - began, loss.item(), norm.item()


def _synchronise() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def fresh_peak() -> None:
    """Peaks are counted from here."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peaks() -> dict[str, float]:
    """GiB that tensors took at most, and that the allocator did; nothing without a card."""
    import torch

    if not torch.cuda.is_available():
        return {}
    return {
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2),
    }


def cap(vram: float) -> None:
    """No more device memory than so many GiB for this process."""
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, vram * GIB / total))


def of_plan(model: Any) -> dict[str, Any]:
    """What a row says of a wired model's plan beside the options; nothing for others."""
    if "hotloop" not in sys.modules:
        return {}
    from hotloop.wiring import receipt_of

    receipt = receipt_of(model)
    plan = None if receipt is None else receipt.plan
    return {"dequantised": len(plan.dequantised)} if plan is not None and plan.dequantised else {}


def run(wanted: Wanted, settings: list[tuple[int, int]], *, warmup: int, steps: int) -> None:
    """Prints the lines of one framework; stops at the first setting that does not fit."""
    if wanted.framework == "unsloth":
        importlib.import_module("unsloth")  # before transformers, as it asks
    import torch

    if wanted.vram is not None:
        cap(wanted.vram)
    began = time.perf_counter()
    training = Training(wanted.load(), plain_optimizer=wanted.framework == "hotloop-bnb")
    line: dict[str, Any] = {"framework": wanted.framework, "bits": wanted.bits}
    loaded = {"load_s": round(time.perf_counter() - began, 1)}
    if torch.cuda.is_available():
        loaded["after_load_gib"] = round(torch.cuda.memory_allocated() / GIB, 2)
    print(json.dumps(line | loaded), flush=True)
    line |= {"ckpt": wanted.checkpointing, "vram": wanted.vram}
    for batch, length in settings:
        fresh_peak()
        draw = torch.Generator().manual_seed(7)
        highest = min(training.model.config.vocab_size, 100_000)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        batches = [
            torch.randint(3, highest, (batch, length), generator=draw).to(device) for _ in range(2)
        ]
        row = line | {"batch": batch, "seq": length}
        try:
            found = [training.step(batches[i % 2]) for i in range(warmup + steps)]
        except torch.OutOfMemoryError:
            print(json.dumps(row | {"oom": True} | peaks()), flush=True)
            return
        row |= of_plan(training.model)
        seconds = sorted(s for s, _, _ in found[warmup:])[steps // 2]
        row |= {"tok_s": round(batch * length / seconds), "step_s": round(seconds, 4)}
        row["loss"] = [round(loss, 4) for _, loss, _ in found[:4]]
        row["grad_norm"] = [round(norm, 4) for _, _, norm in found[:4]]
        print(json.dumps(row | peaks()), flush=True)


def sizes(text: str) -> list[tuple[int, int]]:
    """BATCHxSEQUENCE, several with commas between."""
    pairs = [part.partition("x") for part in text.split(",")]
    return [(int(batch), int(length)) for batch, _, length in pairs]


def main() -> None:
    """Reads the command line."""
    for key, value in OFFLINE.items():
        os.environ.setdefault(key, value)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="write a checkpoint")
    making.add_argument("model", choices=MODELS)
    making.add_argument("folder")
    running = commands.add_parser("run", help="measure one framework")
    running.add_argument(
        "framework", choices=["hotloop", "hotloop-bnb", "unsloth", "liger", "hf", "hf-kbit"]
    )
    running.add_argument("folder")
    running.add_argument("--settings", type=sizes, default="2x2048")
    running.add_argument("--bits", type=int, choices=[4, 16], default=4)
    running.add_argument("--no-ckpt", dest="checkpointing", action="store_false")
    running.add_argument("--vram", type=float, help="GiB that the process may take")
    running.add_argument("--warmup", type=int, default=2)
    running.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    if options.command == "make":
        make(options.model, options.folder)
        return
    wanted = Wanted(
        options.framework,
        options.folder,
        options.bits,
        options.checkpointing,
        options.vram,
        max(length for _, length in options.settings),
    )
    run(wanted, options.settings, warmup=options.warmup, steps=options.steps)


if __name__ == "__main__":
    main()
