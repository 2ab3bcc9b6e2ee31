"""One iteration of on-policy RL, on the world of which everything is known."""

from __future__ import annotations

import dataclasses
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.losses.cross_entropy import TokenStatistics
from rlhf_jax.models import lora, transformer
from rlhf_jax.oracle import exact_world as world
from rlhf_jax.oracle.oracle_rows import ROWS, Row, make_row_config
from rlhf_jax.oracle.oracle_tasks import enumerate_logprobs, letters_model, letters_task, table_task
from rlhf_jax.oracle.row_training import train_policy
from rlhf_jax.oracle.verdicts import judge
from rlhf_jax.rl import objectives
from rlhf_jax.rl.layout import Rollout
from rlhf_jax.rl.on_policy import (
    advantages,
    first_state,
    iterate,
    make_trainer,
    minibatches,
    over_updates,
    score,
    update,
)
from rlhf_jax.stages import defaults
from rlhf_jax.stages.chain import load_config
from rlhf_jax.stages.checks import check_objective
from rlhf_jax.stages.defaults import resolve
from rlhf_jax.training.checkpoint import Checkpoints
from rlhf_jax.training.mesh import make_mesh, placed
from rlhf_jax.training.metrics import Means, Metrics, fetch
from rlhf_jax.trees import named_leaves

ORACLE = "experiments/oracle.py"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


def table(algorithm="rloo", **sections):
    config = make_row_config(
        Row(algorithm, {"rollout": {"samples": 4}, **sections}), load_config(ORACLE)
    )
    config.rollout.prompts = 16
    config.train.steps = 10
    start = {"table": jnp.asarray(world.REFERENCE, jnp.float32)}
    return config, table_task(resolve(config)), start


def letters(algorithm="rloo", **sections):
    changes = {"rollout": {"samples": 4}, **sections}
    config = make_row_config(Row(algorithm, changes, policy="transformer"), load_config(ORACLE))
    config.rollout.prompts = 16
    config.rollout.slots = 32
    config.train.steps = 10
    shape = letters_model()
    task = letters_task(resolve(config), shape)
    return config, task, transformer.init(shape, jax.random.key(1)), shape


def trainer_of(config, task, start, *, reference=None, mesh=None):
    value = None
    if task.values is not None:
        value = {"table": jnp.zeros((world.PROMPTS, len(world.PREFIXES)))}
    trainer = make_trainer(resolve(config), task, start, value, mesh=mesh)
    if reference is None:
        return trainer
    return dataclasses.replace(trainer, reference=placed(mesh, reference))


def steps(config, task, start, count, **options):
    """(state, metrics, rollout) after the last of `count` iterations."""
    trainer = trainer_of(config, task, start, **options)
    state, metrics, rollout = first_state(trainer), {}, None
    for _ in range(count):
        state, metrics, rollout = iterate(trainer, state, {})
    return state, metrics, rollout


def second_state(trainer):
    """The state of a policy that need not be its reference any more."""
    return dataclasses.replace(first_state(trainer), iteration=jnp.ones((), jnp.int32))


def two_steps(config, task, start):
    """(the metrics of the first iteration, those of the second)."""
    trainer = trainer_of(config, task, start)
    state, first, _ = iterate(trainer, first_state(trainer), {})
    return first, iterate(trainer, state, {})[1]


def test_metrics_of_the_first_iteration():
    _, metrics, rollout = steps(*table(), 1)
    assert metrics["objective/kl"] == 0
    assert metrics["policy/ratio_deviation"] < 1e-6
    assert metrics["rollout/logprob_difference"] < 1e-5
    np.testing.assert_allclose(metrics["objective/scores"], rollout.scores.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["completions/mean_length"], rollout.mask.sum(-1).mean())
    np.testing.assert_allclose(metrics["completions/eos_rate"], rollout.finished.mean())
    entropy = -(np.exp(world.log_softmax(world.REFERENCE)) * world.log_softmax(world.REFERENCE))
    assert 0 < metrics["policy/entropy"] <= entropy.sum(-1).max()


@pytest.mark.parametrize(
    ("kl", "paid"),
    [  # log-ratios of the answer's tokens to the reference: 1, −1 and ½
        ({"estimator": "k1"}, 0.5),
        ({"estimator": "k2"}, (1 + 1 + 0.25) / 2),
        ({"estimator": "k3"}, np.exp(-1) + np.exp(1) + np.exp(-0.5) - 3 + 0.5),
        ({"estimator": "k2", "placement": "loss", "level": "token"}, (1 + 1 + 0.25) / 2),
        ({"estimator": "k2", "placement": "loss", "level": "sequence"}, 0.5**2 / 2),
        ({"estimator": "k3", "placement": "none"}, 0),
    ],
)
def test_the_reward_that_is_reported_is_less_the_kl_that_is_paid(kl, paid):
    logprobs, reference = [-1.0, -2.0, -0.5], [-2.0, -1.0, -1.0]
    rollout = Rollout(
        mask=jnp.ones((1, 3)),
        behaviour_logprobs=jnp.array([logprobs]),
        finished=jnp.array([True]),
        scores=jnp.ones(1),
        weights=jnp.ones(1),
        old_logprobs=jnp.array([logprobs]),
        ref_logprobs=jnp.array([reference]),
    )
    config = resolve(table("reinforce", rollout={"samples": 1}, kl=kl)[0])
    found = objectives.sample_metrics(config, rollout, jnp.float32(0.1))
    assert float(found["objective/kl"]) == pytest.approx(0.5)
    assert float(found["objective/non_score_reward"]) == pytest.approx(-0.1 * paid, abs=1e-6)
    assert float(found["objective/rlhf_reward"]) == pytest.approx(1 - 0.1 * paid)
    if config.kl.placement == "reward":
        made, _ = objectives.advantages(config, rollout, jnp.float32(0.1))
        assert float(found["objective/rlhf_reward"]) == pytest.approx(float(made["returns"][0, 0]))


def test_a_minibatch_in_which_nothing_counts_is_in_no_mean():
    config, task, start = table("grpo", train={"minibatches": 2})

    def rollout(params, batch, number):
        found = task.rollout(params, batch, number)
        members = found.rows["members"]
        first, _ = minibatches(config, (members >= 0).any(axis=1), number)
        counts = np.isin(np.arange(len(found.weights)), members[first])
        return dataclasses.replace(found, weights=counts.astype(np.float32))

    _, metrics, _ = steps(config, dataclasses.replace(task, rollout=rollout), start, 1)
    assert metrics["policy/ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["policy/ratio_var"] == pytest.approx(0, abs=1e-5)


def test_the_variance_of_ratios_near_1_is_what_they_have():
    """Every token's log-prob is moved by ±1e-4: the variance is that of the signs, times 1e-8."""
    config, task, start = table("rloo")
    own = task.statistics

    def moved(params, rows):
        found = own(params, rows)
        signs = jnp.where(jnp.arange(found.logprobs.size) % 2 == 0, 1e-4, -1e-4)
        return found._replace(logprobs=found.logprobs + signs.reshape(found.logprobs.shape))

    trainer = trainer_of(config, task, start)
    state = first_state(trainer)
    rollout = score(trainer, state, task.rollout(start, {}, 0))
    rollout, _ = advantages(trainer, rollout, state.kl_coefficient)
    # The ratio to itself is not 1 here, which float32 would refuse.
    task = dataclasses.replace(task, statistics=moved, dtype="bfloat16")
    trainer = trainer_of(config, task, start)
    _, _, metrics, _ = update(trainer, state, rollout)
    mask = np.asarray(rollout.mask).ravel()
    mean = mask[::2].sum() / mask.sum() * 2 - 1  # of the signs of the tokens that count
    # Log-probs of some nats have 2e-7 of rounding, which is 2e-3 of what they are moved by.
    assert metrics["policy/ratio_var"][0] == pytest.approx(1e-8 * (1 - mean**2), rel=2e-3)


def test_means_of_updates_are_ratios_of_sums():
    def update(weight, entropy, tokens, largest, norm, skipped):
        values = {"train/weight": weight, "policy/entropy": entropy, "policy/ratio_max": largest}
        values |= {"train/grad_norm": norm, "train/skipped": skipped, "loss/ptx": norm}
        return Metrics.of(values, {"policy/entropy": tokens, "policy/ratio_max": tokens})

    taken = [
        update(2, 1.0, 10, 1.5, 3.0, 0),
        update(0, 0, 0, 1.0, 0, 1),
        update(1, 4.0, 5, 2, 1, 1),
    ]
    assert over_updates(taken) == {
        "train/updates": (3, 1),
        "train/weight": (1.5, 2),
        "policy/entropy": (2, 15),  # (1 · 10 + 4 · 5) / 15
        "policy/ratio_max": (2, 15),
        "train/grad_norm": (2, 2),
        "train/skipped": (1, 1),
        "loss/ptx": (4 / 3, 3),  # whose tokens count although no answer does
    }
    assert {name for name, (_, weight) in over_updates(taken[1:2]).items() if weight} == {
        "train/updates", "train/skipped", "loss/ptx",
    }  # fmt: skip


def test_an_iteration_repeats_bit_for_bit():
    first, second = (steps(*table("ppo", train={"epochs": 2, "minibatches": 2}), 3) for _ in "ab")
    for a, b in zip(jax.tree.leaves(first[0]), jax.tree.leaves(second[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert first[1] == second[1]


def test_every_epoch_takes_every_row_once():
    config, *_ = table(train={"epochs": 3, "minibatches": 4})
    real = np.arange(32) < 21
    taken = [list(minibatches(config, real, number)) for number in (0, 0, 1)]
    for parts in taken:
        assert {int(real[part].sum()) for part in parts} == {5, 6}
        epochs = np.concatenate(parts).reshape(3, 32)
        assert [sorted(epoch) for epoch in epochs.tolist()] == [list(range(32))] * 3
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    np.testing.assert_array_equal(taken[0], taken[1])
    assert not np.array_equal(taken[0], taken[2])


def test_a_policy_that_is_not_the_one_that_scored_is_refused():
    config, task, start = table()
    calls = []

    def statistics(params, rows):
        calls.append(0)
        found = task.statistics(params, rows)
        # The first two calls score the policy and its reference, the third trains.
        return found if len(calls) < 3 else found._replace(logprobs=found.logprobs + 1e-3)

    with pytest.raises(UserError, match=r"ratio to itself is off 1 by 1.0e-03, over 1e-05"):
        steps(config, dataclasses.replace(task, statistics=statistics), start, 1)


def counting(task, calls):
    """The task, noting what its statistics are asked of."""

    def statistics(params, rows):
        calls.append(params)
        return task.statistics(params, rows)

    return dataclasses.replace(task, statistics=statistics)


@pytest.mark.parametrize(
    "split",
    ["microbatches", *(pytest.param(s, marks=pytest.mark.slow) for s in ("whole", "devices"))],
)
def test_a_single_update_scores_its_own_samples(split):
    in_loss = {"placement": "loss", "estimator": "k3", "coefficient": 0.1}
    config, task, start, _ = letters("grpo", kl=in_loss)
    config.batch.microbatches = 2 if split == "microbatches" else 1
    mesh = make_mesh({"data": 2}, jax.devices()[:2]) if split == "devices" else None
    moved = jax.tree.map(lambda x: x * 1.05, start)
    calls = []
    trainer = trainer_of(config, counting(task, calls), moved, reference=start, mesh=mesh)
    _, metrics, found = iterate(trainer, second_state(trainer), {})
    # The reference's, and what trains, whose shapes are asked first if it is split.
    traced = 3 if split == "microbatches" else 2
    assert len(calls) == traced
    state = first_state(trainer)
    names = ("old_logprobs", "ref_logprobs", "entropy", "advantages", "returns")
    unknown = dataclasses.replace(found, **dict.fromkeys(names))
    scored = score(trainer, state, unknown)
    scored, of_advantages = advantages(trainer, scored, state.kl_coefficient)
    expected = trainer.sample_metrics(scored, state.kl_coefficient) | of_advantages
    assert len(calls) == traced + 2  # now the policy's too
    assert np.abs(scored.old_logprobs - scored.ref_logprobs).max() > 1e-3
    for name in (*names, "behaviour_logprobs"):
        a, b = getattr(found, name), getattr(scored, name)
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)
    for name in expected:
        np.testing.assert_allclose(metrics[name], expected[name], atol=1e-5, err_msg=name)
    assert metrics["policy/ratio_deviation"] == 0
    entropy = (scored.entropy * found.mask).sum() / len(found.entropy)
    np.testing.assert_allclose(metrics["objective/entropy"], entropy, rtol=1e-5)


def test_a_single_update_is_that_of_a_policy_scored_before():
    """KL at a coefficient of 0 in the reward is the same update, after a pass of its own."""
    after = []
    for placement in ("loss", "reward"):
        kl = {"placement": placement, "estimator": "k3", "coefficient": 0.0}
        config, task, start, _ = letters("grpo", kl=kl)
        calls = []
        state, *_ = steps(config, counting(task, calls), start, 3)
        assert len(calls) == (2 if placement == "loss" else 3)
        after.append(state.policy.params)
    for a, b in zip(*map(jax.tree.leaves, after), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_policy_must_start_as_its_reference():
    config, task, start = table()
    moved = {"table": start["table"].at[0, 0, 1].add(0.1)}
    with pytest.raises(UserError, match="KL would not start at 0"):
        steps(config, task, moved, 1, reference=start)
    config.kl.update(placement="loss", estimator="k3")  # known after the update only
    with pytest.raises(UserError, match="KL would not start at 0"):
        steps(config, task, moved, 1, reference=start)
    trainer = trainer_of(config, task, moved, reference=start)
    _, metrics, _ = iterate(trainer, second_state(trainer), {})
    assert metrics["objective/kl"] != 0


def test_left_out_sequences_change_nothing():
    config, task, start = table()

    def with_rubbish(scale):
        def rollout(params, batch, number):
            found = task.rollout(params, batch, number)
            weights = (np.arange(len(found.scores)) % 4 != 1).astype(np.float32)
            scores = np.where(weights > 0, found.scores, scale)
            return dataclasses.replace(found, scores=scores, weights=weights)

        return dataclasses.replace(task, rollout=rollout)

    one, two = (steps(config, with_rubbish(scale), start, 2)[0] for scale in (0.0, 1e3))
    np.testing.assert_array_equal(one.policy.params["table"], two.policy.params["table"])


def test_nothing_left_to_learn_from_is_a_skipped_update():
    config, task, start = table()

    def rollout(params, batch, number):
        found = task.rollout(params, batch, number)
        return dataclasses.replace(found, weights=np.zeros_like(found.weights))

    state, metrics, _ = steps(config, dataclasses.replace(task, rollout=rollout), start, 2)
    np.testing.assert_array_equal(state.policy.params["table"], start["table"])
    assert metrics["train/consecutive_skipped"] == 2
    assert metrics["frac_reward_zero_std"] == 1
    named = ("objective/", "policy/", "advantages/", "loss/", "val/", "train/loss")
    assert {name for name in metrics if name.startswith(named)} == {"objective/kl_coefficient"} | {
        "objective/entropy"  # of everything sampled
    }


def test_a_critic_without_a_counted_value_has_no_means():
    config, task, start = table("ppo")

    def rollout(params, batch, number):
        found = task.rollout(params, batch, number)
        return dataclasses.replace(found, weights=found.weights * number)

    first, second = two_steps(config, dataclasses.replace(task, rollout=rollout), start)
    assert not {"val/mean", "loss/value_avg", "val/explained_variance"} & set(first)
    assert first["val/consecutive_skipped"] == first["train/consecutive_skipped"] == 1
    assert {"val/mean", "loss/value_avg", "val/explained_variance"} <= set(second)
    means = Means()
    for metrics in (first, second):
        means.add(*fetch(metrics))
    line = means.take()
    for name in ("val/mean", "objective/scores", "policy/ratio", "completions/mean_length"):
        expected = np.mean([m[name] for m in (first, second) if name in m])
        np.testing.assert_allclose(line[name], expected, rtol=1e-6, err_msg=name)


def test_a_mean_of_answers_of_which_there_are_none_is_left_out():
    config, task, start = table("grpo")

    def rollout(params, batch, number):  # none of the first iteration ended, nor counts
        found = task.rollout(params, batch, number)
        finished = np.full_like(found.finished, number)
        return dataclasses.replace(found, finished=finished, weights=found.weights * number)

    first, second = two_steps(config, dataclasses.replace(task, rollout=rollout), start)
    means = Means()
    for metrics in (first, second):
        means.add(*fetch(metrics))
    line = means.take()
    assert line["completions/mean_terminated_length"] == second["completions/mean_length"]
    assert line["completions/mean_truncated_length"] == first["completions/mean_length"]
    assert "reward_std" not in first and line["reward_std"] == second["reward_std"] > 0


def test_equal_scores_teach_nothing():
    config, task, start = table("dr_grpo", kl={"placement": "none"})

    def rollout(params, batch, number):
        found = task.rollout(params, batch, number)
        return dataclasses.replace(found, scores=np.ones_like(found.scores))

    state, metrics, _ = steps(config, dataclasses.replace(task, rollout=rollout), start, 1)
    assert metrics["frac_reward_zero_std"] == 1
    assert metrics["train/grad_norm"] == 0
    np.testing.assert_array_equal(state.policy.params["table"], start["table"])


def test_microbatches_and_devices_do_not_change_an_iteration():
    config, task, start, _ = letters()
    whole, *_ = steps(config, task, start, 2)
    config.batch.microbatches = 2
    mesh = make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4])
    split, *_ = steps(config, task, start, 2, mesh=mesh)
    for a, b in zip(
        jax.tree.leaves(whole.policy.params), jax.tree.leaves(split.policy.params), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.slow
def test_an_adapter_shares_its_base_with_the_reference_and_agrees_over_devices():
    config, task, start, _ = letters("grpo", rollout={"samples": 4})
    start = lora.attach(start, lora.AdapterConfig(rank=2), jax.random.key(3))
    state, metrics, _ = steps(config, task, start, 2)
    trained = named_leaves(state.policy.params)
    assert trained and all("/lora/" in name for name in trained)
    whole = trainer_of(config, task, start).policy.params(state.policy)
    base, after = (named_leaves(lora.without_adapter(p)) for p in (start, whole))
    assert all(after[name] is base[name] for name in base)
    assert metrics["objective/kl"] != 0
    mesh = make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4])
    spread, *_ = steps(config, task, start, 2, mesh=mesh)
    for name, leaf in named_leaves(spread.policy.params).items():
        np.testing.assert_allclose(leaf, trained[name], atol=1e-4)


def test_the_transformer_task_scores_what_it_samples():
    """Its rewards and log-probs are those of the enumeration of all its responses."""
    _, task, start, shape = letters()
    rollouts = task.rollout(start, {}, 0)
    exact = enumerate_logprobs(shape, start)
    np.testing.assert_allclose(np.exp(exact).sum(1), 1, rtol=1e-5)
    sequence = (rollouts.behaviour_logprobs * rollouts.mask).sum(-1)
    prompt = np.repeat(np.arange(16) % 4, 4)
    for n, reward in enumerate(rollouts.scores):
        (outcome,) = np.flatnonzero(np.isclose(world.REWARDS[prompt[n]], reward, atol=1e-9))
        np.testing.assert_allclose(sequence[n], exact[prompt[n], outcome], atol=1e-4)


def test_the_controller_moves_towards_its_target():
    kl = {"coefficient": 0.2, "target": 0.5, "horizon": 100.0}
    state, *_ = steps(*table(kl=kl), 1)
    # KL is 0 at first: e = −0.2, 64 sequences of a horizon of 100.
    np.testing.assert_allclose(state.kl_coefficient, 0.2 * (1 - 0.2 * 64 / 100), rtol=1e-6)


LIMIT = {"cost": "over_refusal", "limit": 0.25, "rate": 2.0, "start": 1.0}


def limited(costs, **options):
    """The table's task with a limit on what `costs` says of a rollout's N answers."""
    config, task, start = table(lagrange=LIMIT | options)
    return (
        config,
        dataclasses.replace(task, costs=lambda rollout: costs(len(rollout.scores))),
        start,
    )


def test_a_cost_is_charged_to_the_answers_that_have_it_and_its_price_follows_their_mean():
    def costs(count):
        found = np.full(count, np.nan)
        found[: count // 2] = np.arange(count // 2) % 2
        return found

    free, *_ = (steps(*table(), 1)[2],)
    config, task, start = limited(costs)
    state, metrics, rollout = steps(config, task, start, 1)
    paid = np.nan_to_num(costs(len(free.scores)))
    np.testing.assert_array_equal(rollout.scores, free.scores)
    shaped = objectives.shape_scores(resolve(config), rollout)
    np.testing.assert_allclose(shaped, free.scores - paid, atol=1e-6)
    assert metrics["objective/scores"] == pytest.approx(free.scores.mean(), abs=1e-6)
    assert metrics["objective/shaped_scores"] == pytest.approx(
        (free.scores - paid).mean(), abs=1e-6
    )
    assert metrics["objective/cost"] == 0.5 and metrics["objective/multiplier"] == 1
    np.testing.assert_allclose(state.multiplier, 1 + 2.0 * (0.5 - 0.25), rtol=1e-6)
    state, metrics, _ = steps(config, task, start, 2)
    assert metrics["objective/multiplier"] == 1.5
    np.testing.assert_allclose(state.multiplier, 2.0, rtol=1e-6)


def test_answers_that_do_not_count_neither_pay_nor_raise_the_price():
    config, task, start = limited(lambda count: np.arange(count) < count // 2)
    rollout_of, half = task.rollout, np.arange(64) >= 32

    def rollout(*given):  # whose costly answers were left out, as those that were cut off may be
        made = rollout_of(*given)
        return dataclasses.replace(made, weights=made.weights * half)

    state, metrics, made = steps(config, dataclasses.replace(task, rollout=rollout), start, 1)
    assert metrics["objective/cost"] == 0 and not made.charges.any()
    np.testing.assert_allclose(state.multiplier, 1 - 2.0 * 0.25, rtol=1e-6)


def test_a_damped_price_follows_an_iterations_own_cost_and_lambda_does_not():
    config, task, start = limited(lambda count: np.arange(count) % 2.0, damping=3.0)
    state, metrics, rollout = steps(config, task, start, 1)
    np.testing.assert_allclose(rollout.charges, (1 + 3 * 0.25) * (np.arange(64) % 2.0), rtol=1e-6)
    assert metrics["objective/multiplier"] == 1
    np.testing.assert_allclose(state.multiplier, 1.5, rtol=1e-6)
    config, task, start = limited(lambda count: np.arange(count) % 8 == 0.0, damping=16.0)
    assert not steps(config, task, start, 1)[2].charges.any()  # 1 + 16 · (0.125 − 0.25) is below 0


def test_a_price_comes_back_from_a_checkpoint_and_goes_on_bit_for_bit(tmp_path):
    trainer = trainer_of(*limited(lambda count: np.arange(count) % 2.0))
    state, *_ = iterate(trainer, first_state(trainer), {})
    with closing(Checkpoints(tmp_path / "checkpoints")) as checkpoints:
        checkpoints.save(1, state, {"next_index": 1}, {"tokenizer_hash": "t"}, wait=True)
        kept = checkpoints.restore(first_state(trainer)).state
    (whole, *_), (again, *_) = (iterate(trainer, each, {}) for each in (state, kept))
    assert float(kept.multiplier) == 1.5 and float(again.multiplier) == 2.0
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_cost_and_dynamic_sampling_are_refused_together():
    rollout = {"samples": 8, "filter_zero_std": True}
    config = defaults.on_policy("grpo", rollout=rollout, lagrange=LIMIT)
    with pytest.raises(UserError, match="differ in their cost alone"):
        check_objective(resolve(config))


def test_a_price_stays_where_nothing_can_cost_and_ends_at_nothing():
    state, metrics, _ = steps(*limited(lambda count: np.full(count, np.nan)), 1)
    assert float(state.multiplier) == 1 and "objective/cost" not in metrics
    state, *_ = steps(*limited(np.zeros), 3)
    assert float(state.multiplier) == 0
    assert steps(*table(), 1)[0].multiplier is None


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("rollout", {"top_p": 0.9}, "no rollout.top_p; .*: what is trained is the whole"),
        ("rollout", {"top_k": 5}, "the policy stage has no rollout.top_k"),
        ("lagrange", {"cost": "harm"}, "lagrange.cost must be one of"),
        ("rollout", {"samples": 1}, "a baseline over the samples of a prompt needs two"),
        ("kl", {"placement": "loss", "estimator": "k1"}, "would regularise nothing"),
        (
            *("kl", {"placement": "loss", "estimator": "k2", "importance": True}),
            "kl.importance = True .* use k3 with it, or k2 without",
        ),
        ("kl", {"placement": "rewards"}, "kl.placement must be one of"),
        ("kl", {"target": 6.0, "coefficient": 0.0}, "which would stay 0"),
        # Of 512 answers: 0.05 · (1 − 0.2 · 512 / 100) < 0.
        ("kl", {"target": 6.0, "horizon": 100.0}, "would turn its sign; raise kl.horizon"),
        ("loss", {"name": "pppo"}, "'pppo' is unknown"),
        ("loss", {"clip_hihg": 1}, "no loss.clip_hihg; did you mean loss.clip_high"),
        ("loss", {"aggregation": "mean"}, "loss.aggregation must be one of token_mean"),
        ("advantage", {"name": "gea"}, "advantage.name must be one of gae"),
        (
            *("rollout", {"truncated": "mask", "missing_eos": "subtract"}),
            "rollout.missing_eos = 'subtract' would punish the very answers",
        ),
    ],
)
def test_mistakes_are_found_before_anything_runs(section, values, message):
    config = defaults.on_policy(
        "grpo", rollout={"samples": 8}, train={"epochs": 2, "minibatches": 2}
    )
    check_objective(resolve(config))
    config[section].update(values)
    with pytest.raises(UserError, match=message):
        check_objective(resolve(config))


def test_what_two_sections_disagree_on_is_found_before_anything_runs():
    trained = {"rollout": {"samples": 8, "given": "train"}}
    check_objective(resolve(defaults.on_policy("grpo", **trained)))
    config = defaults.on_policy("grpo", loss={"importance": "token"}, **trained)
    with pytest.raises(UserError, match=r"loss\.importance = 'token' corrects .* never sampled"):
        check_objective(resolve(config))
    config = defaults.on_policy("ppo", rollout={"truncated": "mask"})
    check_objective(resolve(config))
    config.advantage.bootstrap = True
    with pytest.raises(UserError, match=r"advantage\.bootstrap is of answers that were cut off"):
        check_objective(resolve(config))


TRAINED = ("ppo", "grpo", "rloo", "cispo", "gspo", "reinforce")  # the others have these losses


@pytest.mark.parametrize(
    "algorithm",
    [
        name if name in TRAINED else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted(defaults.ALGORITHMS)
    ],
)
def test_every_algorithm_is_a_valid_config_and_lowers_regret(algorithm):
    each = 1 if algorithm in ("ppo", "reinforce", "reinforce_pp", "remax") else 8
    in_reward = {"placement": "reward", "estimator": "k1"}
    row = Row(algorithm, {"rollout": {"samples": each}, "kl": in_reward}, regret=0.2)
    config = load_config(ORACLE)
    config.oracle.table_steps = 40
    check_objective(resolve(make_row_config(row, config)))
    outcome = train_policy(row, config)
    assert outcome.regret < 0.2  # 0.370 before
    assert "measured" not in judge(row, outcome)


def test_a_wrong_place_is_a_failed_row():
    config = load_config(ORACLE)
    config.oracle.table_steps = 5
    outcome = train_policy(ROWS["rloo"], config)
    assert judge(ROWS["rloo"], outcome).startswith("regret over")
    above = dataclasses.replace(outcome, reward=world.frontier(outcome.kl) + 0.01, measured=None)
    assert judge(ROWS["rloo"], above).startswith("above the frontier")

    def measured(reward, kl):
        seen = dataclasses.replace(outcome.measured, reward=reward, kl=kl)
        return judge(ROWS["rloo"], dataclasses.replace(outcome, measured=seen))

    assert measured(outcome.reward, outcome.kl + 1).startswith("KL measured as")
    assert measured(outcome.reward - 1, outcome.kl).startswith("reward measured as")
    for kl in (0.0, outcome.kl):
        assert measured(1.0, kl).startswith("measured above the frontier")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ["reinforce", "rloo", "ppo", "grpo", "dr_grpo", "adaptive_kl"])
def test_tier_two_on_three_seeds(name, seed):
    config = load_config(ORACLE)
    config.oracle.table_steps = 500
    outcome = train_policy(ROWS[name], config, seed)
    assert judge(ROWS[name], outcome) == "ok"


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["rloo", "ppo", "reinforce"])
def test_a_transformer_reaches_the_optimum(algorithm):
    config = load_config(ORACLE)
    config.oracle.transformer_steps = 300
    each = 4 if algorithm == "rloo" else 1
    row = dataclasses.replace(
        ROWS["rloo_transformer"], algorithm=algorithm, changes={"rollout": {"samples": each}}
    )
    assert judge(row, train_policy(row, config)) == "ok"


@pytest.mark.parametrize("mutant", ["misses EOS", "averages over tokens"])
def test_a_wrong_metric_is_a_failed_row(mutant, monkeypatch):
    """Only what is reported is wrong: the row asks nothing of where the policy ends."""
    row = Row("rloo", {"rollout": {"samples": 4}}, tolerance=(9, 9), regret=None)
    config = load_config(ORACLE)
    config.oracle.table_steps = 60
    assert judge(row, train_policy(row, config)) == "ok"
    right = objectives.kl_estimate

    def wrong(logprobs, ref_logprobs, kind):
        kl, real = right(logprobs, ref_logprobs, kind), logprobs != 0
        lengths = real.sum(-1, keepdims=True)
        if mutant == "averages over tokens":
            return kl / lengths
        last = jnp.arange(4) == lengths - 1
        return jnp.where(last & (lengths < 4), 0, kl)

    monkeypatch.setattr(objectives, "kl_estimate", wrong)
    assert "measured" in judge(row, train_policy(row, config))


def test_prompts_whose_answers_score_the_same_are_left_out():
    config, task, start = table("dapo")
    greedier = {"table": 20 * start["table"]}
    rollouts = task.rollout(greedier, {}, 0)
    same = np.ptp(rollouts.scores.reshape(-1, 4), axis=1) == 0
    assert 0 < same.sum() < 16
    np.testing.assert_array_equal(rollouts.weights.reshape(-1, 4), ~same[:, None] * np.ones(4))
    config.rollout.filter_zero_std = False
    assert table_task(resolve(config)).rollout(greedier, {}, 0).weights.all()


def test_a_transformer_samples_with_any_seed():
    config, _, start, shape = letters()
    config.seed = 2**31 - 1
    task = letters_task(resolve(config), shape)
    scores = [task.rollout(start, {}, number).scores for number in (0, 0, 1)]
    np.testing.assert_array_equal(scores[0], scores[1])
    assert not np.array_equal(scores[0], scores[2])


def test_statistics_of_a_table_are_those_of_its_logits():
    _, task, start = table()
    rows = task.rollout(start, {}, 0).rows
    found = task.statistics(start, rows)
    assert isinstance(found, TokenStatistics)
    exact = world.log_softmax(world.REFERENCE)[rows["prompts"][:, None], rows["nodes"]]
    chosen = np.take_along_axis(exact, rows["targets"][..., None], -1)[..., 0]
    np.testing.assert_allclose(found.logprobs, chosen, atol=1e-5)
    np.testing.assert_allclose(found.entropy, -(np.exp(exact) * exact).sum(-1), atol=1e-5)
