"""TRL's DPOTrainer: the reference is the same wired model, under the copy of its adapter that TRL makes.

python examples/loops/trl_dpo.py [MODEL] [--steps 20]
"""

from tempfile import TemporaryDirectory

import hotloop
from common import DEVICE, load, questions, run
from datasets import Dataset
from trl import DPOConfig, DPOTrainer


def train(name: str, steps: int) -> list[float]:
    model, tokenizer = load(name)
    pairs = questions()
    others = [answer for _, answer in pairs[1:] + pairs[:1]]
    rows = [
        {"prompt": f"{question}\n", "chosen": answer, "rejected": other}
        for (question, answer), other in zip(pairs, others, strict=True)
    ]
    receipt = hotloop.wire(model)
    with TemporaryDirectory() as output:
        trainer = DPOTrainer(
            model,
            args=DPOConfig(
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
