"""The table of plans in docs/devices.md: Llama's shapes, compiled for chips that are not there.

    python -m benchmarks.plans [ROW …]

Nothing is run. A row takes some minutes on two cores; without numbers all are compiled. It needs
requirements-plan.txt.
"""

from __future__ import annotations

import os
import sys

from rlhf_jax.plan.chips import ENVIRONMENT

LORA = ("--config.adapter.rank=16", "--config.adapter.base=bfloat16")
PARTS = "--config.batch.microbatches"  # where one does not fit
# (variant of experiments/llama.py, what is trained, topology, further flags). Over all chips of a
# v5p slice its compiler makes all-reduces of gathers and reduce-scatters, over a part it does not.
ROWS: list[tuple[str, str, str, tuple[str, ...]]] = [
    ("dpo-8b", "all", "v5p:2x2x2", ("--config.mesh.fsdp=4",)),
    ("dpo-8b", "all", "h100:8", ("--config.mesh.fsdp=8",)),
    ("dpo-8b", "LoRA", "v5e:2x4", ("--config.mesh.fsdp=8", *LORA, f"{PARTS}=4")),
    ("grpo-8b", "all", "v5p:2x2x2", ("--config.mesh.fsdp=4",)),
    ("grpo-8b", "LoRA", "h100:8", ("--config.mesh.fsdp=8", *LORA)),
    ("dpo-70b", "all", "v5p:4x4x4", ("--config.mesh.fsdp=16",)),
    ("dpo-70b", "LoRA", "h100:8", ("--config.mesh.fsdp=8", *LORA, f"{PARTS}=4")),
    ("grpo-70b", "all", "v5p:4x4x4", ("--config.mesh.fsdp=16", "--config.mesh.tensor=4")),
    ("grpo-70b", "LoRA", "h200:8", ("--config.mesh.tensor=8", *LORA)),
]


def line(variant: str, trained: str, topology: str, flags: tuple[str, ...]) -> str:
    """A row of the table."""
    from rlhf_jax.main import parse
    from rlhf_jax.plan.plan import plan

    kernel = "cudnn" if topology[0] in "abh" else "splash"
    flags = (*flags, f"--config.compute.attention={kernel}")
    config, _, stated, _ = parse([f"--config=experiments/llama.py:{variant}", *flags])
    planned = plan(config, stated, topology, search=False)
    worst = max(planned.estimates, key=lambda each: (each.counted is None, each.needed))
    update = planned.estimates[0]
    rates = ["", ""]
    if update.seconds:
        peak = update.step.flops / update.seconds / planned.devices / planned.chip.flops
        rates = [f"{round(update.step.tokens / update.seconds, -2):,.0f}", f"{peak:.0%}"]
    mesh = " ".join(flag.removeprefix("--config.mesh.") for flag in flags if ".mesh." in flag)
    cells = [variant, trained, topology, mesh, *rates]
    cells += [f"{worst.needed / 2**30:.1f} ({worst.step.name})"]
    cells += [f"{planned.chip.memory / 2**30:.1f}", "yes" if planned.fits else "no"]
    return f"| {' | '.join(cells)} |"


def main(argv: list[str]) -> None:
    """Prints the rows of those numbers, or all."""
    chosen = [ROWS[int(i)] for i in argv] or ROWS
    heads = ["config", "trained", "topology", "mesh", "tokens/s of updates", "of the peak"]
    heads += ["GiB a chip", "of", "fits"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in chosen:
        lines.append(line(*row))
    print("\n".join(lines))


if __name__ == "__main__":
    os.environ |= ENVIRONMENT
    main(sys.argv[1:])
