"""The two halves of a decoder layer, each with a written-out backward, and the autograd function that runs them."""

from .attention import AttentionBlock, AttentionShape
from .context import BlockContext, NormView, Saved
from .mlp import MlpBlock
from .run import Block, Run, Surroundings, run_blocks

__all__ = [
    "AttentionBlock",
    "AttentionShape",
    "Block",
    "BlockContext",
    "MlpBlock",
    "NormView",
    "Run",
    "Saved",
    "Surroundings",
    "run_blocks",
]
