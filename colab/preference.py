# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     machine_shape: hm
#     name: DPO and its family
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # DPO and its family: write a loss of your own, and find out whether it is better
#
# A preference is a prompt with two answers, of which somebody chose one. *Direct preference
# optimisation* ([paper](https://arxiv.org/abs/2305.18290)) turns it into a loss without a reward
# model and without sampling. This notebook draws the loss and three of its relatives, trains a
# small chat model with it, writes a loss of its own in ten lines, and asks with several seeds
# whether that one is better. It needs no download beside the package and a few minutes on
# two CPU cores.

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

from rlhf_jax.losses.preference import LOSSES, Pairs

# A check of this repository executes the notebook with few steps; then nothing is learnt.
SMALL = os.environ.get("RLHF_JAX_NOTEBOOK") == "small"

# %% [markdown]
# ## What the loss sees
#
# Of the model that is trained, and of the one it started from (the *reference*), all that counts is
# how probable each answer is. Let $s = \log \pi(y|x) - \log \pi_{\rm ref}(y|x)$, in nats, be how
# much more probable an answer has become, and the **margin** $\Delta = s_{\rm chosen} - s_{\rm
# rejected}$. DPO's loss is $-\log\sigma(\beta\Delta)$. Its relatives bend that curve in other
# ways: IPO pulls $\Delta$ to a target, the hinge stops at one.


# %%
def losses_of(loss, margins):
    """The loss of pairs [N] with these margins, in nats, and its slope."""

    def total(margins):
        zeros, ones = jnp.zeros_like(margins), jnp.ones_like(margins)
        return loss(Pairs(margins, zeros, zeros, zeros, ones, ones, ones))

    return total(margins), jax.grad(lambda m: total(m).sum())(margins)


margins = jnp.linspace(-40, 40, 401)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), sharex=True)
for name in ("sigmoid", "hinge", "ipo"):
    values, slopes = losses_of(LOSSES[name](beta=0.1), margins)
    left.plot(margins, values / values[200], label=name)
    right.plot(margins, slopes / abs(slopes[200]))
left.set(title="loss, as a share of that at Δ = 0", xlabel="margin Δ (nats)", ylim=(-0.2, 6))
right.set(title="slope: how hard a pair pulls", xlabel="margin Δ (nats)", ylim=(-4, 4))
left.legend()
plt.show()

# %% [markdown]
# Two numbers that you can work out by hand: at $\Delta = 0$ DPO's loss is $\log 2$, and its slope
# is $-\beta/2$. A pair whose margin is already large pulls no more (its slope goes to 0), and one
# that is wrong pulls with $\beta$ at most, however wrong it is. IPO pulls back what has gone too
# far.

# %%
value, slope = losses_of(LOSSES["sigmoid"](beta=0.1), jnp.zeros(1))
np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
np.testing.assert_allclose(slope, -0.1 / 2, rtol=1e-6)

# %% [markdown]
# ## A model to align
#
# A small town is made up: its gossip to pre-train on, and dialogues to fine-tune on. Both stages
# are one command each, here with fewer steps than the experiments have; both runs are ordinary
# directories, and a second start reuses them.


# %%
def run(config, *flags):
    """Runs a stage; what it prints is kept in its directory, too."""
    command = [sys.executable, "-m", "rlhf_jax.main", f"--config={config}", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(Path(f"runs/{config}/summary.json").read_text())["metrics"]


few = [f"--config.train.steps={24 if SMALL else 300}"]
pretrained = run("pretrain", *few)
tuned = run("sft", "--config.init.policy=runs/pretrain", *few)
print(f"pre-trained to {pretrained['eval/bpb']:.2f} bits a byte of held-out text")
print(f"fine-tuned: right about {tuned['eval/correct/facts']:.0%} of the facts it is asked for")

# %% [markdown]
# ## DPO
#
# The pairs are what simulated people chose. The town knows which answers are *really* good, so
# every answer has an exact **gold reward**, which nothing in training sees.

# %%
few = ["--config.train.steps=12", "--config.eval.count=16"] if SMALL else []
metrics = run("dpo", "--config.init.policy=runs/sft", *few)
before, change = metrics["before/gold_reward"], metrics["change/gold_reward"]
low, high = metrics["change/gold_reward_low"], metrics["change/gold_reward_high"]
print(
    f"gold reward {before:.3f} → {before + change:.3f}: {change:+.3f} ({low:+.3f} to {high:+.3f})"
)
print(f"for {metrics['eval/kl']:.2f} nats of KL to the model it started from")
assert SMALL or low > 0

# %%
samples = [*map(json.loads, Path("runs/dpo/samples.jsonl").read_text().splitlines())]
differing = [s for s in samples if len(set(list(s["responses"].values())[-2:])) == 2]
for sample in differing[:3]:
    print(sample["prompt"][-1]["content"])
    for model, answer in list(sample["responses"].items())[-2:]:
        print(f"   {model:>4}  {answer}")

# %% [markdown]
# ## A loss of your own
#
# A loss is a function from pairs to a number for each pair; its options are its arguments, and
# become fields of the config. This one is IPO's idea with an outlier's courtesy: a margin that is
# far from the target costs the logarithm of its square, so the pairs that are most wrong (mostly
# mislabelled ones) pull the least.

# %%
# %%writefile mine.py
import jax.numpy as jnp


def cauchy(pairs, *, beta, width=1.0):
    """A margin far from 1/β costs less and less the further it is off."""
    return jnp.log1p((1 - beta * pairs.margins) ** 2 / width)


# %%
from mine import cauchy

figure, axes = plt.subplots(figsize=(5, 3.2))
for name, loss in (
    ("sigmoid", LOSSES["sigmoid"](beta=0.1)),
    ("cauchy", lambda pairs: cauchy(pairs, beta=0.1)),
):
    axes.plot(margins, losses_of(loss, margins)[1], label=name)
axes.set(title="slope", xlabel="margin Δ (nats)")
axes.legend()
plt.show()
assert losses_of(lambda pairs: cauchy(pairs, beta=0.1), jnp.full(1, 10.0))[1] == 0  # at 1/β

# %% [markdown]
# ## Is it better?
#
# One run each would not say: two seeds of the *same* loss differ by several points of win rate. A
# sweep runs each cell with several seeds from the same fine-tuned model, then the best cell again
# with seeds that it was not chosen by.

# %%
few = ["--seeds=2", "--config.train.steps=12", "--config.eval.count=8"] if SMALL else ["--seeds=3"]
command = [sys.executable, "-m", "rlhf_jax.sweep", "--config=dpo"]
command += ["--config.init.policy=runs/sft", '--grid=loss.file="",mine.py:cauchy', *few]
if not SMALL:
    # A quarter of the pairs is more than these few steps see.
    command += ["--config.train.steps=12", "--config.eval.count=64"]
    command += ["--config.data.train=town[:25%]", "--config.data.validation=town[:25%]"]
# Wide enough for the table, and without the terminal's colours.
plain = os.environ | {"COLUMNS": "110", "NO_COLOR": "1", "FORCE_COLOR": "", "TERM": "dumb"}
done = subprocess.run(command, capture_output=True, text=True, env=plain)
assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
print(done.stdout[done.stdout.index("eval/") :])

# %% [markdown]
# Read the last lines first. An interval over prompts alone would take the seeds at hand for all
# there are; the one over seeds and prompts is what another researcher's run would fall into. "No
# difference is shown" is a result as well: with a few seeds only a large difference can be shown.
#
# `runs/dpo-sweep/report.html` has the figures, and each run below `runs/dpo-sweep/` a report of its
# own. The same command continues a sweep that was interrupted, and repeats nothing that is done:

# %%
table = Path("runs/dpo-sweep/cells.csv").read_bytes()
again = subprocess.run(command, capture_output=True, text=True)
assert again.returncode == 0 and Path("runs/dpo-sweep/cells.csv").read_bytes() == table

# %% [markdown]
# ## Try
#
# * `loss.width=4` in the grid: when does the loss become IPO?
# * `loss.name=sigmoid,ipo,hinge; loss.beta=0.05,0.1,0.5`: which matters more, the curve or β?
# * Your own pairs: `--config=dpo:own --config.init.policy=… --config.data.train=pairs.jsonl`.
