"""Writes the README's tables: families from the registry, results from benchmarks/history.

    python docs/tables.py

A test fails while the README has others.
"""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from hotloop_core import Attention, FamilySpec, LayerSpec, discover

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def families() -> str:
    """One line for each family of this repository that is installed."""
    lines = ["| family | install | models | what its layers have |", "|---|---|---|---|"]
    ours = {file.parent.name for file in ROOT.glob("plugins/*/pyproject.toml")}
    for plugin in discover().plugins:
        if plugin.name not in ours:
            continue
        for family in plugin.families:
            lines.append(
                f"| {family.name} | `hotloop[{plugin.name}]` | {', '.join(family.examples)} "
                f"| {', '.join(_features(family))} |"
            )
    return "\n".join(lines)


def _features(family: FamilySpec) -> list[str]:
    if not isinstance(family.layer, LayerSpec):
        return ["layers of several kinds"]
    norms, attention, keys = family.layer.norms, family.layer.attention, family.keys
    has = {
        "LayerNorm": norms.kind == "layer",
        "RMSNorm": norms.kind == "rms",
        "norms after the blocks": norms.after_attention is not None,
        "sliding window": keys.window is not None,
        "multipliers": keys.residual_scale is not None or keys.logit_divisor is not None,
        "soft caps": keys.attention_softcap is not None or keys.logit_softcap is not None,
    }
    if isinstance(attention, Attention):
        has["q/k norms"] = attention.q_norm is not None
        has["fused projections"] = (
            attention.qkv is not None or "gate_up" in family.layer.projections
        )
        has["biases in q, k, v"] = attention.qkv_bias is True
        has["biases where the config says so"] = isinstance(attention.qkv_bias, str)
    return [name for name, there in has.items() if there]


def results() -> str:
    """The yardstick's lines in which Hotloop stands beside others; docs/results.md has all."""
    module = runpy.run_path(str(ROOT / "benchmarks" / "results.py"))
    rows = [row for row in module["read"]() if row["framework"] != "hotloop-bnb"]
    return module["table"](rows, compared=True)


def rewritten(text: str) -> str:
    """`text` with what stands between its markers made anew."""
    for name, make in (("families", families), ("results", results)):
        text = re.sub(
            rf"<!-- {name} -->\n.*?<!-- /{name} -->",
            f"<!-- {name} -->\n{make()}\n<!-- /{name} -->",
            text,
            flags=re.DOTALL,
        )
    return text


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text(encoding="utf-8")), encoding="utf-8")
