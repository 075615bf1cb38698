"""TRL's SFTTrainer: the loss on answers only, padding removed, TRL's loss head replaced by Hotloop's.

python examples/loops/trl_sft.py [MODEL] [--steps 20]
"""

from tempfile import TemporaryDirectory

import hotloop
from common import DEVICE, load, questions, run
from datasets import Dataset
from trl import SFTConfig, SFTTrainer


def train(name: str, steps: int) -> list[float]:
    model, tokenizer = load(name)
    rows = [{"prompt": f"{question}\n", "completion": answer} for question, answer in questions()]
    receipt = hotloop.wire(model)
    with TemporaryDirectory() as output:
        trainer = SFTTrainer(
            model,
            SFTConfig(
                output,
                max_length=256,
                max_steps=steps,
                per_device_train_batch_size=4,
                learning_rate=1e-3,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                bf16=DEVICE == "cuda",
                use_cpu=DEVICE == "cpu",
                dataloader_pin_memory=DEVICE == "cuda",
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.train()
    receipt.undo()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    run(train, __doc__)
