"""Which projection of an MLP is gate, up and down, and what the activation is: whichever product `down` was given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotloop_core.facts import ACTIVATIONS
from torch import Tensor, nn

from .trace import Call, same

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .reading import Reading

FUNCTIONS = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
}


def read_mlp(reading: Reading, mlp: Call) -> None:
    """Gate, up, down and the activation."""
    linears = reading.first.inside(mlp.path, nn.Linear)
    shapes = ", ".join(map(shape_of, linears))
    if len(linears) == 2 and linears[0].result.shape == linears[1].given.shape:
        reading.missing.append(f"an MLP without a gate ({shapes})")
        return
    if len(linears) not in (2, 3):
        reading.missing.append(f"an MLP that is not gate, up and down, but {shapes}")
        return
    *inner, down = linears
    found = next(
        (
            (roles, name)
            for roles, gate, up in _readings(inner)
            for name, function in FUNCTIONS.items()
            if gate.shape == up.shape and same(function(gate) * up, down.given)
        ),
        None,
    )
    norms = [c.path for c in reading.first.norms() if c.path.startswith(f"{mlp.path}.")]
    if norms:
        reading.missing.append(f"a norm inside the MLP ({', '.join(norms)})")
    elif found is None:
        reading.missing.append(
            f"an MLP ({shapes}) that is not act(gate) · up with one of {', '.join(FUNCTIONS)}"
        )
    elif isinstance(found[0], str):
        reading.missing.append(f"{inner[0].path}, whose rows are {found[0]}, not gate, then up")
    else:
        reading.paths |= found[0] | {"down": down.path}
        _name_activation(reading, found[1])


def _readings(inner: list[Call]) -> Iterator[tuple[dict[str, str] | str, Tensor, Tensor]]:
    """(roles, gate, up) for each order of two projections, or of the rows of one; roles a word where it has none."""
    if len(inner) == 2:
        for gate, up in (inner, inner[::-1]):
            yield {"gate": gate.path, "up": up.path}, gate.result, up.result
        return
    (both,) = inner
    first, second = both.result.chunk(2, dim=-1)
    yield {"gate_up": both.path}, first, second
    yield "up, then gate", second, first
    even, odd = both.result[..., ::2], both.result[..., 1::2]
    yield "gate and up by turns", even, odd
    yield "up and gate by turns", odd, even


def _name_activation(reading: Reading, name: str) -> None:
    keys = [k for k, v in reading.config.items() if "act" in k and v in ACTIVATIONS]
    if not keys:
        reading.missing.append(f"an activation {name} that the config does not name")
        return
    reading.keys["activation"] = keys[0]
    called = str(reading.config[keys[0]])
    if ACTIVATIONS[called] != name:
        reading.keys["activations"] = {called: name}


def shape_of(call: Call) -> str:
    """A projection's path and (out_features, in_features)."""
    return f"{call.path} {(call.result.shape[-1], call.given.shape[-1])}"
