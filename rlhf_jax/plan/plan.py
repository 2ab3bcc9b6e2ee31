"""The plan of a config: its steps on a topology, whether they fit, and what would make them fit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from rlhf_jax.config import Config
from rlhf_jax.devices import planning_for, training_devices
from rlhf_jax.errors import UserError
from rlhf_jax.plan.chips import Chip, devices_of
from rlhf_jax.plan.estimates import Estimate, estimate, table
from rlhf_jax.plan.steps import device_bytes, steps_of
from rlhf_jax.stages.checks import check_devices
from rlhf_jax.stages.defaults import STAGES, resolve, unknown_field
from rlhf_jax.stages.memory import smaller_fields

COMPILES = 12  # of a search
REMATS = ("none", "dots", "full")


@dataclass(frozen=True)
class Planned:
    """What a plan found: the steps, the update first, on so many devices of a kind."""

    estimates: list[Estimate]
    chip: Chip
    devices: int

    @property
    def fits(self) -> bool:
        """Whether every step does."""
        return all(_fits(each, self.chip) for each in self.estimates)


def plan(given: ConfigDict, stated: Sequence[str], topology: str, *, search: bool) -> Planned:
    """Prints and returns what a config's steps take on a topology.

    Args:
      given, stated: as for `chain.run`.
      search: tries other settings before, for the fastest that fits.

    Raises:
      UserError: a mistake in the config or the topology.
    """
    if given.get("stage") not in STAGES:
        raise UserError(f"config.stage = {given.get('stage')!r}: choose one of {', '.join(STAGES)}")
    for name in stated:
        if line := unknown_field(given.stage, name):
            raise UserError(f"in the command line: {line}")
    chip, devices = devices_of(topology)
    with planning_for(devices):
        if search:
            given = _search(given, chip)
        config = resolve(given)
        check_devices(config)
        steps = steps_of(config)
        print(f"compiling: {', '.join(step.name for step in steps)}", flush=True)
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 2)) as pool:  # gigabytes each
            estimates = [*pool.map(lambda step: estimate(step, chip, len(devices)), steps)]
    for line in (*table(estimates, chip, len(devices)), *_hour(config, estimates, chip)):
        print(line)
    worst = max(estimates, key=lambda each: (each.counted is None, each.needed))
    used = f"{worst.step.name} needs {worst.needed / 2**30:.2f} of {chip.memory / 2**30:.2f} GiB"
    planned = Planned(estimates, chip, len(devices))
    if planned.fits:
        print(f"fits {topology}: {used}")
        return planned
    fields = "; ".join([*smaller_fields(given), *_further(config, len(devices))])
    tries = "" if search else "; --search tries some of them"
    print(f"does not fit {topology}: {used}. Less is needed with {fields}{tries}")
    return planned


def _fits(each: Estimate, chip: Chip) -> bool:
    return each.counted is not None and each.needed <= chip.memory


def _further(config: Config, devices: int) -> Iterator[str]:
    """Fields beside the stage's own that lower what a device holds."""
    most = devices // config.mesh.tensor
    if config.mesh.fsdp < most:
        yield f"a larger --config.mesh.fsdp (now {config.mesh.fsdp}, at most {most})"
    if config.adapter is not None and not config.adapter.rank:
        yield "--config.adapter.rank=16, --config.adapter.base=bfloat16"
    if config.compute is not None and config.compute.compute_dtype != "bfloat16":
        yield "--config.compute.compute_dtype=bfloat16"


def _hour(config: Config, estimates: list[Estimate], chip: Chip) -> Iterator[str]:
    """What an hour brings, where the time is estimated."""
    taken = [each.seconds * each.step.calls for each in estimates if each.seconds]
    if len(taken) < len(estimates):
        return
    update, seconds = estimates[0], taken[0]
    how = "" if chip.clock else "; of GPUs at most, by a roofline: their compiler counts no cycles"
    yield f"estimates, compiled and never run{how}:"
    if config.stage in ("policy", "online_preference"):
        answers = config.rollout.prompts * config.rollout.samples
        yield f"  an iteration takes {sum(taken):.3g} s"
        yield f"  an hour: {answers * 3600 / sum(taken):,.0f} answers sampled and trained on"
        return
    yield f"  an hour: {update.step.tokens * 3600 / seconds:,.0f} tokens trained on"
    if config.stage in ("preference", "reward"):
        pairs = config.batch.rows * 3600 / seconds
        yield f"  or {pairs:,.0f} pairs of {config.data.row_length} tokens"


def _changed(given: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A copy of a config with fields changed by their dotted names."""
    changed = ConfigDict(given.to_dict())
    changed.update_from_flattened_dict(changes)
    return changed


class _Search:
    """Compiles the update under one change of a config after the other, and keeps what fits."""

    def __init__(self, given: ConfigDict, chip: Chip):
        self.given, self.chip, self.devices = given, chip, len(training_devices())
        self.compiled = 0
        self.found: list[tuple[float, str, ConfigDict]] = []  # seconds, changes, what they make

    @property
    def best(self) -> tuple[float, str, ConfigDict]:
        """The fastest of what fits."""
        return min(self.found, key=lambda each: each[0])

    def fits(self, changes: Mapping[str, Any]) -> bool:
        """Whether the update fits under changes of fields by their dotted names; says so."""
        changed = _changed(self.given, changes)
        said = " ".join(f"--config.{name}={value}" for name, value in changes.items())
        if self.compiled == COMPILES:
            return False
        try:
            config = resolve(changed)
            check_devices(config)
            step = steps_of(config)[0]
        except UserError as error:
            print(f"   {said}: {error}", flush=True)
            return False
        if sum(map(device_bytes, step.holds.values())) > self.chip.memory:
            print(f"   {said}: parameters and optimizer alone do not fit", flush=True)
            return False
        self.compiled += 1
        update = estimate(step, self.chip, self.devices)
        fits = _fits(update, self.chip)
        compute = changed.get("compute") or changed.model
        # Where no seconds are known, parts cost more than what is computed again.
        order = 4.0 * changed.batch.microbatches + REMATS.index(compute.remat)
        if fits:
            self.found.append((update.seconds or order, said, changed))
        taken = f", {update.seconds:.3g} s estimated" if update.seconds else ""
        print(f"{self.compiled:2} {said}: {update.needed / 2**30:.2f} GiB, "
              f"{'fits' if fits else 'does not fit'}{taken}", flush=True)  # fmt: skip
        return fits


def _search(given: ConfigDict, chip: Chip) -> ConfigDict:
    """The config with the settings under which its update fits and is fastest by the estimates.

    They change nothing of what is trained: how many devices share the parameters, in how many
    parts a batch goes, and what is recomputed. Only if the least of these does not fit, others do.

    Raises:
      UserError: rows or a kernel that the devices refuse, whatever these are.
    """
    search, mesh, rows = _Search(given, chip), given.mesh, given.batch.rows
    where = "model" if given.stage == "pretrain" else "compute"
    whole = max(1, search.devices // mesh.tensor)
    check_devices(resolve(_changed(given, {"mesh.fsdp": whole, "batch.microbatches": 1})))
    parts = [k for k in range(1, rows // whole + 1) if rows % (whole * k) == 0] or [1]
    least: dict[str, Any] = {"mesh.fsdp": whole, "batch.microbatches": parts[-1]}
    least[f"{where}.remat"] = "full"
    further: list[dict[str, Any]] = [{}, {f"{where}.compute_dtype": "bfloat16"}]
    if where == "compute":
        further.append({"adapter.rank": 16, "adapter.base": "bfloat16"})
    further.append({"batch.rows": whole, "batch.microbatches": 1})
    for change in further:
        least |= change
        if search.fits(least):
            break
    if change is further[0]:
        for fsdp in dict.fromkeys((mesh.fsdp, whole)):
            if fsdp != whole and not search.fits(least | {"mesh.fsdp": fsdp}):
                continue
            remats: tuple[str, ...] = REMATS
            for count in parts:
                for i, remat in enumerate(remats):
                    changes = {"mesh.fsdp": fsdp, "batch.microbatches": count}
                    if search.fits(changes | {f"{where}.remat": remat}):
                        remats = remats[:i]  # in more parts only less recomputing can be faster
                        break
        _share_less(search, where)
    if not search.found:
        print("nothing that was tried fits")
        return given
    _, said, best = search.best
    print(f"the fastest that fits: {said}", flush=True)
    return best


def _share_less(search: _Search, where: str) -> None:
    """Tries half as many devices to share the parameters, again while that fits and is faster."""
    while search.found:
        _, _, best = search.best
        fsdp, odd = divmod(best.mesh.fsdp, 2)
        if odd:
            return
        changes = {"mesh.fsdp": fsdp, "batch.microbatches": best.batch.microbatches}
        changes[f"{where}.remat"] = best[where].remat
        if not search.fits(changes) or search.best[2] is best:
            return
