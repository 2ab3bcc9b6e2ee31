"""Text from a model: token samplers and a compiled generator with a key-value cache."""

from rlhf_jax.sampling.generate import Completion, generate

__all__ = ["Completion", "generate"]
