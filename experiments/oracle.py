"""Every algorithm on the world enum-121, whose optimum is known; on a 2-core CPU.

python -m rlhf_jax.main --config=experiments/oracle.py
    all of them
… --config.oracle.rows=ppo,grpo
    some of them
"""

from rlhf_jax.stages import defaults


def get_config():
    return defaults.base("oracle")
