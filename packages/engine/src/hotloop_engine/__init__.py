"""Hand-derived forward and backward passes: ops, blocks, attention, losses and stores."""
