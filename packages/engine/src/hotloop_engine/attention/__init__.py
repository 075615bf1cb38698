"""Causal attention over packed or dense batches: one interface, several backends, one choice.

sequences = Sequences.from_position_ids(position_ids_BS)           # once per batch
backend = choose(request(q_THK, k_TGK, sequences), device)
o_THK, lse = backend.forward(q_THK, k_TGK, v_TGK, sequences, scale=K**-0.5)
dq, dk, dv = backend.backward(do_THK, q_THK, k_TGK, v_TGK, o_THK, lse, sequences, scale=K**-0.5)
"""

from .centre import add_centre
from .choice import BackendRow, choose, table
from .interface import Backend, Capability, Gradients, Request, request
from .sequences import Sequences

__all__ = [
    "Backend",
    "BackendRow",
    "Capability",
    "Gradients",
    "Request",
    "Sequences",
    "add_centre",
    "choose",
    "request",
    "table",
]
