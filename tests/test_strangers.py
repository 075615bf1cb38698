"""The promise to third parties: the packages of the documentation, built and installed as a stranger would."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

Install = Callable[..., Path]
Run = Callable[..., subprocess.CompletedProcess[str]]
DOCS = Path(__file__).parents[1] / "docs"
RELEASED = ("hotloop-llama", "hotloop-safetensors")
PAGES = {
    "hotloop-ernie": "write-a-family.md",
    "hotloop-npy": "write-an-exporter.md",
    "hotloop-aten": "write-an-op.md",
    "hotloop-arcee": "write-a-block.md",
}

TRAIN_AND_EXPORT = """
import sys
import numpy, torch
import hotloop
from hotloop.wiring import receipt_of
from hotloop_testkit.tiny import tokenizer
from transformers import Ernie4_5Config, Ernie4_5ForCausalLM

torch.manual_seed(0)
config = Ernie4_5Config(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=32,
                        num_key_value_heads=2, vocab_size=320, max_position_embeddings=256, use_bias=True)
Ernie4_5ForCausalLM(config).save_pretrained("tiny")
tokenizer(320).save_pretrained("tiny")
model, words = hotloop.load("tiny", bits=16, max_seq_len=64)
model = hotloop.add_lora(model, r=4)
assert receipt_of(model).family.name == "ernie4_5"
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
ids = torch.randint(320, (2, 32))
losses = []
for _ in range(8):
    loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0] - 0.05, losses
hotloop.export(model, words, "arrays", format="npy")
merged = model.merge_and_unload()
expected = merged.model.layers[0].self_attn.q_proj.weight.detach().numpy()
found = numpy.load("arrays/model.layers.0.self_attn.q_proj.weight.npy")
numpy.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
"""


@pytest.fixture(scope="module")
def projects(
    project_of: Callable[[Path, Path], list[Path]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("strangers")
    for page in PAGES.values():
        assert project_of(DOCS / page, folder)
    return folder


@pytest.fixture(scope="module")
def python(install: Install, projects: Path) -> Path:
    """An environment with Hotloop's wheels and the strangers' packages."""
    return install("hotloop", "hotloop-testkit", *RELEASED, *(projects / name for name in PAGES))


def test_hotloop_lists_their_packages(python: Path, run: Run) -> None:
    listed = run(python.parent / "hotloop", "plugins", "--json")
    assert listed.returncode == 0, listed.stderr
    found = {plugin["distribution"]: plugin["problem"] for plugin in json.loads(listed.stdout)}
    assert found == dict.fromkeys([*RELEASED, *PAGES])


@pytest.mark.parametrize("name", PAGES)
def test_their_conformance_tests_pass(name: str, python: Path, projects: Path, run: Run) -> None:
    done = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", projects / name / "tests")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_a_model_of_their_family_trains_and_their_format_holds_it(python: Path, run: Run) -> None:
    done = run(python, "-c", TRAIN_AND_EXPORT)
    assert done.returncode == 0, done.stderr[-4000:]


TRAIN_WITH_THEIR_OP = """
import sys
import torch
import hotloop
from hotloop_core.errors import NoImplementationError
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=320)
model = LlamaForCausalLM(config)
ids = torch.randint(320, (2, 32))
model(input_ids=ids, labels=ids).loss.backward()
expected = {name: p.grad.clone() for name, p in model.named_parameters()}
model.zero_grad()
receipt = hotloop.wire(model, ops={"glu": "aten"})
assert "hotloop_aten.glu" not in sys.modules
model(input_ids=ids, labels=ids).loss.backward()
assert "hotloop_aten.glu" in sys.modules
for name, p in model.named_parameters():
    torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=1e-6, msg=name)
receipt.undo()
try:
    hotloop.wire(model, ops={"glu": "eten"})
    model(input_ids=ids, labels=ids)
except NoImplementationError as error:
    assert "aten (on cpu, cuda)" in str(error)
else:
    raise AssertionError("a name that nobody offers was taken")
"""


def test_a_model_trains_with_their_op(python: Path, run: Run) -> None:
    done = run(python, "-c", TRAIN_WITH_THEIR_OP)
    assert done.returncode == 0, done.stderr[-4000:]


TRAIN_WITH_THEIR_BLOCK = """
import sys
import torch
import hotloop
from hotloop.wiring import receipt_of
from hotloop_testkit.tiny import tokenizer
from transformers import ArceeConfig, ArceeForCausalLM

torch.manual_seed(0)
config = ArceeConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=32,
                     num_key_value_heads=2, vocab_size=320, max_position_embeddings=256)
ArceeForCausalLM(config).save_pretrained("tiny")
tokenizer(320).save_pretrained("tiny")
model, words = hotloop.load("tiny", bits=16, max_seq_len=64)
model = hotloop.add_lora(model, r=4)
assert "hotloop_arcee.mlp" not in sys.modules
ids = torch.randint(320, (2, 32))
model.train()(input_ids=ids, labels=ids).loss.backward()
assert "hotloop_arcee.mlp" in sys.modules
found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
assert any("mlp.up_proj.lora_B" in name for name in found), found.keys()
model.zero_grad()
receipt_of(model).undo()
model(input_ids=ids, labels=ids).loss.backward()
for name, p in model.named_parameters():
    if p.grad is not None:
        torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-6, msg=name)
"""


def test_a_model_trains_with_their_block(python: Path, run: Run) -> None:
    done = run(python, "-c", TRAIN_WITH_THEIR_BLOCK)
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_family_is_drafted_where_nothing_but_wheels_is_installed(
    python: Path, run: Run, tmp_path: Path
) -> None:
    command = (python.parent / "hotloop", "new-family", "seed_oss", "--output", tmp_path / "draft")
    done = run(*command, "--json")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert json.loads(done.stdout)["kit"]["failures"] == {}


OLD_SPEC = """
import dataclasses
from hotloop_core import API, hookimpl
from hotloop_ernie import ERNIE

@hookimpl
def hotloop_families():
    return [dataclasses.replace(ERNIE, api=API + {offset}, name="other", model_types=frozenset({{"other"}}))]
"""


@pytest.mark.parametrize("offset, upgrade", [(1, "hotloop-core"), (-2, "hotloop-other")])
def test_a_plugin_of_another_version_is_listed_with_the_upgrade_and_disturbs_nothing(
    offset: int, upgrade: str, python: Path, run: Run
) -> None:
    (site,) = python.parents[1].glob("lib/python*/site-packages")
    module, metadata = site / "hotloop_other.py", site / "hotloop_other-0.1.0.dist-info"
    module.write_text(OLD_SPEC.format(offset=offset))
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: hotloop-other\nVersion: 0.1.0\n"
    )
    (metadata / "entry_points.txt").write_text("[hotloop]\nother = hotloop_other\n")
    try:
        listed = run(python.parent / "hotloop", "plugins", "--json")
    finally:
        module.unlink()
        shutil.rmtree(metadata)
    assert listed.returncode == 0, listed.stderr
    problems = {plugin["name"]: plugin["problem"] for plugin in json.loads(listed.stdout)}
    assert "is written for api" in problems.pop("other")
    assert f"uv add --upgrade {upgrade}" in listed.stdout
    assert set(problems.values()) == {None}
