"""The loops of examples/: each trains a wired model as it trains a plain one, and leaves it as it found it."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import hotloop
import pytest
import torch
from accelerate.state import AcceleratorState
from hotloop.wiring import layer, receipt_of
from hotloop_testkit.tiny import tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

EXAMPLES = Path(__file__).parents[1] / "examples"
FOLDER = EXAMPLES / "loops"
LOOPS = sorted(file.stem for file in FOLDER.glob("*.py") if file.stem != "common")
STEPS = 6
TOLERANCE = 2e-4

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore:Upcasting low-precision"),
]

Train = Callable[[str, int], list[float]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama of two layers and its tokenizer, as a folder that transformers loads."""
    directory = tmp_path_factory.mktemp("loops")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer(320).save_pretrained(directory)
    return str(directory)


@pytest.fixture(autouse=True)
def first_accelerator() -> None:
    """accelerate keeps the first Accelerator's precision for the process; a loop runs in a process of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def train_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Train]:
    """The `train` of a loop, as the script itself would find its neighbours."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "common", raising=False)
    return lambda name: runpy.run_path(str(FOLDER / f"{name}.py"))["train"]


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_gives_the_losses_of_the_unwired_model_and_undoes_the_wiring(
    name: str, checkpoint: str, train_of: Callable[[str], Train], monkeypatch: pytest.MonkeyPatch
) -> None:
    own_wire, own_run = hotloop.wire, layer.run_blocks
    wirings, calls = [], []

    def wire(model):
        classes = {module: type(module) for module in model.modules()}
        wirings.append((model, own_wire(model), classes))
        return wirings[0][1]

    def run_blocks(*args, **kwargs):
        calls.append(None)
        return own_run(*args, **kwargs)

    monkeypatch.setattr(hotloop, "wire", lambda _: SimpleNamespace(undo=lambda: None))
    expected = train_of(name)(checkpoint, STEPS)
    monkeypatch.setattr(layer, "run_blocks", run_blocks)
    monkeypatch.setattr(hotloop, "wire", wire)
    found = train_of(name)(checkpoint, STEPS)
    assert len(found) == STEPS and min(found[1:]) < found[0]
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert len(calls) >= 2 * STEPS, "the wired layers did not run"
    ((model, receipt, classes),) = wirings
    assert receipt.undone and receipt_of(model) is None
    assert {module: type(module) for module in classes} == classes


def test_the_readme_of_the_examples_names_every_file() -> None:
    text = (EXAMPLES / "README.md").read_text()
    files = [file for file in EXAMPLES.rglob("*.*") if file.suffix in {".py", ".toml", ".yaml"}]
    assert len(files) > len(LOOPS)
    assert [f.name for f in files if f"({f.relative_to(EXAMPLES)})" not in text] == []


def test_every_loop_is_shown_on_the_page_about_trainers() -> None:
    text = (EXAMPLES.parent / "docs/guide/trainers.md").read_text()
    assert [name for name in LOOPS if f"examples/loops/{name}.py" not in text] == []
