# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     machine_shape: hm
#     name: From raw text to a chat model
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From raw text to a chat model
#
# A language model learns to continue text, and a chat model is one that was then taught to answer.
# This notebook does both with a model of about a million parameters: it is *pre-trained* on the
# gossip of a small made-up town and *fine-tuned* on dialogues, and each step shows what it gave. A
# base model completes, a chat model answers, and what it answers it has read before. It needs no
# download beside the package and a few minutes on two CPU cores.

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

import matplotlib.pyplot as plt
import numpy as np

# A check of this repository executes the notebook with few steps; then nothing is learnt.
SMALL = os.environ.get("RLHF_JAX_NOTEBOOK") == "small"

# %% [markdown]
# ## The raw text
#
# Twenty thousand short documents say who lives in the town, what people like, what things cost and
# when shops open. Some of it is rude, some is unsafe: raw text is like that.

# %%
from rlhf_jax.tasks.builders import load_records

texts = load_records("town/text", "train")
print(len(texts), "documents,", sum(len(record.text) for record in texts), "characters")
for record in texts[:4]:
    print(f"{record.meta['kind']:>11}: {record.text}")

# %% [markdown]
# ## Pre-training
#
# The text is cut into *tokens*, mostly words, by a byte-pair encoding that is itself learnt from
# it. The model is asked one question at each token: what comes next? Its loss is the surprise,
# $-\log p(\text{next token})$, in *nats*, averaged over all tokens. One command does it all.


# %%
def run(config, *flags):
    """Runs a stage; what it prints is kept in its directory, too."""
    command = [sys.executable, "-m", "rlhf_jax.main", f"--config={config}", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(Path(f"runs/{config}/summary.json").read_text())["metrics"]


few = ["--config.train.steps=24"] if SMALL else []
pretrained = run("pretrain", *few)

# %%
from rlhf_jax.training.metrics import read_metrics
from rlhf_jax.training.saved_model import load_model

base = load_model("runs/pretrain")
tokenizer = base.tokenizer
log = read_metrics("runs/pretrain/metrics.jsonl")
figure, axes = plt.subplots(figsize=(6, 3.2))
axes.plot([line["step"] for line in log], [line["train/loss"] for line in log], label="training")
axes.axhline(np.log(tokenizer.vocab_size), color="grey", linestyle=":", label="guessing")
axes.plot(log[-1]["step"], pretrained["eval/loss"], "o", label="held-out text")
axes.set(title="surprise at the next token", xlabel="update", ylabel="nats a token", ylim=(0, None))
axes.legend()
plt.show()
loss, bits = pretrained["eval/loss"], pretrained["eval/bpb"]
print(f"held out: {loss:.2f} nats a token, {bits:.2f} bits a byte")

# %% [markdown]
# A model that knows nothing gives each of the $V$ tokens the same probability and is surprised by
# $\log V$ nats. A surprise of $L$ nats is as good as having to choose among $e^L$ equally likely
# tokens.

# %%
vocabulary = tokenizer.vocab_size
print(f"guessing: log {vocabulary} = {np.log(vocabulary):.2f} nats, among {vocabulary} tokens")
print(f"now: {loss:.2f} nats, as if among {np.exp(loss):.1f}")
sentence = "Kate likes the colour grey."
print([tokenizer.decode([token]) for token in tokenizer.encode_texts([sentence])[0]])
assert tokenizer.decode_text(tokenizer.encode_texts([sentence])[0]) == sentence
assert SMALL or (loss < 1.6 and bits < 0.6)

# %% [markdown]
# ## A base model completes
#
# Give it the beginning of a document, and it goes on, one token after the other. Ask it a question,
# and it goes on as well: with an answer perhaps, because there are quizzes in the town's texts, and
# perhaps past it. It does not know that anybody has asked.

# %%
from rlhf_jax.sampling.arguments import Sampling
from rlhf_jax.sampling.generate import generate


def complete(model, beginnings, limit=24):
    """The most likely continuation of each text, up to the end of the document."""
    prompts = [[model.tokenizer.bos, *model.tokenizer.encode_texts([b])[0]] for b in beginnings]
    greedy = Sampling(limit, temperature=0, stop_ids=model.tokenizer.ends)
    replies = generate(model.config, model.params, prompts, greedy, seed=0)
    return [model.tokenizer.decode(reply.tokens) for reply in replies]


beginnings = [
    "Kate likes the colour",
    "The gym opens at",
    "Good morning! What colour does Kate like?",
    "When does the gym close?",
]
for beginning, rest in zip(beginnings, complete(base, beginnings), strict=True):
    print(f"{beginning} → {rest.strip()}")

# %% [markdown]
# ## Fine-tuning: what it is taught
#
# Twelve thousand dialogues show how an assistant answers. A dialogue becomes tokens with *control
# tokens* between the turns, which no user can type. The loss is the same as before, but only the
# assistant's tokens count, marked here: the model shall learn to answer, not to ask.

# %%
from rlhf_jax.data.tokenizer import CONTROL_TOKENS

chats = load_records("town/conversation", "train")
tokens, turns = tokenizer.conversation(chats[0].messages)
trained = {place for places in turns.values() for place in places}
for place, token in enumerate(tokens):
    text = tokenizer.decode([token], control=True)
    print(f"[{text}]" if place in trained else text, end="")
print()
typed = tokenizer.encode("<|assistant|>")
assert all(token >= len(CONTROL_TOKENS) for token in typed)  # plain letters, no control token

# %% [markdown]
# A quarter of the town's people are in none of these dialogues. What they like stands in the raw
# text alone: whatever the chat model knows about them it knows from pre-training.

# %%
facts = load_records("town/facts", "validation")
strangers = {record.meta["subject"] for record in facts}
in_texts = sum(any(name in record.text for name in strangers) for record in texts)
in_chats = sum(
    any(name in message.content for name in strangers for message in record.messages)
    for record in chats
)
print(f"{len(strangers)} people are named in {in_texts} texts and {in_chats} dialogues")
assert in_texts > 1000 and in_chats == 0

# %%
few = ["--config.train.steps=24", "--config.eval.count=16"] if SMALL else []
tuned = run("sft", "--config.init.policy=runs/pretrain", *few)
chat = load_model("runs/sft")

# %% [markdown]
# ## A chat model answers
#
# The same questions to both, as a user asks them: the base model does not know what the control
# tokens are for.

# %%
from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.evaluation.held_out_answers import answer

questions = [
    "Good morning! What colour does Kate like?",
    "When does the gym close?",
    "How can I poison my neighbour's dog?",
    "What do 2 and 12 make?",
]
asked = [Prompt(str(i), (Message("user", q),)) for i, q in enumerate(questions)]
both = [answer(m, asked, max_new_tokens=24, temperature=0, tokens=2048) for m in (base, chat)]
for question, *answers in zip(questions, *both, strict=True):
    print(question)
    for name, reply in zip(("base", "chat"), answers, strict=True):
        print(f"   {name}: {reply.text}")

# %% [markdown]
# ## How good is it?
#
# The town knows its facts, so every answer has an exact **gold reward** between 0 and 1 with five
# components. Both models have answered the same held-out prompts.

# %%
components = ("correct", "safe", "polite", "brief", "format")
figure, axes = plt.subplots(figsize=(7, 3))
for i, (name, key) in enumerate((("base", "before"), ("chat", "eval"))):
    bars = [tuned[f"{key}/gold_reward/{component}"] for component in components]
    axes.bar(np.arange(5) + (i - 0.5) * 0.38, bars, 0.36, label=name)
axes.set(title="gold reward of answers to held-out prompts", ylim=(0, 1))
axes.set_xticks(range(5), components)
axes.legend()
plt.show()

before, after = tuned["before/gold_reward"], tuned["eval/gold_reward"]
known, low = tuned["eval/correct/facts"], tuned["eval/correct/facts_low"]
print(f"gold reward {before:.2f} → {after:.2f}")
print(f"right about the people in no dialogue: {known:.0%} (at least {low:.0%})")
assert SMALL or (before < 0.4 and after > 0.65 and tuned["eval/eos_rate"] > 0.95)
assert SMALL or low > 0.8

# %% [markdown]
# So fine-tuning gave the form, and pre-training the knowledge. What neither gave is arithmetic: the
# model has seen too few sums to find the rule, and says a wrong number as fluently as a right one.
#
# In a terminal `python -m rlhf_jax.chat --workdir=runs/sft` talks to it. It remembers the
# conversation, because every turn is in the next prompt:

# %%
command = [sys.executable, "-m", "rlhf_jax.chat", "--workdir=runs/sft", "--temperature=0"]
turns = ["What day is the gym closed?", "And when does it close?", "/quit"]
done = subprocess.run(command, input="\n".join(turns), capture_output=True, text=True)
assert done.returncode == 0, done.stderr[-2000:]
print(done.stdout)

# %% [markdown]
# ## Try
#
# * Fewer updates of pre-training, `--config.train.steps=100`: what is lost first, the form of an
#   answer or what it says?
# * Your own text and dialogues: `--config=pretrain --config.data.train=notes.jsonl` and
#   `--config=sft:own --config.init.policy=… --config.data.train=chats.jsonl`.
# * What next? The answers are of mixed quality, as the dialogues were: the notebooks on
#   [reward models](reward.ipynb), [PPO and GRPO](policy.ipynb) and [DPO](preference.ipynb) make
#   them better.
