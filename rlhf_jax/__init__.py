"""rlhf_jax: from raw text to an aligned language model, in JAX."""

__version__ = "0.1.0"
