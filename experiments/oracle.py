"""Every algorithm on the world enum-121, whose optimum is known; on a 2-core CPU.

python -m rlhf_jax.main --config=experiments/oracle.py
    all of them
… --config.oracle.rows=ppo,grpo
    some of them
"""

from rlhf_jax.stages import defaults


def get_config():
    return defaults.base(
        "oracle",
        data={"train": "", "validation": ""},
        oracle={
            "rows": "",  # names of stages/oracle_rows.py, separated by commas; none: all
            "table_steps": 350,
            "transformer_steps": 60,
            "preference_steps": 600,
            "threads": 2,  # rows at a time
        },
    )
