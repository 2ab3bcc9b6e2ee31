# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     machine_shape: hm
#     name: PPO and GRPO, step by step
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # PPO and GRPO, step by step
#
# Reinforcement learning of a language model is a loop of four steps: *sample* answers, *score*
# them, turn scores into *advantages*, *update* the policy. This notebook works out each step with
# numbers small enough to check by hand, puts them together in a world of three answers whose best
# policy is known, and then trains a small chat model with [PPO](https://arxiv.org/abs/1707.06347)
# and with [GRPO](https://arxiv.org/abs/2402.03300). Every number comes from the functions that
# train the chat model. It needs no download beside the package and a few minutes on two CPU cores.

# %%
# On Colab: install the package from a checkout or an address, and restart once if that brings
# another jax, which a running Python cannot load in place of the one it has.
import importlib.metadata
import importlib.util
import os
import subprocess
import sys

SOURCE = os.environ.get("RLHF_JAX_SOURCE", "..")  # or "git+https://…", where your copy is
if importlib.util.find_spec("rlhf_jax") is None:
    before = importlib.metadata.version("jax") if importlib.util.find_spec("jax") else None
    tpu = ["jax[tpu]"] if os.path.exists("/dev/vfio/0") or os.path.exists("/dev/accel0") else []
    subprocess.check_call([sys.executable, "-m", "pip", "install", "--quiet", SOURCE, *tpu])
    if before not in (None, importlib.metadata.version("jax")):
        os.kill(os.getpid(), 9)  # Colab starts the kernel again; then run the cells from here

# A process takes a chip for itself: the commands below shall have it, and this notebook the CPU.
import jax

found = "import jax; print(f'jax {jax.__version__} on {jax.devices()[0].device_kind}')"
print(subprocess.check_output([sys.executable, "-c", found], text=True).strip())
jax.config.update("jax_platforms", "cpu")

# %%
import json
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from rlhf_jax.losses.advantages import gae, group_advantages
from rlhf_jax.losses.policy import OBJECTIVES, Tokens, policy_loss
from rlhf_jax.losses.shaping import exact_kl, kl_estimate, token_rewards

# A check of this repository executes the notebook with few steps; then nothing is learnt.
SMALL = os.environ.get("RLHF_JAX_NOTEBOOK") == "small"

# %% [markdown]
# ## Advantages without a critic: GRPO
#
# Is a score of 1 good? That depends on the prompt. GRPO samples several answers to each prompt and
# compares them with one another: the **advantage** of an answer is its score minus the mean of its
# group, divided by the group's standard deviation. Take four answers to one prompt, of which the
# first and the last are right, and four answers to another, all right.

# %%
scores = jnp.array([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])  # [prompts, answers]
grpo = group_advantages(scores, scale="group")
rloo = group_advantages(scores, baseline="leave_one_out")
print("GRPO", *np.asarray(grpo).round(3), sep="\n")
print("RLOO", *np.asarray(rloo).round(3), sep="\n")

# %% [markdown]
# By hand: the first group's mean is ½, its variance $4 \cdot (½)^2 / (4 - 1) = ⅓$, so its
# advantages are $±½ / \sqrt{⅓} = ±0.866$. [RLOO](https://arxiv.org/abs/2402.14740) compares with
# the mean of the *other* three and does not divide: $1 - ⅓ = ⅔$. A group in which all scores are
# the same teaches nothing, with either.

# %%
np.testing.assert_allclose(grpo[0], [0.866, -0.866, -0.866, 0.866], atol=1e-3)
np.testing.assert_allclose(rloo[0], [2 / 3, -2 / 3, -2 / 3, 2 / 3], rtol=1e-6)
assert (grpo[1] == 0).all() and (rloo[1] == 0).all()

# %% [markdown]
# ## Rewards and advantages of tokens: PPO
#
# In GRPO all tokens of an answer share its advantage. PPO gives each token its own. The score is
# the reward of the last token, and every token pays $\beta$ times its KL, the price of having moved
# away from the model that training began with. Then a second network, the *critic*, guesses before
# each token how much reward is still to come: its **value**. What a token brought beyond the guess
# is $\delta_t = r_t + V_{t+1} - V_t$, and *generalised advantage estimation*
# ([paper](https://arxiv.org/abs/1506.02438)) adds to it what came later, $A_t = \delta_t + \lambda
# A_{t+1}$. An answer of three tokens:

# %%
mask = jnp.ones((1, 3))  # [answers, tokens]
kl = jnp.array([[0.1, -0.2, 0.4]])
rewards = token_rewards(jnp.array([1.0]), mask, kl, coefficient=0.5)
values = jnp.array([[0.5, 0.4, 0.6]])
advantages, returns = gae(rewards, values, mask, lam=0.5)
for name, row in (("rewards", rewards), ("values", values), ("advantages", advantages)):
    print(f"{name:>10}", np.asarray(row[0]).round(3))

# %% [markdown]
# By hand: the rewards are $-½ \cdot 0.1 = -0.05$, then $0.1$, and $1 - ½ \cdot 0.4 = 0.8$ at the
# end. So $\delta = (-0.05 + 0.4 - 0.5,\; 0.1 + 0.6 - 0.4,\; 0.8 - 0.6) = (-0.15,\; 0.3,\; 0.2)$,
# and from the end backwards $A_3 = 0.2$, $A_2 = 0.3 + ½ \cdot 0.2 = 0.4$, $A_1 = -0.15 + ½ \cdot
# 0.4 = 0.05$. $\lambda$ says how far to look: with 0 the critic is believed after one token, with 1
# only the rewards count.

# %%
np.testing.assert_allclose(rewards[0], [-0.05, 0.1, 0.8], atol=1e-6)
np.testing.assert_allclose(advantages[0], [0.05, 0.4, 0.2], atol=1e-6)

figure, axes = plt.subplots(figsize=(6, 3))
places = np.arange(3)
for i, lam in enumerate((0.0, 0.5, 1.0)):
    axes.bar(places + (i - 1) * 0.25, gae(rewards, values, mask, lam=lam)[0][0], 0.23, label=lam)
axes.axhline(0, color="grey", linewidth=0.8)
axes.set(title="advantage of each token", xticks=places, xticklabels=["first", "second", "last"])
axes.legend(title="λ")
plt.show()

# %% [markdown]
# ## Ratios, and why they are clipped
#
# Sampling is expensive, so the same answers serve several updates. From the second update on, the
# policy is no longer the one that sampled them. The **ratio** $r = \pi(\text{token}) /
# \pi_{\rm old}(\text{token})$ corrects for that, as long as it stays near 1. PPO's loss of a token,
# $-\min(rA,\; \mathrm{clip}(r, 0.8, 1.2)\,A)$, stops pushing once the ratio has left that range in
# the direction in which the advantage pushes.


# %%
def loss_of(log_ratio, advantage):
    """PPO's loss of one token."""
    one = jnp.ones((1, 1))
    token = Tokens(log_ratio * one, 0 * one, advantage * one, one)
    (total, weight), _ = policy_loss(OBJECTIVES["ppo"](), token)
    return total / weight


ratios = np.linspace(0.4, 1.8, 141)
figure, axes = plt.subplots(figsize=(6, 3))
for advantage in (1.0, -1.0):
    curve = jax.vmap(loss_of, (0, None))(jnp.log(ratios), advantage)
    axes.plot(ratios, curve, label=f"A = {advantage:+.0f}")
axes.axvspan(0.8, 1.2, color="grey", alpha=0.15)
axes.set(title="PPO's loss of a token", xlabel="ratio to the policy that sampled it")
axes.legend()
plt.show()

# %% [markdown]
# Flat means that the token is left alone: a good one ($A > 0$) that has become 1.2 times as likely,
# a bad one that has become 0.8 times as likely. The other two sides are not flat, so that what went
# the wrong way can come back. At a ratio of 1, where each round begins, the slope is $-A$: there
# PPO is the plain policy gradient.

# %%
slope = jax.grad(loss_of)
at = {(r, a): float(slope(jnp.log(r), a)) for r in (0.5, 1.0, 1.5) for a in (1.0, -1.0)}
print({f"r = {r}, A = {a:+.0f}": round(value, 3) for (r, a), value in at.items()})
assert at[1.5, 1.0] == 0 and at[0.5, -1.0] == 0  # left alone
assert np.isclose(at[0.5, 1.0], -0.5) and np.isclose(at[1.5, -1.0], 1.5)  # may come back
assert np.isclose(at[1.0, 1.0], -1) and np.isclose(at[1.0, -1.0], 1)

# %% [markdown]
# ## KL, and three ways to estimate it
#
# $\mathrm{KL}(\pi \| \pi_{\rm ref})$ says how far the policy has moved from its reference. Nobody
# can sum over all answers, so it is estimated from sampled ones, by one of three formulas of the
# log-ratio $d = \log \pi - \log \pi_{\rm ref}$: $k_1 = d$, $k_2 = d^2/2$ and $k_3 = e^{-d} - 1 + d$
# ([here](http://joschu.net/blog/kl-approx.html)). With three possible tokens the sum is easy.

# %%
policy = jnp.array([0.5, 0.25, 0.25])
reference = jnp.array([0.25, 0.25, 0.5])
exact = exact_kl(jnp.log(policy), jnp.log(reference))
print(f"exact: {exact:.4f} nats")
means = {}
for kind in ("k1", "k2", "k3"):
    estimates = kl_estimate(jnp.log(policy), jnp.log(reference), kind)
    means[kind] = policy @ estimates
    deviation = jnp.sqrt(policy @ (estimates - means[kind]) ** 2)
    print(f"{kind}: {np.asarray(estimates).round(3)}", end=", ")
    print(f"on average {means[kind]:.4f}, deviation {deviation:.3f}")

# %% [markdown]
# By hand: $½ \log 2 + ¼ \log 1 - ¼ \log 2 = ¼ \log 2 = 0.1733$. On average $k_1$ and $k_3$ are
# exactly that and $k_2$ nearly so; $k_3$ is never negative and varies five times less than $k_1$.
# So why not $k_3$ everywhere? Because what is *differentiated* matters too: as a term of the loss,
# $k_3$ pulls towards the optimum of another objective. The docstring of `kl_loss` says which.

# %%
assert np.isclose(exact, np.log(2) / 4)
assert np.isclose(means["k1"], exact) and np.isclose(means["k3"], exact)
assert not np.isclose(means["k2"], exact, rtol=0.02)

# %% [markdown]
# ## All together, where the best policy is known
#
# Let there be one prompt and three possible answers of one token, with the scores 1, ½ and 0, and a
# reference that picks each a third of the time. What is maximised is the mean score minus
# $\beta\,\mathrm{KL}$, and the best policy has a closed form: $\pi^* \propto \pi_{\rm ref} \cdot
# e^{\text{score}/\beta}$. Here is the whole loop: 512 answers a round in groups of eight, two
# updates with each.

# %%
SCORES, REFERENCE, BETA = jnp.array([1.0, 0.5, 0.0]), jnp.log(jnp.ones(3) / 3), 0.5


@jax.jit
def iterate(logits, key, beta):
    """One round: sample, score, advantages, two updates."""
    answers = jax.random.categorical(key, logits, shape=(512, 1))  # [answers, 1 token]
    old = jax.nn.log_softmax(logits)[answers]
    kl = kl_estimate(old, REFERENCE[answers], "k1")
    rewards = token_rewards(SCORES[answers[:, 0]], jnp.ones((512, 1)), kl, coefficient=beta)
    groups = group_advantages(rewards.reshape(64, 8), baseline="leave_one_out")

    def loss(logits):
        new = jax.nn.log_softmax(logits)[answers]
        tokens = Tokens(new, old, groups.reshape(512, 1), jnp.ones((512, 1)))
        (total, weight), _ = policy_loss(OBJECTIVES["ppo"](), tokens)
        return total / weight

    for _ in range(2):
        logits = logits - 0.3 * jax.grad(loss)(logits)
    return logits


def learn(beta, rounds=120):
    """The policy after each round, [rounds, 3] probabilities."""
    logits, path = REFERENCE, []
    for key in jax.random.split(jax.random.key(0), rounds):
        logits = iterate(logits, key, beta)
        path.append(jax.nn.softmax(logits))
    return np.array(path)


best = np.array(jax.nn.softmax(REFERENCE + SCORES / BETA))
path, unbound = learn(BETA), learn(0.0)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), sharey=True)
for i, score in enumerate(SCORES):
    (line,) = left.plot(path[:, i], label=f"score {score:.1f}")
    left.axhline(best[i], color=line.get_color(), linestyle=":")
    right.plot(unbound[:, i])
left.set(title="β = 0.5; dotted: the best policy", xlabel="round", ylabel="probability")
right.set(title="β = 0: nothing holds it back", xlabel="round")
left.legend()
plt.show()
print("reached", np.round(path[-20:].mean(0), 3), "best", np.round(best, 3))

# %% [markdown]
# The loop ends where theory says it must. Without the KL it forgets all answers but one, which is
# the best only as far as the score is right. (`python -m rlhf_jax.main --config=oracle` puts every
# algorithm of the package to such a test.)

# %%
np.testing.assert_allclose(path[-20:].mean(0), best, atol=0.03)
assert unbound[-1, 0] > 0.9

# %% [markdown]
# ## A model to align, and a reward to align it by
#
# Now with text. A small town is made up; a model is pre-trained on its gossip and fine-tuned on
# dialogues, and a reward model learns from the choices of simulated people. Every stage is one
# command, the first two with fewer steps here than the experiments have.


# %%
def run(config, *flags):
    """Runs a stage; what it prints is kept in its directory, too."""
    command = [sys.executable, "-m", "rlhf_jax.main", f"--config={config}", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(Path(f"runs/{config}/summary.json").read_text())["metrics"]


few = ["--config.train.steps=24"] if SMALL else []
run("pretrain", *(few or ["--config.train.steps=300"]))
tuning = ["--config.init.policy=runs/pretrain", "--config.eval.count=16"]
run("sft", *tuning, *(few or ["--config.train.steps=200"]))
judge = run("reward", "--config.init.policy=runs/sft", *few)
print(f"the reward model is right about {judge['eval/accuracy']:.0%} of held-out pairs")
assert SMALL or judge["eval/accuracy_low"] > 0.6

# %% [markdown]
# ## PPO and GRPO on the chat model
#
# A step of PPO samples an answer to each of 128 prompts and goes over them twice; a step of GRPO
# samples eight answers to each of 32 prompts. Both are judged on the way: by the reward model,
# which they see, and by the town's exact scorer, the *gold* reward, which they don't.

# %%
few = ["--config.train.steps=8", "--config.train.eval_every=2", "--config.eval.count=128"]
if SMALL:
    few = ["--config.train.steps=2", "--config.train.eval_every=1", "--config.eval.count=16"]
    few += ["--config.eval.during=16", "--config.optimizer.warmup_steps=0"]
parents = ["--config.init.policy=runs/sft", "--config.init.reward=runs/reward"]
metrics = {name: run(name, *parents, *few) for name in ("ppo", "grpo")}
for name, its in metrics.items():
    low, high = its["eval/gold_win_rate_low"], its["eval/gold_win_rate_high"]
    print(
        f"{name:>4}: better than the model it started from on {its['eval/gold_win_rate']:.0%} of "
        f"held-out prompts ({low:.0%} to {high:.0%}), for {its['eval/kl']:.1f} nats of KL"
    )
    assert SMALL or (low > 0.55 and 0.2 < its["eval/kl"] < 10)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2))
for name in metrics:
    path = json.loads(Path(f"runs/{name}/evaluation.json").read_text())["frontier"]
    left.plot(path["kl"], path["proxy"], marker="o", label=name)
    right.plot(path["kl"], path["gold"], marker="o")
    assert SMALL or path["proxy"][-1] > path["proxy"][0] + 0.3
left.set(title="what they are trained on: the reward model", xlabel="KL to the start (nats)")
right.set(title="what their answers are worth: gold", xlabel="KL to the start (nats)")
left.legend()
plt.show()

# %% [markdown]
# Each point is an evaluation on the way, of 128 sampled answers. The score that is trained on
# rises, and so does what the answers are worth; the second need not follow the first. How they part
# is the subject of the [notebook on reward models](reward.ipynb).
#
# Last, one answer of each, token by token, from the last step. PPO's tokens have advantages of
# their own; GRPO's all have that of their answer.


# %%
def view_of(name):
    """The answer, of some that were trained on, of which a token has the largest advantage."""
    views = [*map(json.loads, Path(f"runs/{name}/views.jsonl").read_text().splitlines())]
    return max(views, key=lambda view: max(map(abs, view["values"]["advantage"])))


figure, both = plt.subplots(2, 1, figsize=(10, 4.4))
for axes, name in zip(both, metrics, strict=True):
    view = view_of(name)
    own = view["values"]["advantage"]
    axes.bar(range(len(own)), own)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(title=f"{name}: {view['prompt'][-1]['content']}", ylabel="advantage")
    tokens = [token.replace("⏹", "(end)") for token in view["tokens"]]
    axes.set_xticks(range(len(own)), tokens, rotation=45, fontsize=8)
    assert (np.ptp(own) == 0) == (name == "grpo")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Try
#
# * `--config=grpo:dr_grpo`, `grpo:rloo`, `grpo:dapo`: the same loop with other advantages or
#   another clip.
# * `--config.kl.coefficient=0.01`: how far does it go, and is the gold reward still rising there?
# * An advantage of your own: `--config.advantage.file=mine.py:centred`, a function as those of
#   `ADVANTAGES` in `rlhf_jax/rl/objectives.py`.
