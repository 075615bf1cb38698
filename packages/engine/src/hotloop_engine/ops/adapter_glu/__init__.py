"""The middle of an MLP whose projections have adapters: activation and what the adapters need, one pass each way.

    h = act(gate) ∘ up,  t = h (sA)^T          backward: dgate, dup, and the sums dgate^T t', dup^T t', h^T dt

See derivation.md. A block calls the implementation; by itself it is no differentiable op.
"""
