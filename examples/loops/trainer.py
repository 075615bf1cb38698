"""transformers' Trainer.

python examples/loops/trainer.py [MODEL] [--steps 20]
"""

from tempfile import TemporaryDirectory

import hotloop
from common import DEVICE, load, questions, run
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments


def train(name: str, steps: int) -> list[float]:
    model, tokenizer = load(name)
    texts = [f"{question}\n{answer}{tokenizer.eos_token}" for question, answer in questions()]
    receipt = hotloop.wire(model)
    with TemporaryDirectory() as output:
        trainer = Trainer(
            model,
            TrainingArguments(
                output,
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
            train_dataset=Dataset.from_dict(tokenizer(texts)),
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
        trainer.train()
    receipt.undo()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    run(train, __doc__)
