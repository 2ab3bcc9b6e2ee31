"""Text from a model: token samplers and an engine that decodes many completions in slots."""

from rlhf_jax.sampling.generate import Completion, generate

__all__ = ["Completion", "generate"]
