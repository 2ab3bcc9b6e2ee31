"""The command line without what follows training: the last answers and the report."""

import sys

from rlhf_jax import main
from rlhf_jax.stages import chain, preference, sampled, sft
from rlhf_jax.stopping import listen

if __name__ == "__main__":
    for stage in (sft, preference, sampled):
        stage.evaluate_chat = lambda *_, **__: {}
    chain.write_report = lambda *_: None
    listen()
    sys.exit(main.main())
