"""What the documentation says is so: its Python runs, its commands and recipes parse, its tables are current."""

from __future__ import annotations

import inspect
import json
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hotloop.cli import app
from hotloop.training.recipe import make_recipe
from hotloop_core.hooks import HOOK_NAMES, Hooks
from typer.main import get_command

sybil = pytest.importorskip("sybil", reason="needs the docs group: sybil")
from sybil.parsers.myst import PythonCodeBlockParser  # noqa: E402 - only where sybil is

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_PYTHON = [page for page in PAGES if "```python" in page.read_text()]
MODEL = "meta-llama/Llama-3.2-1B-Instruct"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama under the name that the pages use; a folder of that name goes before the hub."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["What does a planner do? It plans."] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHATML
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16384,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    directory = tmp_path_factory.mktemp("pages") / MODEL
    LlamaForCausalLM(config).save_pretrained(directory)
    fast.save_pretrained(directory)
    return directory


@pytest.fixture
def workplace(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages' code expects to find in it."""
    (tmp_path / MODEL).parent.mkdir(parents=True)
    (tmp_path / MODEL).symlink_to(model, target_is_directory=True)
    row = {
        "messages": [
            {"role": "user", "content": "What does a planner do?"},
            {"role": "assistant", "content": "It plans."},
        ]
    }
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 24)
    monkeypatch.chdir(tmp_path)
    if (
        not torch.cuda.is_available()
    ):  # TRL asks for bf16, which transformers grants a CPU only if use_cpu is set
        monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    return tmp_path


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")  # Trainer's default, on a CPU
@pytest.mark.parametrize("page", WITH_PYTHON, ids=named)
def test_its_python_runs(
    page: Path,
    workplace: Path,
    project_of: Callable[[Path, Path], list[Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for file in project_of(page, workplace):
        if "src" in file.parts:
            monkeypatch.syspath_prepend(str(file.parents[1]))
    document = sybil.Sybil(parsers=[PythonCodeBlockParser()], filenames=[page.name]).parse(page)
    examples = list(document.examples())
    assert len(examples) == len(blocks(page, "python"))
    before = set(sys.modules)
    for example in examples:
        example.evaluate()
    for name in set(sys.modules) - before:
        if name.startswith(
            ("hotloop_ernie", "hotloop_aten", "hotloop_npy", "hotloop_arcee", "hotloop_lean")
        ):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_its_commands_exist_with_these_options(page: Path) -> None:
    for line in "\n".join(blocks(page, "sh")).splitlines():
        words = shlex.split(line, comments=True)
        if "hotloop" not in words or words[:2] == ["uv", "add"]:
            continue
        name, *arguments = words[words.index("hotloop") + 1 :]
        command = get_command(app).commands[name]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in arguments if word.startswith("--")} <= known, line


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_its_recipes_are_accepted(page: Path) -> None:
    for block in blocks(page, "toml"):
        values = tomllib.loads(block)
        if "schedule" in values:
            make_recipe(values)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_its_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", prose)
    assert [t for t in targets if not (page.parent / t).exists()] == []


@pytest.mark.parametrize("name", HOOK_NAMES)
def test_each_hook_is_documented_with_its_exact_signature(name: str) -> None:
    signature = f"@hookimpl\ndef {name}{inspect.signature(getattr(Hooks, name))}:".replace(
        "(self)", "()"
    )
    signature = signature.replace("'", "")
    assert any(signature in page.read_text() for page in PAGES if page.name.startswith("write-"))
    assert signature in (ROOT / "docs/reference/core.md").read_text()


def test_every_command_is_in_the_reference_with_its_summary() -> None:
    text = (ROOT / "docs/reference/cli.md").read_text()
    for name, command in get_command(app).commands.items():
        summary = (command.help or "").split(". ")[0].split("\n")[0].rstrip(".")
        assert f"| `hotloop {name}` | {summary}" in text


def test_the_tables_of_the_readme_are_current() -> None:
    tables = runpy.run_path(str(ROOT / "docs" / "tables.py"))
    readme = (ROOT / "README.md").read_text()
    assert tables["rewritten"](readme) == readme, "run `uv run python docs/tables.py`"


def test_contributing_prints_every_task() -> None:
    justfile = (ROOT / "justfile").read_text()
    text = (ROOT / "CONTRIBUTING.md").read_text()
    tasks = re.findall(r"^([\w-]+):\n    (.+)$", justfile, re.MULTILINE)
    assert 0 < len(tasks) <= 8
    for name, command in tasks:
        assert f"| `just {name}` | `{command}` |" in text
