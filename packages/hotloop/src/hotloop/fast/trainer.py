"""A learning rate of its own for embeddings and head: TRL's SFTTrainer, otherwise unchanged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hotloop_core.errors import ConfigError
from trl import SFTConfig, SFTTrainer

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass
class HotloopTrainingArguments(SFTConfig):
    """SFTConfig, and the learning rate of the embedding and the head where these train
    (`modules_to_save`).
    """

    embedding_learning_rate: float | None = field(
        default=None,
        metadata={"help": "learning rate of embedding and head; None: that of everything else"},
    )


class HotloopTrainer(SFTTrainer):
    """SFTTrainer that gives the embedding and the head their own learning rate."""

    def create_optimizer(self, *args: object) -> Optimizer:
        """The optimizer, embedding and head in groups of their own.

        Raises:
            ConfigError: an embedding learning rate was given, but neither trains.

        """
        model: Any = self.model
        rate = getattr(self.args, "embedding_learning_rate", None)
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args)
        if rate is None or not fresh:
            return optimizer
        apart = {
            id(parameter)
            for module in (model.get_input_embeddings(), model.get_output_embeddings())
            if module is not None
            for parameter in module.parameters()
            if parameter.requires_grad
        }
        if not apart:
            raise ConfigError(
                f"embedding_learning_rate={rate}, but neither the embedding nor the head trains; "
                "name them in modules_to_save (modules_to_save=['embed_tokens', 'lm_head'])"
            )
        for group in list(optimizer.param_groups):
            moved = [p for p in group["params"] if id(p) in apart]
            if moved:
                group["params"] = [p for p in group["params"] if id(p) not in apart]
                optimizer.add_param_group({**group, "params": moved, "lr": rate})
        return optimizer
