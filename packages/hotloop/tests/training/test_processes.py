"""Two real processes (gloo, CPU) train as one: every row once an epoch, and a resumed run as if it had not stopped."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
from hotloop.training.batches import PackedDataset, PackedSampler
from hotloop.training.recipe import Recipe, make_recipe
from hotloop.training.run import Run
from hotloop.training.trainer import PackedTrainer

if TYPE_CHECKING:
    from collections.abc import Sequence

RANKS = 2
WORKER = """
import json, sys
from hotloop.training.recipe import make_recipe
from hotloop.training.run import Run, WatchedTrainer
from transformers import Trainer, TrainerCallback

class Stop(Exception):
    pass

class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Stop

seen = []
step = WatchedTrainer.training_step

def recorded(self, model, inputs, num_items_in_batch=None):
    starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
    borders = [*starts, inputs["input_ids"].shape[1]]
    ids = inputs["input_ids"][0].tolist()
    rows = [ids[a:b] for a, b in zip(borders, borders[1:])]
    seen.append({"epoch": int(self.state.epoch or 0), "step": self.state.global_step, "rows": rows})
    return step(self, model, inputs, num_items_in_batch)

WatchedTrainer.training_step = recorded
results = []
for job in json.load(open(sys.argv[1])):
    seen.clear()
    with Run(make_recipe(job["recipe"]), resume=job["resume"]) as run:
        plain = Trainer.train
        def train(self, **arguments):
            if job["stop"]:
                callback = StopAt()
                callback.step = job["stop"]
                self.add_callback(callback)
            return plain(self, **arguments)
        WatchedTrainer.train = train
        try:
            report = run.train()
        except Stop:
            report = None
    results.append({"seen": list(seen), "bins": len(run.bins),
                    "tokens": report and report.tokens, "held_out": report and report.held_out_after})
json.dump(results, open(sys.argv[2], "w"))
"""


def train_together(jobs: Sequence[dict[str, Any]], folder: Path) -> list[list[dict[str, Any]]]:
    """Runs the jobs one after another on two processes; returns what each rank saw of each."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "worker.py").write_text(WORKER)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS)}
    workers = []
    for rank in range(RANKS):
        where = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        workers.append(
            subprocess.Popen(
                [sys.executable, "worker.py", "jobs.json", f"rank{rank}.json"],
                cwd=folder,
                env={**os.environ, **shared, **where, "CUDA_VISIBLE_DEVICES": ""},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        said = [worker.communicate(timeout=900)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert all(worker.returncode == 0 for worker in workers), "\n".join(said)[-6000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


def job(
    recipe: Recipe, name: str, *, stop: int | None = None, resume: bool = False, dropout: float
) -> dict[str, Any]:
    values = recipe.model_dump(mode="json")
    values["output"]["directory"] = str(Path(recipe.output.directory).parent / name)
    values["lora"]["dropout"] = dropout
    values["model"]["max_seq_len"] = 512
    return {"recipe": values, "stop": stop, "resume": resume}


def adapter(done: dict[str, Any]) -> dict[str, torch.Tensor]:
    folder = Path(done["recipe"]["output"]["directory"]) / "adapter"
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_processes_see_every_row_once_and_resume_in_the_middle_of_an_epoch(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [
        job(recipe, "whole", dropout=0.1),
        job(recipe, "parted", stop=11, dropout=0.1),
        job(recipe, "parted", resume=True, dropout=0.1),
        job(recipe, "exact", dropout=0.0),
    ]
    ranks = train_together(jobs, tmp_path)
    whole, parted, resumed, exact = zip(*ranks, strict=True)

    # Every epoch, the two saw every row once, in as many steps each.
    bins = whole[0]["bins"]
    assert bins == 12  # so 12 steps are two epochs, and 10 lies in the middle of the second
    first = [one["seen"][: bins // RANKS] for one in whole]
    second = [one["seen"][bins // RANKS : 2 * (bins // RANKS)] for one in whole]
    rows = [
        [row for rank in epoch for step in rank for row in step["rows"]]
        for epoch in (first, second)
    ]
    with Run(
        make_recipe(jobs[0]["recipe"] | {"output": {"directory": str(tmp_path / "x")}})
    ) as run:
        expected = sorted(row.ids.tolist() for row in run.data.train)
    assert sorted(rows[0]) == sorted(rows[1]) == expected
    assert rows[0] != rows[1]
    assert [len(one["seen"]) for one in whole] == [12, 12]
    assert whole[0]["tokens"] == whole[1]["tokens"]
    assert whole[0]["held_out"] == whole[1]["held_out"]

    # Stopped at step 11 and resumed from the checkpoint of step 10: the same bins, the same bits.
    for before, after, straight in zip(parted, resumed, whole, strict=True):
        assert before["seen"] == straight["seen"][:11]
        assert after["seen"] == straight["seen"][10:]
    one, other = adapter(jobs[0]), adapter(jobs[2])
    assert all(torch.equal(one[name], other[name]) for name in one)

    # Without dropout, the same training as one process that takes both shares of a step in turn.
    values = {**jobs[3]["recipe"], "output": {"directory": str(tmp_path / "alone")}}
    values["schedule"] = {**values["schedule"], "gradient_accumulation": RANKS}
    alone = make_recipe(values)
    monkeypatch.setattr(
        PackedTrainer, "_get_train_sampler", lambda self, *_: PackedSampler(run.bins, ranks=RANKS)
    )
    with Run(alone) as run:
        run.bins = PackedDataset(run.data.train, capacity=512, divisible_by=RANKS)
        report = run.train()
    assert report.tokens == exact[0]["tokens"]
    assert report.held_out_after == pytest.approx(exact[0]["held_out"], rel=1e-4)
    found = safetensors.torch.load_file(
        tmp_path / "alone" / "adapter" / "adapter_model.safetensors"
    )
    together = adapter(jobs[3])
    for name, value in found.items():
        torch.testing.assert_close(together[name], value, rtol=1e-3, atol=2e-4)
