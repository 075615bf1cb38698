"""transformers' Trainer for packed rows: bins dealt evenly to the processes, and loss weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import Trainer

from .batches import WEIGHTS, PackedDataset, PackedSampler
from .loss import weighted_loss

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.data import Dataset, Sampler


class PackedTrainer(Trainer):
    """Trainer with a `PackedDataset`; arguments, callbacks and checkpoints are Trainer's own.

    On every process the same number of steps, in each about as many tokens, in each epoch every bin once; resumed in
    the middle of an epoch it goes on with the bins that were left.
    """

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, PackedDataset):
            return super()._get_train_sampler(train_dataset)
        return PackedSampler(dataset, ranks=self.args.world_size, each=self.args.train_batch_size)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """As Trainer's; a training batch with weights gets `weighted_loss`. Evaluation counts every token alike."""
        weights = inputs.pop(WEIGHTS, None)
        if weights is None or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = weighted_loss(model, inputs, weights, num_items=num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # N is that of all processes, and DDP takes the mean of their gradients.
            loss = loss * self.accelerator.num_processes
        return loss
