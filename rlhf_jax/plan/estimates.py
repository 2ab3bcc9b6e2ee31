"""What a step takes on a chip: counted in what its compiler made, and estimated from that.

Seconds are estimates. They are the larger of two times, and beside it the bytes that are sent while
nothing else happens:

    max(compute + kernels, what is sent meanwhile / link) + what is sent alone / link
    compute = max(cycles / clock, arguments and results, once a token of decoding, / bandwidth)
    kernels = attention's FLOPs / the chip's, where they are in kernels, which have no cycles

GPU compilers count no cycles: there the FLOPs of all products stand in their place, at the chip's
bfloat16 rate, whatever is computed in.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from rlhf_jax.errors import UserError, lack_of_memory
from rlhf_jax.plan.chips import NETWORK, Chip
from rlhf_jax.plan.compiled_text import Counted, count
from rlhf_jax.plan.steps import Step, device_bytes

# What a TPU's compiler says of a program that is too large: its bytes, arguments among them.
_USED = re.compile(r"(?:Used |\()([\d.]+)([KMG])(?= of [\d.]+[KMG] hbm|\) exceeds available HBM)")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
_KERNELS = re.compile("tpu_custom_call|fmha")


@dataclass(frozen=True)
class Estimate:
    """A step on one chip.

    Attributes:
      step: what was compiled.
      held: kind → bytes of all that lies on the chip meanwhile, "temporaries" among it.
      counted: of the compiled program; None: the compiler refused it, since it does not fit.
      seconds: of a call; None where nothing is known.
    """

    step: Step
    held: dict[str, int]
    counted: Counted | None
    seconds: float | None

    @property
    def needed(self) -> int:
        """Bytes on the chip."""
        return sum(self.held.values())


def estimate(step: Step, chip: Chip, chips: int) -> Estimate:
    """Compiles a step and counts what it takes; UserError where its compiler refuses it."""
    held = {kind: device_bytes(tree) for kind, tree in step.holds.items()}
    try:
        compiled = step.lower().compile()
    except (NotImplementedError, RuntimeError, ValueError) as error:
        used = _USED.search(str(error))
        if used is None and lack_of_memory(error) is None:
            said = " ".join(str(error).split())[:300]
            raise UserError(f"{step.name}: the compiler refuses it: {said}") from error
        total = float(used[1]) * _UNITS[used[2]] if used else 0.0
        held["temporaries"] = max(int(total) - sum(held.values()), 0)
        return Estimate(step, held, None, None)
    memory, counted = compiled.memory_analysis(), count(compiled.as_text(), chips, step.passes)
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    held["temporaries"] = memory.temp_size_in_bytes + results
    moved = (memory.argument_size_in_bytes + memory.output_size_in_bytes) * step.passes
    return Estimate(step, held, counted, _seconds(step, counted, moved, chip))


def _seconds(step: Step, counted: Counted, moved: int, chip: Chip) -> float | None:
    if not chip.flops:
        return None
    busy = counted.cycles / chip.clock if chip.clock else counted.flops / chip.flops
    seconds = max(busy, moved / chip.bandwidth)
    if any(_KERNELS.search(name) for name in counted.kernels):
        seconds += step.attention / chip.flops
    together, alone = (_sending(counted, chip, overlapped=x) for x in (True, False))
    return max(seconds, together) + alone


def _sending(counted: Counted, chip: Chip, *, overlapped: bool) -> float:
    """Seconds that messages take, by the network where cards of several hosts exchange them."""
    sent, far = counted.sent_bytes(overlapped=overlapped), 0.0
    if chip.host:
        far = counted.sent_bytes(overlapped=overlapped, beyond=chip.host)
    return (sent - far) / chip.link + far / NETWORK


def table(estimates: list[Estimate], chip: Chip, chips: int) -> list[str]:
    """Markdown lines: a column a step."""
    rows: list[list[str]] = [["of one chip", *(each.step.name for each in estimates)]]
    rows.append(["---"] * len(rows[0]))

    def row(name: str, values: list[Any]) -> None:
        if any(value not in (None, "") for value in values):
            rows.append([name, *("" if value is None else str(value) for value in values)])

    for kind in dict.fromkeys(kind for each in estimates for kind in each.held):
        row(f"{kind}, GiB", [_gib(each.held.get(kind)) for each in estimates])
    row("of these kept activations, at most", [_gib(each.step.kept) for each in estimates])
    row("of these logits, at most", [_gib(each.step.logits) for each in estimates])
    row(f"all, of {chip.memory / 2**30:.2f} GiB", [_gib(each.needed) for each in estimates])
    counts = [each.counted for each in estimates]
    kinds = dict.fromkeys(kind for each in counts if each for kind in each.collectives)
    for kind in kinds:
        found = [each.collectives.get(kind) if each else None for each in counts]
        row(kind, [f"{n} x, {size / 1e9:.3g} GB" if n else None for n, size in
                   (each or (0, 0) for each in found)])  # fmt: skip
    row("sent while nothing else runs, GB", [
        f"{each.sent_bytes(overlapped=False) / 1e9:.3g}" if each and kinds else None
        for each in counts])  # fmt: skip
    row("kernels", [" ".join(f"{n} {name}" for name, n in each.kernels.items()) if each else None
                    for each in counts])  # fmt: skip
    row("cycles", [f"{each.cycles:.3g}" if each and each.cycles else None for each in counts])
    row("FLOPs of products", [
        f"{each.flops:.3g}" if each and not each.cycles else None for each in counts])  # fmt: skip
    timed = [each.seconds or None for each in estimates]
    row("seconds, estimated", [f"{each:.3g}" if each else None for each in timed])
    row("tokens a second, all chips, estimated", [
        f"{each.step.tokens / t:,.0f}" if t else None
        for each, t in zip(estimates, timed, strict=True)])  # fmt: skip
    row("model FLOP/s of the peak, estimated", [
        f"{each.step.flops / t / chips / chip.flops:.1%}" if t else None
        for each, t in zip(estimates, timed, strict=True)])  # fmt: skip
    row("calls", [f"{each.step.calls:.3g}" for each in estimates])
    return [f"| {' | '.join(cells)} |" for cells in rows]


def _gib(size: int | None) -> str | None:
    return f"{size / 2**30:.3g}" if size else None
