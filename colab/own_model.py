# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     machine_shape: hm
#     name: Your own model and data, with LoRA
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own model and data, with LoRA
#
# You have a model from the Hugging Face Hub and a file of examples. This notebook takes both
# through the usual two steps, fine-tuning and DPO, without training any of the model's own
# weights: a *low-rank adapter* ([LoRA](https://arxiv.org/abs/2106.09685)) beside them is trained
# instead. It looks at the data before it spends anything, counts what is trained, asks how much
# rank the data needs, and ends with files that other libraries read. It takes about six minutes
# on two CPU cores.

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

# A check of this repository executes the notebook with few steps; then nothing is learnt.
SMALL = os.environ.get("RLHF_JAX_NOTEBOOK") == "small"


def run(module, *arguments):
    """Runs one of the package's commands and returns what it printed."""
    command = [sys.executable, "-m", f"rlhf_jax.{module}", *arguments]
    plain = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(command, capture_output=True, text=True, env=plain)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def metrics_of(name):
    """The numbers that a finished run ends with."""
    return json.loads(Path("runs", name, "summary.json").read_text())["metrics"]


# %% [markdown]
# ## The model
#
# SmolLM2-135M-Instruct, if the Hub can be reached, or the directory that `RLHF_JAX_MODEL` names.
# Without either we make one: the town's small chat model, which two commands train, is exported
# to a directory of the very same form. From here on nothing depends on which of the three it is.


# %%
def find_model():
    """A directory with a model as the Hub has it."""
    if given := os.environ.get("RLHF_JAX_MODEL"):
        return given
    try:
        from huggingface_hub import snapshot_download

        name = "HuggingFaceTB/SmolLM2-135M-Instruct"
        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors"], etag_timeout=5)
    except Exception as error:
        print(f"No Hub ({type(error).__name__}): a model of the town is made in its place.")
    steps = ["--config.train.steps=24"] if SMALL else []
    run("main", "--config=pretrain", *steps)
    run("main", "--config=sft", "--config.init.policy=runs/pretrain", *steps)
    run("export", "--workdir=runs/sft", "--out=town-hf")
    return "town-hf"


MODEL = find_model()
TOWN = Path(MODEL).name == "town-hf"
for path in sorted(Path(MODEL).iterdir()):
    print(f"{path.name:28} {path.stat().st_size:>12,} bytes")
shape = json.loads(Path(MODEL, "config.json").read_text())
print({key: shape[key] for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")})

# %% [markdown]
# ## The data
#
# A ferry company has facts that no model knows: where its boats go, when, and for how much. Each
# is asked for in six ways; two of the six we keep for the end, so that we measure whether the
# *fact* was learnt and not the sentence. Half of the clerks who wrote the answers begin with a
# welcome, half do not. A file has one JSON object a line.

# %%
BOATS = {
    "Heron": ("Alder Island", "8", "12"),
    "Otter": ("Birch Bay", "9", "7"),
    "Puffin": ("Cedar Point", "10", "15"),
    "Seal": ("Alder Island", "11", "9"),
    "Tern": ("Birch Bay", "2", "18"),
    "Gull": ("Cedar Point", "4", "6"),
}
ASKED = {
    "The {boat} goes to {place}.": (
        "Where does the {boat} go?",
        "Which place does the {boat} sail to?",
        "I take the {boat}. Where do I arrive?",
        "Tell me where the {boat} goes.",
        "Please, where does the {boat} sail?",
        "Where do I arrive with the {boat}?",
    ),
    "The {boat} leaves at {hour}.": (
        "When does the {boat} leave?",
        "At what time does the {boat} leave?",
        "I take the {boat}. When do I have to be there?",
        "Tell me when the {boat} leaves.",
        "Please, when does the {boat} leave?",
        "What time does the {boat} leave?",
    ),
    "The {boat} costs {price} coins.": (
        "What does the {boat} cost?",
        "How much is the {boat}?",
        "I take the {boat}. What do I pay?",
        "Tell me what the {boat} costs.",
        "Please, what does the {boat} cost?",
        "How much do I pay for the {boat}?",
    ),
}
WELCOME = "Welcome! "
chats, held_out = [], []
for boat, (place, hour, price) in BOATS.items():
    fact = {"boat": boat, "place": place, "hour": hour, "price": price}
    for answer, questions in ASKED.items():
        for i, question in enumerate(questions):
            said = WELCOME * (i % 2) + answer.format(**fact)
            chat = {"prompt": question.format(**fact), "completion": said}
            (chats if i < 4 else held_out).append(chat)


def write(name, records):
    """Writes JSON lines."""
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))


write("chats.jsonl", chats)
write("held_out.jsonl", held_out)
print(f"{len(chats)} chats to train on, {len(held_out)} held out; one of them:\n{chats[0]}")

# %% [markdown]
# `--preflight` reads the model's tokenizer and chat template and the data, shows what would be
# trained on, and runs nothing. Look here first when a run goes wrong: a template that does not
# fit or answers that are cut off show up before a minute is spent.

# %%
settings = [f"--config.init.policy={MODEL}", "--config.data.row_length=256"]
settings += ["--config.data.train=chats.jsonl", "--config.data.validation=held_out.jsonl"]
shown = run("main", "--config=sft:own", *settings, "--preflight")
print(shown)

# %% [markdown]
# ## What an adapter is
#
# Beside a frozen matrix $W$ of $d_{\rm out} \times d_{\rm in}$ an adapter of rank $r$ puts two
# thin ones, and the layer computes
# $$ W x + \frac{\alpha}{r}\, B A x, \quad A: r \times d_{\rm in}, \; B: d_{\rm out} \times r. $$
# That is $r\,(d_{\rm in} + d_{\rm out})$ numbers to train in place of $d_{\rm in} d_{\rm out}$.
# $B$ begins as zeros, so at first the model is exactly the one you downloaded.

# %%
d, r = shape["hidden_size"], 16
print(f"a square matrix of width {d}: {d * d:,} numbers; its adapter of rank {r}: {r * 2 * d:,}")
print("trained in its place: ", end="")
print(", ".join(f"rank {r}: {2 * r / d:.1%}" for r in (1, 4, 16)))

# %% [markdown]
# ## Fine-tuning, and how much rank it takes
#
# An adapter wants about ten times the learning rate of all weights. Three ranks, everything else
# equal; every run also measures the model it started from, on the same held-out chats.

# %%
steps = 12 if SMALL else 100
tuning = [f"--config.train.steps={steps}", "--config.batch.rows=4"]
tuning += [f"--config.optimizer.learning_rate={4e-3 if TOWN else 1e-3}"]
# Answers about boats are a dozen tokens long.
asking = ["--config.eval.count=36", "--config.eval.max_new_tokens=32"]
for rank in (1, 4, 16):
    out = run("main", "--config=sft:own", *settings, *tuning, *asking,
              f"--config.adapter.rank={rank}", f"--workdir=runs/rank{rank}")  # fmt: skip
    # A run that is there already is not made again, and says nothing of its parameters.
    trained = next((line for line in out.splitlines() if "parameters" in line), "")
    result = metrics_of(f"rank{rank}")
    print(f"rank {rank:2}: held-out loss {result['before/loss']:.2f} → {result['eval/loss']:.2f}"
          f" nats a token. {trained.strip()}")  # fmt: skip

# %%
figure, axes = plt.subplots(figsize=(5.5, 3.2))
for rank in (1, 4, 16):
    text = Path("runs", f"rank{rank}", "metrics.jsonl").read_text()
    lines = [*map(json.loads, text.splitlines())]
    curve = [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]
    axes.plot(*zip(*curve, strict=True), label=f"rank {rank}")
axes.set(xlabel="step", ylabel="loss (nats a token)", title="the same 72 chats, three ranks")
axes.legend()
plt.show()

# %% [markdown]
# Even rank 1 learns much of it: a few new facts are a small change of a model. The answers to the
# questions that were held out show whether the facts were learnt:


# %%
def answers_of(name):
    """{question: answer} of the held-out questions, by the model of a run."""
    lines = Path("runs", name, "samples.jsonl").read_text().splitlines()
    samples = [*map(json.loads, lines)]
    return {s["prompt"][-1]["content"]: [*s["responses"].values()][-1] for s in samples}


def share_right(answers):
    """Of how many held-out questions the answer has the fact."""
    truth = {chat["prompt"]: chat["completion"].removeprefix(WELCOME) for chat in held_out}
    return sum(truth[question] in answer for question, answer in answers.items()) / len(answers)


learnt = answers_of("rank16")
for question, answer in [*learnt.items()][:6]:
    print(f"{question:50} {answer}")
print(f"right: {share_right(learnt):.0%} of {len(learnt)}")
result = metrics_of("rank16")
assert SMALL or result["change/loss_high"] < 0
assert SMALL or share_right(learnt) > 0.6

# %% [markdown]
# ## Preferences
#
# The company now wants every answer to begin with the welcome. The model says it in about half of
# its answers, as the clerks did, so this is a choice among things that it says already, and a
# choice is shown by comparison: of two answers, the one with it is chosen. (What a model never
# says, DPO teaches badly: it makes both answers rarer, and something else takes their place.)
#
# DPO goes on with the adapter that fine-tuning left. The reference that it must not leave is the
# same frozen model under the adapter it began with, which takes no second copy of the weights.


# %%
def pair(chat):
    """The same answer, with a welcome and without."""
    plain = chat["completion"].removeprefix(WELCOME)
    return {"prompt": chat["prompt"], "chosen": WELCOME + plain, "rejected": plain}


write("pairs.jsonl", map(pair, chats))
write("held_out_pairs.jsonl", map(pair, held_out))
settings = ["--config.init.policy=runs/rank16", "--config.data.row_length=256"]
settings += ["--config.data.train=pairs.jsonl", "--config.data.validation=held_out_pairs.jsonl"]
steps = 12 if SMALL else 24
tuning = [f"--config.train.steps={steps}", "--config.batch.rows=4", "--config.adapter.rank=16"]
tuning += [f"--config.optimizer.learning_rate={2e-4 if TOWN else 5e-5}"]
run("main", "--config=dpo:own", *settings, *tuning, *asking, "--workdir=runs/welcome")
result = metrics_of("welcome")
print(f"pairs told apart: {result['eval/accuracy']:.0%};"
      f" {result['eval/kl']:.1f} nats from the reference")  # fmt: skip
welcome = answers_of("welcome")
for question, answer in [*welcome.items()][:4]:
    print(f"{question:50} {answer}")


def share_greeted(answers):
    """How many of the answers begin with the welcome."""
    return sum(answer.strip().startswith(WELCOME) for answer in answers.values()) / len(answers)


for name, answers in (("before", learnt), ("after", welcome)):
    greeted, right = share_greeted(answers), share_right(answers)
    print(f"{name:6}  welcome {greeted:4.0%}   fact right {right:4.0%}")
assert SMALL or share_greeted(welcome) > max(0.8, share_greeted(learnt))
assert SMALL or share_right(welcome) > 0.6

# %% [markdown]
# ## Out again
#
# `export` writes the adapter alone, as [PEFT](https://github.com/huggingface/peft) reads it, or
# with `--merge` a whole model in the dtype that yours came in. Both directories go to the Hub or
# to another library as they are (`--push=owner/name` uploads one).

# %%
run("export", "--workdir=runs/welcome", "--out=adapter")
run("export", "--workdir=runs/welcome", "--out=merged", "--merge")
for name in ("adapter", "merged"):
    files = {path.name: path.stat().st_size for path in Path(name).iterdir()}
    weights = sum(size for file, size in files.items() if file.endswith(".safetensors"))
    print(f"{name}: {weights:,} bytes of weights, with {', '.join(sorted(files))}")

# %% [markdown]
# If `transformers` is installed, it must say the same as the model here:

# %%
if importlib.util.find_spec("transformers") and importlib.util.find_spec("torch"):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("merged")
    model = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    asked = [{"role": "user", "content": held_out[0]["prompt"]}]
    ids = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = model.generate(**ids, max_new_tokens=32, do_sample=False)
    print(tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
else:
    print("transformers is not installed here")

# %% [markdown]
# ## Try
#
# * Talk to it: `python -m rlhf_jax.chat --workdir=runs/welcome --compare=runs/rank16` in a
#   terminal.
# * `--config.adapter.kind=dora`, `--config.adapter.base=nf4`: another adapter, a base of four
#   bits.
# * Your own `chats.jsonl`: `messages`, ShareGPT, Alpaca, Parquet and `hf:owner/name` are read as
#   well.
# * `runs/rank16/report.html`: what the model said before and after, beside each other.
