"""The two halves of a decoder layer, each with a written-out backward, and the autograd function that runs them."""

from .attend import Attend, AttentionShape
from .attention import AttentionBlock
from .context import BlockContext, NormView, Saved
from .mlp import MlpBlock
from .own import Call, OwnBlock
from .run import Block, Run, Surroundings, run_blocks

__all__ = [
    "Attend",
    "AttentionBlock",
    "AttentionShape",
    "Block",
    "BlockContext",
    "Call",
    "MlpBlock",
    "NormView",
    "OwnBlock",
    "Run",
    "Saved",
    "Surroundings",
    "run_blocks",
]
