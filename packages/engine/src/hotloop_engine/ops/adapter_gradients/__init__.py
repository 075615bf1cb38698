"""Gradients of a group's adapters: dB = dy^T t and dA = s (r ∘ dt)^T x ∘ c, summed over tokens. See derivation.md."""
