"""Plain PyTorch: a loop of one's own.

python examples/loops/pytorch.py [MODEL] [--steps 20]
"""

from itertools import cycle, islice

import hotloop
import torch
from common import DEVICE, batches, load, run


def train(name: str, steps: int) -> list[float]:
    model, tokenizer = load(name)
    receipt = hotloop.wire(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    model.train()
    for batch in islice(cycle(batches(tokenizer)), steps):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            loss = model(**{key: value.to(DEVICE) for key, value in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    receipt.undo()
    return losses


if __name__ == "__main__":
    run(train, __doc__)
