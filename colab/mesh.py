# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     machine_shape: hm
#     name: A mesh of TPUs, what lies where, and what fits
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A mesh of TPUs: what lies where, and what fits
#
# A model that one chip cannot hold is spread over several. This notebook shows how: which part of
# which array lies on which chip, what the chips tell each other in one step, that nothing of it
# changes what is learnt, how the TPU's own attention kernel keeps packed texts apart, and whether
# a run would fit a chip before anyone pays for it. It runs on Colab's TPU, and on a laptop, where
# eight devices are made of the processor and Google's compiler is asked about the chip. About
# four minutes on two CPU cores.

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

from rlhf_jax.models.lora import param_count
from rlhf_jax.stages.chain import load_config
from rlhf_jax.stages.defaults import resolve
from rlhf_jax.training.mesh import make_mesh, placed
from rlhf_jax.trees import named_leaves

# A check of this repository executes the notebook with few steps.
SMALL = os.environ.get("RLHF_JAX_NOTEBOOK") == "small"
CHIPS = 8
# This notebook takes the chip itself, if there is one. Beside it there are eight devices of the
# processor, which exchange what eight chips would.
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS"))
jax.config.update("jax_num_cpu_devices", CHIPS)
ON_TPU = jax.default_backend() == "tpu"
DEVICES = jax.devices("cpu")[:CHIPS]

# %% [markdown]
# ## What lies where
#
# A mesh gives the chips names: here two by two by two, along the axes *data*, *fsdp* and
# *tensor*. Rows of a batch are split over data and fsdp. Parameters are split over fsdp and
# tensor, by a short table of rules on their names, and every chip along data has the same ones.
# So a chip of these eight holds a quarter of each large matrix.

# %%
from rlhf_jax.models import transformer
from rlhf_jax.plan.steps import model_shape

config = resolve(load_config("experiments/pretrain.py"))
shape = model_shape(config)
params = jax.jit(transformer.init, static_argnums=0)(shape, jax.random.key(0))
mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, DEVICES)
on_mesh = placed(mesh, params)
for name, array in named_leaves(on_mesh).items():
    if not name.endswith("scale"):
        here = array.addressable_shards[0].data.shape
        print(f"{name:29} {array.shape!s:13} a chip has {here!s:13} {array.sharding.spec}")

# %%
figure, panels = plt.subplots(1, 3, figsize=(10, 3.2))
shown = named_leaves(on_mesh)
for axes, name in zip(
    panels, ("layers/attention/query/kernel", "layers/attention/out/kernel", "embed/embedding"),
    strict=True,
):  # fmt: skip
    array = shown[name]
    owner = np.zeros(array.shape)
    for shard in reversed(array.addressable_shards):
        owner[shard.index] = shard.device.id  # the first of those that hold it
    layer = owner.reshape(-1, *owner.shape[-2:])[0]
    axes.imshow(layer, cmap="tab10", vmin=0, vmax=9, aspect="auto")
    axes.set(title=name.removeprefix("layers/"), xticks=[], yticks=[])
figure.suptitle("The same colour lies on the same chip (the other four have a copy)", y=1.05)
plt.show()

# %% [markdown]
# ## What the chips tell each other
#
# With everything split over fsdp a chip holds an eighth of every matrix. Before a layer is
# computed its eighths are **gathered** from all chips, used, and dropped; in the backward pass
# they are gathered again, and the gradient of a layer is summed and **scattered**, so that each
# chip gets the sum for the eighth it holds.
#
# The word table is the exception, as it is the largest matrix of a small model. The loss gathers
# the *hidden states* of all tokens in its place, and each chip computes the logits of its own
# eighth of the words. So let the layers take $P$ bytes and the hidden states $H$: expect $2P + H$
# gathered, and $(P + H)/8$ scattered to each chip. (An older compiler for processors keeps what it
# has gathered for the backward pass, and gathers $P + H$.) The next cell compiles the update that
# pre-training runs, and counts the messages in the compiled program.

# %%
from rlhf_jax.devices import planning_for
from rlhf_jax.plan.compiled_text import count
from rlhf_jax.plan.steps import steps_of

split = load_config("experiments/pretrain.py")
split.mesh.fsdp = CHIPS
with planning_for(DEVICES):
    update = steps_of(resolve(split))[0]
    text = update.lower().compile().as_text()
counted = count(text, CHIPS)
layers = 4 * param_count(params["layers"])
hidden = 4 * config.batch.rows * config.data.row_length * shape.width
print(f"layers: {layers / 1e6:.2f} MB of float32, hidden states: {hidden / 1e6:.2f} MB")
messages = counted.collectives
for kind, (times, received) in messages.items():
    print(f"{kind:15} {times:3} times, {received / 1e6:6.2f} MB on each chip")
gathers = (messages["all-gather"][1] - hidden) / layers
assert np.isclose(gathers, round(gathers), atol=0.02) and round(gathers) in (1, 2)
np.testing.assert_allclose(messages["reduce-scatter"][1], (layers + hidden) / CHIPS, rtol=0.02)
assert messages["all-reduce"][1] < 0.01 * layers  # metrics, and gradients of the norms' scales

# %% [markdown]
# The embeddings of the tokens that are read come by an all-to-all: every chip sends the others
# its part of the rows they need.
#
# ## Nothing of it changes what is learnt
#
# The same command on one device and on eight. Sums are added in another order, so the numbers
# agree to rounding and not to the last bit.


# %%
def losses_on(devices, *flags):
    """The loss of each of the first updates on so many devices of the processor."""
    name = f"runs/on-{devices}"
    command = [sys.executable, "-m", "rlhf_jax.main", "--config=pretrain", f"--workdir={name}"]
    command += [f"--config.train.steps={2 if SMALL else 6}", "--config.train.log_every=1"]
    command += ["--config.optimizer.warmup_steps=1", *flags]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    print(next(line for line in done.stdout.splitlines() if line.startswith("training on")))
    lines = map(json.loads, Path(name, "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


one = losses_on(1)
eight = losses_on(CHIPS, "--config.mesh.fsdp=4", "--config.mesh.tensor=2")
for step, (a, b) in enumerate(zip(one, eight, strict=True), 1):
    print(f"step {step}: {a:.6f} on one device, {b:.6f} on eight")
np.testing.assert_allclose(one, eight, rtol=1e-4)

# %% [markdown]
# ## Attention that keeps packed texts apart
#
# A row is filled with several texts, and two answers may even share one prompt. Who may see whom
# is then no plain triangle:

# %%
from rlhf_jax.models.attention import attention_bias
from rlhf_jax.models.fused_attention import check_attention, random_rows

rows = random_rows(np.random.default_rng(3), 1, 96, branches=True)
bias = attention_bias(rows["positions"], rows["segment_ids"], rows["branch_ids"])
figure, axes = plt.subplots(figsize=(3.6, 3.6))
axes.imshow(np.asarray(bias).reshape(96, 96) > -1, cmap="Greys")
axes.set(xlabel="seen token", ylabel="token that looks", title="who sees whom in a packed row")
plt.show()

# %% [markdown]
# On a TPU the *splash* kernel computes attention without ever storing these scores. It knows
# texts but not branches, so the model adds a few numbers to queries and keys whose product hides
# one branch from another (`models/splash.py`). Before a run uses a kernel, it compares it with
# the plain computation on random packed rows, gradients included. Without a TPU the kernel is
# interpreted.

# %%
import dataclasses

kernel = dataclasses.replace(shape, attention="splash").validate()
error = check_attention(kernel, 128, interpret=not ON_TPU)
print(f"largest relative error of output and gradients: {error:.1e}")
assert error < (1e-2 if ON_TPU else 1e-5)

# %% [markdown]
# ## Does it fit?
#
# Training in float32 with AdamW keeps four numbers of four bytes for each parameter: itself, two
# averages and its gradient. A LoRA run keeps two bytes (bfloat16) and little else. That alone,
# without a single activation, says how many chips of a kind it takes:

# %%
from rlhf_jax.plan.chips import CHIPS as KINDS

v5e = KINDS["v5e"].memory
figure, axes = plt.subplots(figsize=(5.5, 3.2))
for shift, size, label in ((-0.2, 16, "all weights"), (0.2, 2, "LoRA")):
    needed = [int(np.ceil(billions * 1e9 * size / v5e)) for billions in (1, 8, 70)]
    bars = axes.bar(np.arange(3) + shift, needed, 0.38, label=label)
    axes.bar_label(bars)
axes.set(yscale="log", ylim=(0.5, 200), ylabel="chips", title="v5e chips, before any activation")
axes.set_xticks(range(3), ["1B", "8B", "70B"])
axes.legend()
plt.show()
assert v5e > 8e9 * 16 / 8  # 8B: on eight, if activations leave room

# %% [markdown]
# Activations, the loss and temporary copies can only be told by compiling. `rlhf_jax.plan`
# compiles every step of an experiment with the chip's own compiler, which needs no chip: the
# TPU's comes with `pip install libtpu`. The same command takes any experiment, model directory
# and mesh.

# %%
if "google.colab" in sys.modules and importlib.util.find_spec("libtpu") is None:
    subprocess.check_call([sys.executable, "-m", "pip", "install", "--quiet", "libtpu"])
CAN_ASK = sys.version_info >= (3, 12) and importlib.util.find_spec("libtpu") is not None
topology = "v5e:1x1" if CAN_ASK and not SMALL else "cpu"
if topology == "cpu":
    print("Without libtpu, or for few steps, a processor is planned for.")
command = [sys.executable, "-m", "rlhf_jax.plan", "--config=pretrain", f"--topology={topology}"]
command += ["--config.batch.rows=64", "--config.data.row_length=512"]
plain = os.environ | {"COLUMNS": "110", "NO_COLOR": "1", "TERM": "dumb", "JAX_PLATFORMS": "cpu"}
done = subprocess.run(command, capture_output=True, text=True, env=plain)
assert done.returncode == 0, done.stderr[-2000:]
print(done.stdout)

# %% [markdown]
# ## Try
#
# * `--config.compute.remat=full` or `--config.model.remat=full`: what does the backward pass
#   keep?
# * `--config=llama.py:dpo-8b --topology=v5e:4x4 --config.mesh.fsdp=16`: a real size, some
#   minutes.
# * `--search`: let it try meshes, microbatches and rematerialisation until the fastest that fits.
