"""Accelerate: its own loop, with gradients accumulated over two batches.

    python examples/loops/accelerate_loop.py [MODEL] [--steps 20]

Wire first, then `prepare`: Accelerate puts a forward of its own on the model, and a wiring under it would be passed by.
"""

from itertools import cycle, islice

import hotloop
import torch
from accelerate import Accelerator
from common import DEVICE, batches, load, run


def train(name: str, steps: int) -> list[float]:
    accelerator = Accelerator(
        cpu=DEVICE == "cpu",
        mixed_precision="bf16" if DEVICE == "cuda" else "no",
        gradient_accumulation_steps=2,
    )
    model, tokenizer = load(name)
    receipt = hotloop.wire(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    data = torch.utils.data.DataLoader(batches(tokenizer), batch_size=None)
    model, optimizer, data = accelerator.prepare(model.train(), optimizer, data)
    losses = []
    for batch in islice(cycle(data), steps):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    accelerator.end_training()
    receipt.undo()
    return losses


if __name__ == "__main__":
    run(train, __doc__)
