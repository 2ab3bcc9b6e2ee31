"""The one layout of on-policy training: N sampled answers as arrays, and the rows that hold them.

Arrays are [N, T]: N sampled sequences, those to a prompt together, and T response slots. A model
reads packed rows, R of them with S sequences each. `to_rows` and `from_rows` move values between
[N, …] and [R, S, …] on the host; `select` takes what a model says of a row's targets to sequences.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data.batches import pad_rows
from rlhf_jax.data.packing import Arrays, Group, pack_groups
from rlhf_jax.environments.trajectories import Trajectory
from rlhf_jax.errors import UserError
from rlhf_jax.sampling.generate import Completion
from rlhf_jax.tasks.prompts import PromptSet

SHORTEST = 16  # tokens per sequence: a row has places for no more of them than fit at that length
Array = Any  # on the host or a device


_OF_ANSWERS = ("mask", "behaviour_logprobs", "finished", "scores", "weights")  # sampled, scored
_OF_TRAJECTORIES = ("turn_rewards", "extents")
_OF_PROMPTS = ("greedy_scores", "greedy_costs")
_ARRAYS = (
    *(*_OF_ANSWERS, *_OF_TRAJECTORIES, "drawn", *_OF_PROMPTS),
    *("old_logprobs", "ref_logprobs", "entropy"),
    *("charges", "old_values", "last_values", "advantages", "returns"),
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=_ARRAYS,
    meta_fields=(),
    drop_fields=("prompts", "completions", "texts", "trajectories", "rows", "metrics"),
)
@dataclass(frozen=True)
class Rollout:
    """N answers to P prompts, G each, from the engine to the update; None where not yet known.

    JAX sees its arrays alone: what is compiled finds the other fields empty.

    Attributes:
      mask: f32 [N, T], 1 on response tokens, EOS included; 0 on what an environment answered,
        unless that is trained too.
      behaviour_logprobs: f32 [N, T] nats, as the sampler said.
      finished: bool [N], ended by itself.
      scores, weights: [N], of the scorers; weight 0 leaves a sequence out.
      charges: [N] in units of the scores, λ·cost, which training takes off them; None without a
        limit on a cost.
      turn_rewards: f32 [N, T], None without an environment: its rewards of all turns but the last
        one, each on its turn's last token. They are part of the score.
      extents: f32 [N] tokens, None without an environment: of the whole trajectory, what was
        answered included, also the answer for which the limit left no room.
      drawn: f32 [N, T], 1 on what was sampled, where the mask has other tokens too; else None.
      greedy_scores, greedy_costs: [P], of the greedy answers, ReMax's baseline; zeros for other
        algorithms, and where there is no cost. Training takes λ·cost off these scores too, but not
        off one that is replaced since its answer was cut off: that costs 0.
      old_logprobs, ref_logprobs, entropy: f32 [N, T] nats, of the policy before the first update
        and of the reference, by the function that trains.
      old_values, last_values: f32 [N, T] and [N], the critic's, before each token and after the
        last one.
      advantages, returns: f32 [N, T].
      prompts, completions, texts: P, N and N of them; an oracle's table has none. The text of an
        answer in several turns is that of its last one.
      trajectories: N, what the environment made of the answers, if there is one.
      rows: arrays [R, …] that a model reads, and of every row its S sequences: members [R, S]
        int32, the sequence's index or −1; slots [R, S, T] int32, the place of its token t among
        the row's M targets; mask [R, S, T].
      metrics: of the rollout, numbers by name.
    """

    mask: Array
    behaviour_logprobs: Array
    finished: Array
    scores: Array = None
    weights: Array = None
    charges: Array = None
    turn_rewards: Array = None
    extents: Array = None
    drawn: Array = None
    greedy_scores: Array = None
    greedy_costs: Array = None
    old_logprobs: Array = None
    ref_logprobs: Array = None
    entropy: Array = None
    old_values: Array = None
    last_values: Array = None
    advantages: Array = None
    returns: Array = None
    prompts: PromptSet = field(default_factory=lambda: PromptSet([], []))
    completions: Sequence[Completion] = ()
    texts: Sequence[str] = ()
    trajectories: Sequence[Trajectory] = ()
    rows: Arrays = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def each(self) -> int:
        """G, the answers to one prompt."""
        return len(self.completions) // len(self.prompts.records)

    @property
    def lengths(self) -> Array:
        """[N] sampled tokens of each answer."""
        return self.sampled.sum(-1)

    @property
    def sampled(self) -> Array:
        """[N, T], 1 on the tokens that were sampled."""
        return self.mask if self.drawn is None else self.drawn

    @property
    def _of_answers(self) -> tuple[str, ...]:
        return _OF_ANSWERS if self.turn_rewards is None else (*_OF_ANSWERS, *_OF_TRAJECTORIES)

    @staticmethod
    def of(
        prompts: PromptSet, completions: Sequence[Completion], texts: Sequence[str], limit: int
    ) -> Rollout:
        """Makes a rollout of the engine's samples, T = `limit` tokens at most."""
        mask, logprobs = np.zeros((2, len(completions), limit), np.float32)
        for n, completion in enumerate(completions):
            mask[n, : len(completion.tokens)] = 1
            for given in completion.given:
                mask[n, given.start : given.stop] = 0
            logprobs[n, : len(completion.tokens)] = completion.logprobs
        finished = np.array([completion.finished for completion in completions])
        return Rollout(
            mask, logprobs, finished, prompts=prompts, completions=completions, texts=texts
        )

    def take(self, prompts: Sequence[int]) -> Rollout:
        """The scored answers to the prompts at these indices, in their order, not packed yet."""
        answers = [i * self.each + k for i in prompts for k in range(self.each)]
        arrays: dict[str, Any] = {name: getattr(self, name)[answers] for name in self._of_answers}
        arrays |= {name: getattr(self, name)[prompts] for name in _OF_PROMPTS}
        return dataclasses.replace(
            self,
            **arrays,
            prompts=self.prompts.take(prompts),
            completions=[self.completions[n] for n in answers],
            texts=[self.texts[n] for n in answers],
            trajectories=[self.trajectories[n] for n in answers if self.trajectories],
            rows={},
        )

    def with_answers_drawn(self) -> Rollout:
        """What an environment answered as if it had been drawn, at log-probs of 0; not packed."""
        span, lengths = np.arange(self.mask.shape[1]), [len(c.tokens) for c in self.completions]
        return dataclasses.replace(
            self,
            mask=(span < np.array(lengths)[:, None]).astype(np.float32),
            drawn=self.mask,
            completions=[dataclasses.replace(each, given=()) for each in self.completions],
            rows={},
        )

    @staticmethod
    def joined(parts: Sequence[Rollout]) -> Rollout:
        """The scored answers of all parts, in order; not packed yet if there are several."""
        if len(parts) == 1:
            return parts[0]
        arrays: dict[str, Any] = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in (*parts[0]._of_answers, *_OF_PROMPTS)
        }
        return Rollout(
            **arrays,
            prompts=PromptSet.joined([part.prompts for part in parts]),
            completions=[completion for part in parts for completion in part.completions],
            texts=[text for part in parts for text in part.texts],
            trajectories=[each for part in parts for each in part.trajectories],
        )


def pack_rows(
    rollout: Rollout, *, row_length: int, max_prompt: int, multiple: int, shortest: int = SHORTEST
) -> Arrays:
    """Rows of prompts with as many of their answers as always fit one, all of one shape.

    `Rollout.rows` says what they hold beside the arrays of `pack_groups`.
    """
    each, max_new = rollout.each, rollout.mask.shape[1]
    fitting = [
        k for k in range(1, each + 1) if each % k == 0 and max_prompt + k * max_new <= row_length
    ]
    if not fitting:
        raise UserError(
            f"data.row_length = {row_length} is less than rollout.max_prompt_tokens = {max_prompt} "
            f"and rollout.max_new_tokens = {max_new} together"
        )
    share = fitting[-1]
    groups = []
    for n in range(0, len(rollout.completions), share):
        answers = rollout.completions[n : n + share]
        branches, given = tuple(a.tokens for a in answers), tuple(a.given for a in answers)
        groups.append(Group(rollout.prompts.tokens[n // each], branches, n // share, given))
    most = max(1, row_length // (shortest * share))
    rows, _ = pack_groups(groups, row_length, branches=share, most=most)
    rows = pad_rows(rows, rows=multiple, slots=row_length, groups=most)
    count = len(rows["valid"])
    lengths = rows["lengths"].reshape(count, -1)
    first = np.cumsum(lengths, axis=1) - lengths
    span = np.arange(max_new)
    inside = span < lengths[..., None]
    slots = np.where(inside, first[..., None] + span, 0)
    sequences = rows["example_ids"][..., None] * share + np.arange(share)
    members = np.where(rows["valid"][..., None] > 0, sequences, -1).reshape(count, -1)
    mask = inside & (to_rows(rollout.mask, members) > 0)
    return rows | {
        "members": members.astype(np.int32),
        "slots": slots.astype(np.int32),
        "mask": mask.astype(np.float32),
    }


def to_rows(values: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Takes values of sequences [N, …] to their places in the rows [R, S, …]; 0 elsewhere."""
    real = members.reshape(*members.shape, *[1] * (values.ndim - 1)) >= 0
    return np.where(real, values[members], 0)


def from_rows(values: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Takes values [R, S, …] of the rows' sequences to the order of the rollout, [N, …]."""
    real = members >= 0
    sequences = np.empty((np.count_nonzero(real), *values.shape[2:]), values.dtype)
    sequences[members[real]] = values[real]
    return sequences


def select(values: jax.Array, rows: Mapping[str, jax.Array]) -> jax.Array:
    """Takes values of target slots [R, M] to sequences [R·S, T]; 0 outside the responses."""
    count, sequences, length = rows["slots"].shape
    taken = jnp.take_along_axis(values, rows["slots"].reshape(count, -1), axis=1)
    taken = jnp.where(rows["mask"].reshape(count, -1) > 0, taken, 0)
    return taken.reshape(count * sequences, length)
