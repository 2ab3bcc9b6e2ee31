"""Plans: what is compiled is what runs, what is counted is known, mistakes are one line."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.devices import planning_for
from rlhf_jax.errors import UserError
from rlhf_jax.models import init
from rlhf_jax.plan import plan as plans
from rlhf_jax.plan import steps
from rlhf_jax.plan.__main__ import main
from rlhf_jax.plan.chips import CHIPS, Chip, devices_of
from rlhf_jax.plan.compiled_text import Collective, Counted
from rlhf_jax.plan.estimates import Estimate, estimate, table
from rlhf_jax.stages import sft
from rlhf_jax.stages.chain import load_config
from rlhf_jax.stages.checks import check_devices
from rlhf_jax.stages.defaults import base, on_policy, online_preference, resolve
from rlhf_jax.stages.experiments import PACKAGED
from rlhf_jax.training.learner import make_learner
from rlhf_jax.training.mesh import make_mesh, placed, shard_batch

SMALL = {"layers": 1, "width": 16, "heads": 1, "kv_heads": 1, "head_dim": 16, "mlp_width": 16}


@pytest.fixture
def hub(tmp_path):
    """A directory of which a plan can know the shape, and no more."""
    document = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "hidden_act": "silu", "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(document))
    return str(tmp_path)


def pretraining(**sections):
    return base("pretrain", model={"preset": "tiny", **SMALL}, data={"row_length": 64}, **sections)


def stages(hub):
    """A small config of every stage that starts from a directory."""
    shared = {"init": {"policy": hub}, "data": {"row_length": 64}, "batch": {"rows": 8}}
    sampled = {"rollout": {"prompts": 8, "samples": 2, "slots": 8, "max_prompt_tokens": 16,
                           "max_new_tokens": 16}, "reward": {"scorers": "length=1"}}  # fmt: skip
    for name in ("sft", "reward", "preference"):
        yield name, base(name, **shared)
    for name in ("ppo", "grpo"):
        yield name, on_policy(name, **shared, **sampled)
    yield "online_preference", online_preference(**shared, **sampled)
    of_best = {**sampled, "rollout": {"slots": 8, "max_prompt_tokens": 16, "max_new_tokens": 16}}
    yield "best_of_n", base("best_of_n", **shared, **of_best, best_of_n={"n": 2})


STEPS = {
    "sft": ["update"],
    "reward": ["update"],
    "preference": ["update", "reference"],
    "ppo": ["update", "update of the critic", "values", "scoring", "decode 16 tokens"],
    "grpo": ["update", "scoring", "decode 16 tokens"],
    "online_preference": ["update", "reference", "decode 16 tokens"],
    "best_of_n": ["update", "decode 16 tokens"],
}


def test_every_stages_steps_are_lowered_on_a_mesh(hub):
    devices = jax.devices()[:4]
    for name, config in stages(hub):
        config.mesh.fsdp = 2
        with planning_for(devices):
            found = steps.steps_of(resolve(config))
            for step in found:
                step.lower()
        assert [step.name for step in found] == STEPS[name]
        update = found[0]
        total = sum(map(steps.device_bytes, (update.holds["parameters"],)))
        if name == "sft":  # AdamW holds two numbers a parameter, and a count
            assert steps.device_bytes(update.holds["optimizer"]) == pytest.approx(2 * total, abs=64)


def test_what_is_planned_is_what_runs(hub):
    config = resolve(next(config for name, config in stages(hub) if name == "sft"))
    devices = jax.devices()[:4]
    with planning_for(devices):
        (step,) = steps.steps_of(config)
        planned = step.lower()
    mesh, shape = make_mesh({"data": 4}, devices), steps.model_shape(config)
    params = placed(mesh, init(shape, jax.random.key(0)))
    loss = lambda params, batch, rng: sft.loss(config, shape, params, batch, rng)  # noqa: E731
    learner = make_learner(config, config.optimizer, params, loss, updates=100, mesh=mesh)
    batch = {k: np.zeros(x.shape, x.dtype) for k, x in step.holds["batch"].items()}
    real = learner.step.lower(learner.init(), shard_batch(mesh, batch))
    assert planned.as_text() == real.as_text()
    held = sum(steps.device_bytes(tree) for tree in step.holds.values())
    used = real.compile().memory_analysis().argument_size_in_bytes
    assert held == pytest.approx(used, abs=64)  # by the number of steps, and the like


def test_an_adapter_holds_little_more_than_its_base(hub):
    config = resolve(base("sft", init={"policy": hub}, adapter={"rank": 2, "base": "bfloat16"}))
    with planning_for(jax.devices()[:1]):
        (step,) = steps.steps_of(config)
        step.lower()
    trained, frozen = step.holds["parameters"]
    numbers = sum(x.size for x in jax.tree.leaves(trained))
    assert numbers == 2 * 2 * sum(a + b for a, b in ((16, 16), (16, 8), (16, 8), (16, 16),
                                                     (16, 32), (16, 32), (32, 16)))  # fmt: skip
    kernels = frozen["layers"]["mlp"]["up"]["kernel"]
    assert kernels.dtype == jnp.bfloat16
    assert steps.device_bytes(step.holds["optimizer"]) == pytest.approx(8 * numbers, abs=16)


def test_the_shape_comes_from_the_parent_chain():
    shape = steps.model_shape(resolve(load_config("experiments/grpo.py")))
    assert (shape.vocab_size, shape.layers, shape.remat) == (2048, 2, "dots")


def test_a_parent_is_the_experiment_beside_the_config(tmp_path, capsys, monkeypatch):
    own = tmp_path / "experiments"
    own.mkdir()
    for name in ("dpo.py", "sft.py"):
        shutil.copy(PACKAGED / name, own)
    (own / "pretrain.py").write_text(
        "from rlhf_jax.stages.defaults import base\n"
        "def get_config():\n"
        "    return base('pretrain', model={'preset': 'tiny', 'max_length': 320})\n"
    )
    planned = []
    monkeypatch.setattr(plans, "plan", lambda given, *_, **__: planned.append(resolve(given)))
    assert plan(capsys, f"--config={own}/dpo.py", "--topology=cpu")[0] == 0
    assert steps.model_shape(planned[0]).max_length == 320  # as a run's would be


def test_kept_is_what_the_backward_pass_needs():
    def loss(params, batch, rng):
        return (jnp.sin(batch["x"] @ params["w"]).sum(), 1.0), {}

    params = {"w": jax.ShapeDtypeStruct((3, 5), jnp.float32)}
    batch = {"x": jax.ShapeDtypeStruct((7, 3), jnp.float32)}
    assert steps._kept(loss, params, batch) == 7 * 5 * 4  # the cosine; x is the batch's


CHIP = Chip(memory=2**30, flops=1e12, bandwidth=1e9, link=1e8, clock=1e9)


def made(counted, **changes):
    step = steps.Step("update", lambda: None, {}, 10, 4e9, 2e9, 0, 1)
    return dataclasses.replace(step, **changes), counted


def test_seconds_add_up_as_stated():
    from rlhf_jax.plan.estimates import _seconds

    def send(size, overlapped):
        return Collective("collective-permute", "f32[1]", size, 2, False, overlapped)

    calls = {send(10**7, True): 1, send(10**6, False): 3}
    step, counted = made(Counted(calls, {"tpu_custom_call": 2}, 10**8, 0))
    # 0.1 s of cycles and 2 ms of kernels hide 0.1 s of messages; 30 ms of others are seen.
    assert _seconds(step, counted, 0, CHIP) == pytest.approx(0.102 + 0.03)
    assert _seconds(step, counted, 3 * 10**8, CHIP) == pytest.approx(0.302 + 0.03)
    card = dataclasses.replace(CHIP, clock=0)
    step, counted = made(Counted({}, {}, 0, 10**11))
    assert _seconds(step, counted, 0, card) == pytest.approx(0.1)
    assert _seconds(step, counted, 0, devices_of("cpu")[0]) is None


def test_only_what_crosses_hosts_goes_by_the_network():
    from rlhf_jax.plan.chips import NETWORK
    from rlhf_jax.plan.estimates import _seconds

    def gathered(span):
        each = Collective("collective-permute", "f32[1]", 10**9, 8, False, False, span)
        return _seconds(*made(Counted({each: 1}, {}, 0, 0)), 0, card)

    card = dataclasses.replace(CHIP, clock=0, host=8, link=4e11)
    assert gathered(8) == pytest.approx(1e9 / 4e11)
    assert gathered(9) == pytest.approx(1e9 / NETWORK)


def test_a_table_says_what_of_it_are_estimates():
    step, counted = made(Counted({}, {}, 10**8, 0), kept=2**29)
    lines = table([Estimate(step, {"parameters": 2**30}, counted, 0.1)], CHIP, chips=2)
    assert "| parameters, GiB | 1 |" in lines
    assert "| of these kept activations, at most | 0.5 |" in lines
    assert "| model FLOP/s of the peak, estimated | 2.0% |" in lines
    assert "| tokens a second, all chips, estimated | 100 |" in lines


@pytest.mark.parametrize(
    "words",
    [
        "Ran out of memory in memory space hbm. Used 21.05G of 15.75G hbm.",
        "CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (21.05G) exceeds available HBM (15.75G). HLO module: jit_f.",
    ],
)
def test_the_compilers_refusal_is_no_crash(words):
    def refuse():
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {words}")

    step, _ = made(None, lower=refuse)
    refused = estimate(step, CHIP, 1)
    assert refused.counted is None and refused.needed == pytest.approx(21.05 * 2**30, rel=1e-6)
    assert not plans._fits(refused, dataclasses.replace(CHIP, memory=2**40))

    def unsupported():
        raise NotImplementedError("heads of 256")

    with pytest.raises(UserError, match="update: the compiler refuses it: heads of 256"):
        estimate(dataclasses.replace(step, lower=unsupported), CHIP, 1)


def test_a_clock_is_the_products_a_second_of_the_matrix_units():
    for name, chip in CHIPS.items():
        assert min(chip.memory, chip.flops, chip.bandwidth, chip.link) > 0
        if chip.clock:
            cells = 4 * 256**2 if name in ("v6e", "tpu7x") else 4 * 128**2
            cells *= 2 if name == "v5p" else 1  # a device is a chip's two cores
            assert chip.flops / 2 / cells == pytest.approx(chip.clock, rel=0.01)


def test_links_are_those_of_the_topology(monkeypatch):
    from rlhf_jax.plan import chips

    monkeypatch.setattr(chips, "_described", lambda unknown, **how: [how])
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    rates = {name: devices_of(name)[0].link for name in ("v5p:2x2x1", "v5p:4x4x4", "v5e:1x1")}
    assert rates == {"v5p:2x2x1": 2 * 90e9, "v5p:4x4x4": 6 * 90e9, "v5e:1x1": 45e9}
    assert devices_of("h100:16")[0].link == CHIPS["h100"].link
    assert [devices_of(f"h100:{n}")[0].host for n in (4, 8, 12, 16)] == [4, 8, 4, 8]
    assert devices_of("h100:16")[1][0]["topology"] == "1x2x8"
    # JAX lets a program use three quarters of a GPU, if not told otherwise, and all of a TPU.
    assert devices_of("h100:8")[0].memory == int(0.75 * CHIPS["h100"].memory)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert devices_of("h100:8")[0].memory == int(0.9 * CHIPS["h100"].memory)
    assert devices_of("v5e:1x1")[0].memory == CHIPS["v5e"].memory


def plan(capsys, *flags):
    code = main([*flags])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize(
    "topology", ["v9:2x2", "v5e", "h100:0", "h100:2x2", "v5e:four", "v5e:4x4x4"]
)
def test_an_unknown_topology_lists_the_known(topology, capsys):
    code, _, err = plan(capsys, "--config=experiments/sft.py", f"--topology={topology}")
    assert code == 2 and err.count("\n") == 1
    assert all(name in err for name in CHIPS)


def test_a_plan_of_this_machine_is_printed(hub, capsys):
    flags = [f"--config.init.policy={hub}", "--config.data.row_length=64", "--topology=cpu"]
    code, out, err = plan(capsys, "--config=experiments/dpo.py:own", *flags)
    assert code == 0, err
    assert re.search(r"\| of one chip \| update \| reference \|\n\| --- ", out)
    assert re.search(r"^fits cpu: update needs 0.\d\d of ", out, re.M)
    assert "estimated" not in out  # of a CPU no rates are known


def test_a_plan_refuses_what_a_run_refuses(hub, capsys):
    flags = ["--config=experiments/dpo.py:own", "--topology=cpu", f"--config.init.policy={hub}"]
    code, _, err = plan(capsys, *flags, "--config.compute.attention=splash")
    assert code == 2 and "needs a TPU, this is a CPU: choose attention = 'reference'" in err
    code, _, err = plan(capsys, *flags, "--config.loss.betta=1")
    assert code == 2 and "did you mean" in err
    for flag in ("--rerun", "--print", "--process=0"):
        code, _, err = plan(capsys, *flags, flag)
        assert code == 2 and "of rlhf_jax.main" in err


def test_help_says_what_there_is(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "--topology" in capsys.readouterr().out


def test_a_reward_model_has_its_own_shape(hub, tmp_path, capsys):
    document = json.loads((tmp_path / "config.json").read_text())
    larger = tmp_path / "larger"
    larger.mkdir()
    (larger / "config.json").write_text(json.dumps(document | {"hidden_size": 32}))
    config = dict(stages(hub))["grpo"]
    config.init.reward, config.reward.scorers = str(larger), "model=1"
    policy = steps.model_shape(resolve(config))
    found = steps.judge_shape(resolve(config), policy)
    assert (policy.width, found.width, found.head) == (16, 32, "scalar")
    config.init.reward = ""
    assert steps.judge_shape(resolve(config), policy).width == 16
    assert "taken to have the policy's shape" in capsys.readouterr().out
    config.reward.scorers = "length=1"
    assert steps.judge_shape(resolve(config), policy) is None


def test_what_is_advised_can_be_done(hub):
    def advised(**mesh):
        with planning_for(jax.devices()[:8]):
            config = base("sft", init={"policy": hub}, batch={"rows": 16}, mesh=mesh)
            return [line for line in plans._further(resolve(config), 8) if "fsdp" in line]

    assert advised(tensor=8) == []
    assert advised(tensor=2) == ["a larger --config.mesh.fsdp (now 1, at most 4)"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mesh.fsdp": 3}, r"fsdp=3 tensor=1 does not fit 8 devices; data=2 fsdp=4 would"),
        ({"mesh.tensor": 16}, r"does not fit 8 devices; tensor=8 would"),
        ({"batch.rows": 12}, r"rows = 12 does not split .* 8 devices .* nearest that does is 16"),
        ({"batch.microbatches": 3}, r"nearest that does is 24"),
        ({"compute.attention": "cudnn"}, "'cudnn' needs a GPU, this is a CPU: choose"),
    ],
)
def test_what_devices_cannot_do_is_said_before_anything_runs(fields, message, hub):
    config = base("sft", init={"policy": hub}, batch={"rows": 16})
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=message):
        check_devices(resolve(config))


def test_odd_rows_are_refused_where_cudnn_would():
    from rlhf_jax.models.fused_attention import check_kernel

    check_kernel("cudnn", "gpu", 1022)
    with pytest.raises(UserError, match=r"1023 tokens, an odd number: set data.row_length = 1024"):
        check_kernel("cudnn", "gpu", 1023)
    with pytest.raises(UserError, match=r"'splash' needs a TPU, this is a GPU: choose .*'cudnn'"):
        check_kernel("splash", "gpu", 1024)


def search(monkeypatch, memory, seconds, **mesh):
    """What a search chooses where memory and seconds are functions of the changed config."""
    monkeypatch.setattr(plans, "steps_of", lambda config: [config])
    monkeypatch.setattr(plans, "device_bytes", lambda tree: 0)

    def of(config, chip, chips):
        step, counted = made(Counted({}, {}, 1, 0))
        return Estimate(step, {"all": memory(config)}, counted, seconds(config))

    monkeypatch.setattr(plans, "estimate", of)
    monkeypatch.setattr(type(resolve(base("sft"))), "holds", {}, raising=False)
    with planning_for(jax.devices()[:8]):
        return plans._search(base("sft", batch={"rows": 32}, mesh=mesh), CHIP)


KEPT = {"none": 8, "dots": 4, "full": 1}


def test_a_search_finds_the_fastest_that_fits(monkeypatch, capsys):
    def memory(config):
        shared = 2**31 // config.mesh.fsdp
        return shared + 2**27 * KEPT[config.compute.remat] // config.batch.microbatches

    def seconds(config):
        return 1 / KEPT[config.compute.remat] + config.batch.microbatches / 10

    found = search(monkeypatch, memory, seconds)
    assert (found.mesh.fsdp, found.compute.remat, found.batch.microbatches) == (8, "none", 2)
    said = capsys.readouterr().out.splitlines()
    assert len(said) <= plans.COMPILES + 1 and "microbatches=2" in said[-1]
    # As of a CPU, whose rates are not known.
    found = search(monkeypatch, memory, lambda config: None)
    assert (found.compute.remat, found.batch.microbatches) == ("dots", 1)


def test_a_search_shares_parameters_among_fewer_devices_while_that_is_faster(monkeypatch, capsys):
    def memory(config):
        return 2**31 // config.mesh.fsdp  # CHIP has 2**30

    found = search(monkeypatch, memory, lambda config: config.mesh.fsdp)
    assert found.mesh.fsdp == 2  # of 8 devices; 1 does not fit
    assert "mesh.fsdp=2" in capsys.readouterr().out.splitlines()[-1]
    found = search(monkeypatch, memory, lambda config: 1 / config.mesh.fsdp)
    assert found.mesh.fsdp == 8
    # As of a CPU, whose rates are not known: fewer are no better there.
    assert search(monkeypatch, memory, lambda config: None).mesh.fsdp == 8


def test_a_search_does_not_change_what_is_trained_for_rows_that_do_not_split(monkeypatch):
    given = base("sft", batch={"rows": 12, "microbatches": 4})
    with planning_for(jax.devices()[:8]), pytest.raises(UserError, match="nearest that does is 16"):
        plans._search(given, CHIP)
    given.mesh.tensor = 16
    with planning_for(jax.devices()[:8]), pytest.raises(UserError, match=r"8 devices; tensor=8"):
        plans._search(given, CHIP)


def test_a_mesh_has_no_axis_below_one(hub):
    for axis in ("fsdp", "tensor"):
        with pytest.raises(UserError, match=rf"mesh\.{axis} = -1"):
            resolve(base("sft", init={"policy": hub}, mesh={axis: -1}))


def test_parameters_that_fsdp_would_not_split_are_refused(hub):
    config = base("sft", init={"policy": hub}, batch={"rows": 6}, mesh={"fsdp": 6})
    told = r"mesh.fsdp = 6 does not divide the model's width of 16.* the nearest that does is 2"
    with planning_for(jax.devices()[:6]), pytest.raises(UserError, match=told):
        steps.steps_of(resolve(config))


def test_a_search_changes_what_is_trained_only_if_it_must(monkeypatch, capsys):
    def memory(config):
        return 2**31 if not config.adapter.rank else 2**20

    found = search(monkeypatch, memory, lambda config: 1.0)
    assert found.adapter.rank == 16 and found.batch.rows == 32
    never = search(monkeypatch, lambda config: 2**40, lambda config: 1.0)
    assert never.adapter.rank == 0 and "nothing that was tried fits" in capsys.readouterr().out
