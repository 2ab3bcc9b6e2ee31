# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     machine_shape: hm
#     name: A reward model and how it is fooled
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A reward model, and how it is fooled
#
# What makes an answer good is hard to write down, and comparing two answers is easy. So people
# compare, and a *reward model* learns to predict their choices; a policy is then trained to please
# it ([paper](https://arxiv.org/abs/2009.01325)). The reward model is a *proxy*: it is right where
# it was trained and wrong elsewhere, and whoever optimises against it finds where. In this notebook
# the truth is known exactly, so one can watch: how labelers' taste gets into a reward model, how
# its favourite answers become worse while its scores rise, and what helps. It needs no download
# beside the package and a few minutes on two CPU cores.

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
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

# A check of this repository executes the notebook with few steps; then nothing is learnt.
SMALL = os.environ.get("RLHF_JAX_NOTEBOOK") == "small"

# %% [markdown]
# ## What people choose
#
# A small town is made up, with a **gold** scorer that knows its facts: an answer's worth is a
# number between 0 and 1, for being right, safe, polite, brief and well-formed. Its labelers do not
# see that number. They have a feeling for it, and choose answer $a$ over $b$ with the probability
#
# $$P(a \succ b) = \sigma(u(a) - u(b)), \qquad u = 30 \cdot \text{gold} + \text{length} \cdot
# \text{words},$$
#
# the model of [Bradley and Terry](https://www.jstor.org/stable/2334029). A careful labeler's length
# term is 0. Ours also likes answers for being long: 0.3 for each word.

# %%
from rlhf_jax.data.records import Prompt
from rlhf_jax.tasks.town.gold import gold_score
from rlhf_jax.tasks.town.labelers import Labeler, preference
from rlhf_jax.tasks.town.language import words_of
from rlhf_jax.tasks.town.town import Town

CAREFUL, LENGTHY = Labeler(lapses=0), Labeler(lapses=0, length=0.3)
town = Town()
# Two of the town's answers, one of which rambles.
pair = next(p for p in town.pairs(labeler=CAREFUL) if p.meta["styles"] == "plain/rambling")
prompt = Prompt(pair.id, pair.prompt, pair.meta)
print(prompt.messages[-1].content)
for text in (pair.chosen, pair.rejected):
    print(f"   gold {gold_score(prompt, text).total:.3f}, {len(words_of(text)):2} words: {text}")
prefers = {
    name: preference(labeler, prompt, pair.rejected, pair.chosen)
    for name, labeler in (("careful", CAREFUL), ("length-loving", LENGTHY))
}
print({name: round(probability, 3) for name, probability in prefers.items()}, "prefer the long one")

# %% [markdown]
# By hand: take the difference of the gold scores times 30, add 0.3 for each word more, and put the
# sum through $\sigma(x) = 1 / (1 + e^{-x})$.

# %%
gold, words = (
    of(pair.rejected) - of(pair.chosen)
    for of in (lambda text: gold_score(prompt, text).total, lambda text: len(words_of(text)))
)
np.testing.assert_allclose(prefers["careful"], 1 / (1 + np.exp(-30 * gold)))
np.testing.assert_allclose(prefers["length-loving"], 1 / (1 + np.exp(-30 * gold - 0.3 * words)))

# %% [markdown]
# Both label the same 4,000 pairs of answers. How often is the longer one chosen?

# %%
labelled = {"careful": [*town.pairs(labeler=CAREFUL)], "lengthy": [*town.pairs(labeler=LENGTHY)]}
edges = [1, 4, 8, 16, 24]
figure, axes = plt.subplots(figsize=(6, 3))
for name, pairs in labelled.items():
    more = np.array([len(words_of(p.chosen)) - len(words_of(p.rejected)) for p in pairs])
    place = np.digitize(abs(more), edges)  # 0: both are as long
    longer = [(more[place == i] > 0).mean() for i in range(1, len(edges) + 1)]
    labels = [*(f"{a} to {b - 1}" for a, b in pairwise(edges)), f"{edges[-1]} or more"]
    axes.plot(labels, longer, marker="o", label=name)
axes.axhline(0.5, color="grey", linewidth=0.8)
axes.set(title="how often the longer answer is chosen", xlabel="words more", ylim=(0, 1))
axes.legend()
plt.show()

# %% [markdown]
# ## Two reward models
#
# A reward model is a language model with one number in place of the next word's probabilities. Its
# loss is $-\log\sigma(r_{\rm chosen} - r_{\rm rejected})$. Here one learns from each labeler. They
# start from a chat model, which is pre-trained and fine-tuned first. Both are tried on the same
# held-out pairs, which a careful labeler has judged.


# %%
def run(config, name, *flags):
    """Runs a stage in runs/<name>; what it prints is kept there, too."""
    command = [sys.executable, "-m", "rlhf_jax.main", f"--config={config}"]
    command += [f"--workdir=runs/{name}", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(Path(f"runs/{name}/summary.json").read_text())["metrics"]


few = ["--config.train.steps=24"] if SMALL else []
run("pretrain", "pretrain", *few)
run("sft", "sft", "--config.init.policy=runs/pretrain", "--config.eval.count=16", *few)
learnt = {}
for name, pairs in labelled.items():
    lines = (
        {"prompt": [m.to_json() for m in p.prompt], "chosen": p.chosen, "rejected": p.rejected}
        for p in pairs
    )
    Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = ["--config.init.policy=runs/sft", f"--config.data.train={name}.jsonl", *few]
    learnt[name] = run("reward", name, *flags)
    low, high = learnt[name]["eval/accuracy_low"], learnt[name]["eval/accuracy_high"]
    print(
        f"{name}: right about {learnt[name]['eval/accuracy']:.0%} of pairs ({low:.0%} to "
        f"{high:.0%}), correlation with length {learnt[name]['eval/length_correlation']:+.2f}"
    )

# %% [markdown]
# The second one has learnt its labeler's taste. Nothing in its training said that length is not
# what matters.

# %%
of_length = {name: its["eval/length_correlation"] for name, its in learnt.items()}
assert SMALL or of_length["lengthy"] > of_length["careful"] + 0.4
assert SMALL or learnt["careful"]["eval/accuracy_low"] > 0.6

# %% [markdown]
# ## The best of n
#
# The simplest policy against a reward model trains nothing: sample $n$ answers, give the one it
# likes best. From many answers to each prompt one can compute what the best of any $n$ is worth on
# average, without bias ([paper](https://arxiv.org/abs/2112.09332)). The chat model answers held-out
# prompts many times each; both reward models score all answers, and so does the gold scorer.

# %%
from rlhf_jax.evaluation.gold_reward import verdicts_of
from rlhf_jax.evaluation.selection import best_of_n_curve
from rlhf_jax.rl.judge import Judge
from rlhf_jax.rl.rollouts import read_prompts, sample_answers
from rlhf_jax.stages import defaults
from rlhf_jax.training.saved_model import load_model

PROMPTS, SAMPLES = (8, 8) if SMALL else (96, 64)

# %%
# %%capture
# Scores as the models give them, in the units of u.
options = defaults.resolve(defaults.best_of_n(reward={"normalize": False}))
model = load_model("runs/sft")
asked = read_prompts(options, model.tokenizer, "town", "validation").take(range(PROMPTS))
answers = sample_answers(options, model, asked, samples=SAMPLES, seed=0, multiple=1)
table = {
    "gold": [verdict.total for verdict in verdicts_of(asked.records, answers.texts)],
    "words": [len(words_of(text)) for text in answers.texts],
}
for name in learnt:
    with Judge(options, {"reward": Path("runs", name)}, model) as judge:
        table[name] = judge.score(answers).total
table = {name: np.reshape(column, (PROMPTS, SAMPLES)) for name, column in table.items()}

# %%
NS = [1 << k for k in range(SAMPLES.bit_length())]


def curves(by, *columns):
    """What the best of n by a score has in each column, mean over prompts with intervals."""
    return [best_of_n_curve(by, table[column], NS) for column in columns]


def draw(axes, curve, **how):
    """A curve over n with its 95 % interval."""
    (line,) = axes.plot(NS, curve["mean"], marker="o", **how)
    axes.fill_between(NS, curve["low"], curve["high"], color=line.get_color(), alpha=0.12)


def name_axes(axes, title):
    """What is drawn, and over which n."""
    axes.set(title=title, xlabel="best of n", xscale="log")
    axes.set_xticks(NS, NS)
    axes.minorticks_off()


figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
chosen = {}
for name in learnt:
    (score,), (gold, words) = curves(table[name], name), curves(table[name], "gold", "words")
    chosen[name] = {"score": score["mean"], "gold": gold["mean"], "words": words["mean"]}
    draw(left, score, label=name)
    draw(right, gold)
name_axes(left, "what the reward model says")
name_axes(right, "what the answers are worth (gold)")
left.legend()
plt.show()

# %% [markdown]
# The scores go on rising. The worth rises with the first few choices, and then falls: among many
# answers there is one that the reward model is wrong about, and that is the one it picks. This is
# *over-optimisation* ([paper](https://arxiv.org/abs/2210.10760)), or Goodhart's law: it happens to
# the careful labeler's model, too. With the length-loving labeler's there was less to gain in the
# first place, and it falls far below what a single answer is worth.

# %%
for name, curve in chosen.items():
    peak = int(np.argmax(curve["gold"]))
    print(
        f"{name}: gold {curve['gold'][0]:.3f} for one answer, {curve['gold'][peak]:.3f} for the "
        f"best of {NS[peak]}, {curve['gold'][-1]:.3f} for the best of {NS[-1]}"
    )
    assert SMALL or (np.diff(curve["score"]) > 0).all()
    assert SMALL or curve["gold"][-1] < curve["gold"][peak] - 0.03
assert SMALL or max(chosen["careful"]["gold"]) > max(chosen["lengthy"]["gold"]) + 0.01
assert SMALL or chosen["lengthy"]["gold"][-1] < chosen["lengthy"]["gold"][0] - 0.05

# %% [markdown]
# What does it pick? Here are the answers that the length-loving labeler's model likes best of all,
# to the prompts where the gold scorer disagrees with it most.

# %%
favourite = table["lengthy"].argmax(1)
worth = table["gold"][np.arange(PROMPTS), favourite]
for i in np.argsort(worth - table["gold"].max(1))[:4]:
    text = answers.texts[i * SAMPLES + favourite[i]]
    print(f"{asked.records[i].messages[-1].content}\n   gold {worth[i]:.2f}: {text}")

# %% [markdown]
# ## Taking the bias away
#
# If the bias is known, it can be taken back. The labeler added 0.3 to an answer's utility for each
# word, and the reward model's scores are in the units of that utility. So subtract 0.3 for each
# word.

# %%
table["corrected"] = table["lengthy"] - 0.3 * table["words"]
gold, words = curves(table["corrected"], "gold", "words")
chosen["corrected"] = {"gold": gold["mean"], "words": words["mean"]}
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
for name in ("careful", "lengthy", "corrected"):
    left.plot(NS, chosen[name]["words"], marker="o", label=name)
    right.plot(NS, chosen[name]["gold"], marker="o")
name_axes(left, "words of the chosen answer")
name_axes(right, "what it is worth (gold)")
left.legend()
plt.show()

last = {name: (curve["gold"][-1], curve["words"][-1]) for name, curve in chosen.items()}
for name, (worth, length) in last.items():
    print(f"{name}: the best of {NS[-1]} is worth {worth:.3f} and has {length:.1f} words")
assert SMALL or last["corrected"][0] > last["lengthy"][0] + 0.1
assert SMALL or last["corrected"][1] < last["lengthy"][1] / 2
assert SMALL or last["corrected"][0] < max(chosen["corrected"]["gold"])

# %% [markdown]
# One number that is known of the labeler brings nearly everything back. It does not end
# over-optimisation: what is taken away is the error that somebody knew of, and the best of many
# finds the others.

# %% [markdown]
# ## Try
#
# * Other tastes: `Labeler(courtesy=3)` likes politeness, `Labeler(position=1)` what it sees first.
# * The same with training: `--config=ppo --config.init.reward=runs/lengthy`, then with
#   `--config.reward.scorers=model=1,length=-0.1`. `python -m rlhf_jax.compare` draws both.
# * Several reward models that must agree: `--config=ppo:ensemble`.
