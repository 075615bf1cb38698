"""Lightning: the model inside a LightningModule.

python examples/loops/lightning_loop.py [MODEL] [--steps 20]
"""

import hotloop
import lightning
import torch
from common import DEVICE, batches, load, run


class FineTuning(lightning.LightningModule):
    """One step: the loss of the model, which Lightning moves, casts and backpropagates."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model
        self.losses = []

    def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def train(name: str, steps: int) -> list[float]:
    model, tokenizer = load(name)
    receipt = hotloop.wire(model)
    module = FineTuning(model.train())
    trainer = lightning.Trainer(
        max_steps=steps,
        precision="bf16-mixed" if DEVICE == "cuda" else "32-true",
        accelerator=DEVICE,
        devices=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # Every element is a batch already.
    data = torch.utils.data.DataLoader(batches(tokenizer), batch_size=None)
    trainer.fit(module, data)
    receipt.undo()
    return module.losses


if __name__ == "__main__":
    run(train, __doc__)
