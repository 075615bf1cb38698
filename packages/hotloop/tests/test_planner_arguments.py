"""What `plan` is asked that cannot be is refused with what can."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path

import pytest
from hotloop.planner import plan
from hotloop_core.errors import ConfigError

LLAMA_8B = run_path(str(Path(__file__).parents[3] / "docs" / "fit.py"))["SHAPES"]["llama3-8b"]


def h100(config=LLAMA_8B, **options):
    return plan(config, **{"tokens": 4096, "lora": 16, "card": "H100", **options})


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 0},
        {"tokens": 10, "longest": 11},
        {"bits": 8},
        {"bits": 4, "full_finetuning": True},
        {"optimizer": "magic"},
        {"lora": 0},
        {"lora": {"router": 8}},
        {"vram": "much"},
        {"vram": -1},
        {"host": "little"},
    ],
)
def test_arguments_that_cannot_be_are_refused(options):
    with pytest.raises(ConfigError):
        h100(**options)


@pytest.mark.parametrize(
    "options",
    [
        *({"tokens": n} for n in ("4096", 1.5, True, None, 2**40)),
        *({"longest": n} for n in (0, 4097, "x")),
        *({"lora": rank} for rank in ("16", 1.5, True, [16], {"q": 1.5})),
        *({"lora": rank} for rank in (10**9, 10**30)),
        {"lora": 8, "bits": 16, "full_finetuning": True},
        {"dtype": "int8"},
        {"placements": ["keep"]},
        {"card": 5},
        {"card": "24GiB,165TFLOP/s,1008GB/s,0GB/s"},
    ],
)
def test_what_cannot_be_is_refused_with_what_can(options):
    with pytest.raises(ConfigError, match=r"expected|pass one"):
        h100(**options)


@pytest.mark.parametrize("source", [None, [], 5])
def test_what_is_no_model_is_refused(source):
    with pytest.raises(ConfigError, match=f"found {type(source).__name__}; expected a model"):
        h100(source)
