"""The middle of an MLP whose projections have adapters: backward makes their gradients' sums in the activation's pass.

    dgate, dup in place, and over the tokens dgate^T t, dup^T t, (act(gate) ∘ up)^T dt

See derivation.md. A block calls the implementation; by itself it is no differentiable op. Forward is `glu`: making
down's adapter input in the same pass was tried (a program that owns rows) and took three times as long as apart.
"""
