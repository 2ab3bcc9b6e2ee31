"""All that a stage can be told."""

from ml_collections import ConfigDict

from rlhf_jax.config import document
from rlhf_jax.stages.defaults import base, resolve


def fields_of(stage: str) -> ConfigDict:
    """A config with every field that a stage reads by default."""
    return ConfigDict(document(resolve(base(stage))))
