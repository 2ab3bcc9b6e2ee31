"""A stage has the fields it reads: runs of each are watched, and what others read is refused."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from rlhf_jax.config import document, leaves, own_fields, unread
from rlhf_jax.errors import UserError
from rlhf_jax.losses.preference import Simpo
from rlhf_jax.models import transformer
from rlhf_jax.rewards.scorers import Scores
from rlhf_jax.rl import rollouts
from rlhf_jax.rl.layout import Rollout
from rlhf_jax.rl.rollouts import sample_answers, text_rollout
from rlhf_jax.sampling.generate import Completion
from rlhf_jax.stages import best_of_n, chain, checks, defaults
from rlhf_jax.stages.online_preference import pack_best_and_worst
from rlhf_jax.stages.preference_rows import CHOSEN, REJECTED
from rlhf_jax.tasks import sources
from rlhf_jax.tasks.prompts import PromptSet
from rlhf_jax.training import mesh
from rlhf_jax.training.learner import make_learner
from rlhf_jax.training.optimizer import OPTIMIZERS, SCHEDULES, OptimizerConfig, make_optimizer
from rlhf_jax.training.saved_model import Model
from tests.fields import fields_of
from tests.models.small import SMALL
from tests.stages.conftest import ROOT, run_main
from tests.test_experiments import VARIANTS

# Experiments of tests/stages/conftest.py that are runs of a stage, together with all its options.
RUNS = {
    "pretrain": ["pretrain"],
    "sft": ["sft"],
    "reward": ["reward"],
    "preference": ["dpo"],
    "policy": ["ppo", "grpo", "ensemble"],
    "online_preference": ["online"],
    "best_of_n": ["best_of_n"],
}
# Read before a stage runs: by `chain`; by `resolve`, which chooses the loss; by `settle_sources`
# where eval.source is empty.
BEFORE = {"stage", "loss.name", "init.policy", "init.reward", "data.validation"}


@pytest.fixture
def read(monkeypatch) -> dict[str, set[str]]:
    """Stage → dotted names of the fields that its runs have read so far."""
    seen: dict[str, set[str]] = {}
    places: dict[int, tuple[str, str]] = {}
    kept = []  # so that no id is given twice

    def watched_run(run_stage, config, *rest):
        stage = config.stage
        seen.setdefault(stage, {"seed"})
        sections = config.sections | {"": config}
        if getattr(config.loss, "objective", None) is not None:
            sections["loss "] = config.loss.objective
        for name, section in sections.items():
            places[id(section)] = stage, f"{name.strip()}." if name else ""
            kept.append(section)
        with monkeypatch.context() as patch:
            for kind in {type(section) for section in sections.values()}:

                def watched_get(section, name, get=object.__getattribute__):
                    if id(section) in places:
                        stage, prefix = places[id(section)]
                        seen[stage].add(prefix + name)
                    return get(section, name)

                patch.setattr(kind, "__getattribute__", watched_get)
            return run_stage(config, *rest)

    for stage in defaults.STAGES:
        module = importlib.import_module(defaults.module_of(stage))
        monkeypatch.setattr(module, "run", partial(watched_run, module.run))
    return seen


@pytest.mark.slow
def test_a_run_of_each_stage_reads_all_of_its_fields(experiments, tmp_path, monkeypatch, read):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mesh, "training_devices", lambda: jax.devices()[:1])
    monkeypatch.setattr(chain, "write_report", lambda *_: None)
    for name in (name for names in RUNS.values() for name in names):
        source = f"{experiments}/{name}.py"
        config = chain.load_config(source)
        if config.stage == "preference":
            config.train.eval_every = 6
        chain.run(config, source, tmp_path / name)
    for stage in RUNS:
        unread = set(leaves(fields_of(stage))) - read[stage] - BEFORE
        assert not unread, (stage, sorted(unread))


def test_the_oracle_reads_all_of_its_fields(tmp_path, read):
    config = defaults.base("oracle", oracle={"rows": "rloo,rloo_transformer,dpo"})
    for name in ("table_steps", "transformer_steps", "preference_steps"):
        config.oracle[name] = 1
    with pytest.raises(RuntimeError, match="rows failed"):  # of so few steps
        chain.run(config, "experiments/oracle.py", tmp_path / "oracle")
    assert set(leaves(fields_of("oracle"))) <= read["oracle"] | BEFORE


@cache
def imported(module: Path) -> frozenset[Path]:
    """The package's modules that one imports."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlhf_jax"):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            paths = [ROOT / name.replace(".", "/") for name in names]
            found |= {p.with_suffix(".py") for p in paths} | {p / "__init__.py" for p in paths}
    return frozenset(path for path in found if path.is_file())


@cache
def names_in(module: Path) -> frozenset[str]:
    """Attributes, arguments, annotated fields and texts of a module."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text())):
        match node:
            case ast.Attribute(attr=name) | ast.keyword(arg=name) | ast.arg(arg=name):
                found.add(name)
            case ast.AnnAssign(target=ast.Name(id=name)) | ast.Constant(value=str(name)):
                found.add(name)
    return frozenset(found)


@pytest.mark.parametrize("stage", defaults.STAGES)
def test_every_field_is_named_in_what_its_stage_imports(stage):
    """What the slow test sees of a run, as far as the source tells it."""
    known = set()
    waiting = {(ROOT / defaults.module_of(stage).replace(".", "/")).with_suffix(".py")}
    while waiting:
        known |= waiting
        waiting = set().union(*map(imported, waiting)) - known
    own = (ROOT / "rlhf_jax/stages/defaults.py", ROOT / "rlhf_jax/stages/checks.py")
    named = set().union(*(names_in(module) for module in known if module not in own))
    fields = {name for name in leaves(fields_of(stage)) if name not in BEFORE}
    assert not {name for name in fields if name.rpartition(".")[2] not in named}


def test_every_field_of_an_optimizer_is_read(monkeypatch):
    """Whatever its name and schedule are, it reads the fields that are then recorded."""
    read, get = set(), OptimizerConfig.__getattribute__

    def watched(config, name):
        read.add(name)
        return get(config, name)

    params = {"layers": {"kernel": np.ones((1, 2, 2), np.float32)}}
    for name, schedule in [*((n, "wsd") for n in OPTIMIZERS), *(("adamw", s) for s in SCHEDULES)]:
        changes = {"name": name, "schedule": schedule, "weight_decay": 0.1}
        config = defaults.resolve(defaults.base("sft", optimizer=changes))
        recorded = set(document(config)["optimizer"])
        read.clear()
        with monkeypatch.context() as patch:
            patch.setattr(OptimizerConfig, "__getattribute__", watched)
            make_learner(config, config.optimizer, params, None, updates=9)
            optimizer, _ = make_optimizer(config.optimizer, 9)
            state = jax.eval_shape(optimizer.init, params)
            jax.eval_shape(optimizer.update, params, state, params)
        assert recorded <= read


def checked(config):
    """The options of a config that nothing is seen to be wrong with."""
    options = defaults.resolve(config)
    checks.check(options)
    return options


def every_section():
    return {kind for sections in defaults.STAGES.values() for kind in sections.values()}


def test_fields_are_few():
    fields = {stage: set(leaves(fields_of(stage))) for stage in defaults.STAGES}
    # Two are files of the user's own code, one is train.best, one what becomes of votes, two name
    # what answers a policy's turns, two are the cost that a policy keeps below a limit and how its
    # price is damped, one says what of a number is a token, one which replies of a conversation are
    # trained, one whether what an environment answered is, one what an answer without a score does;
    # nine are of the stages of AI feedback, and of no other.
    assert len(set().union(*fields.values())) <= 139
    others = (fields[stage] for stage in defaults.STAGES if stage not in defaults.FED_BACK)
    assert len(set().union(*others)) <= 130
    assert len(fields["policy"]) <= 83


@pytest.mark.parametrize("kind", sorted(every_section(), key=lambda kind: kind.__name__))
def test_every_field_has_a_comment(kind):
    """On its own line, on one above it, or in the section's docstring."""
    for each in kind.__mro__[:-1]:
        lines = inspect.getsource(each).splitlines()
        for name in own_fields(each).keys() & each.__annotations__.keys():
            (at,) = [i for i, line in enumerate(lines) if line.startswith(f"    {name}: ")]
            told = "#" in lines[at] or lines[at - 1].strip().startswith("#")
            assert told or f"{name}:" in each.__doc__, (each, name)


@pytest.mark.parametrize(
    ("stage", "field", "readers"),
    [
        ("best_of_n", "rollout.missing_eos", "policy, online_preference"),
        ("best_of_n", "rollout.samples", "policy, online_preference"),
        ("policy", "rollout.top_k", "online_preference, best_of_n"),
        ("policy", "train.ema_decay", "pretrain, sft, reward, preference, best_of_n"),
        ("policy", "data.over_long", "pretrain, sft, reward, preference"),
        ("sft", "eval.during", "preference, policy, online_preference, best_of_n"),
        ("online_preference", "rollout.given", "policy"),
        ("reward", "eval.temperature", "sft, preference, policy, online_preference, best_of_n"),
        ("pretrain", "init.policy", "sft, reward, preference, policy, online_preference"),
        ("oracle", "batch.rows", "pretrain, sft, reward, preference, policy, online_preference"),
        ("sft", "init.reward_1", "policy, online_preference, best_of_n"),
    ],
)
def test_a_field_that_only_other_stages_read_is_refused(stage, field, readers):
    config = fields_of(stage)
    section, _, name = field.partition(".")
    if section not in config:
        config[section] = ConfigDict()
    config[section][name] = 1
    message = rf"the {stage} stage has no {field}; it is read by {readers}"
    with pytest.raises(UserError, match=message):
        checked(config)


def test_a_field_that_no_stage_reads_is_refused_with_the_nearest():
    config = defaults.base("sft", train={"log_evry": 3})
    with pytest.raises(UserError, match=r"no train\.log_evry; did you mean train\.log_every\?"):
        checked(config)
    config = defaults.base("pretrain", model=dict(defaults.model("tiny"), vocab_size=9))
    with pytest.raises(UserError, match=r"pretrain stage has no model\.vocab_size"):
        checked(config)


def test_a_missing_reward_file_and_another_loss_are_seen_before_the_parents_run(
    tmp_path, monkeypatch
):
    config = defaults.on_policy("grpo", rollout={"samples": 2})
    config.reward.scorers = "nowhere.py:score"
    with pytest.raises(UserError, match=r"'nowhere.py:score': there is no file nowhere.py"):
        checked(config)
    (tmp_path / "mine.py").write_text("from math import sqrt\ndef score(prompts, responses): ...\n")
    monkeypatch.chdir(tmp_path)
    config.reward.scorers = "mine.py:scor"
    with pytest.raises(UserError, match=r"mine\.py has no 'scor'; did you mean score\?"):
        checked(config)
    config.reward.scorers = "mine.py:sqrt=0.1,mine.py:score"
    checked(config)
    (tmp_path / "mine.py").write_text("globals().update(scor=len)\n")
    config.reward.scorers = "mine.py:scor"
    checked(config)  # its own process knows
    config.environment.tools = "mine.py:scor, other.py:scor"
    with pytest.raises(UserError, match=r"environment names 'other.py:scor': there is no file"):
        checked(config)
    config.environment.tools = "mine.py:sqrt"
    config.rollout.given = "train"
    checked(config)
    config.environment.tools = ""
    with pytest.raises(UserError, match=r"trains what an environment answers, but there is none"):
        checked(config)
    config.rollout.given = "mask"
    config.reward.scorers = "model"
    with pytest.raises(UserError, match=r"name its run with --config\.init\.reward=…, or another"):
        checked(config)
    with pytest.raises(UserError, match=r"'dpo': choose one of bradley_terry, pointwise"):
        checked(defaults.base("reward", loss={"name": "dpo"}))


@pytest.mark.parametrize("stage", [s for s in defaults.STAGES if s != "oracle"])
def test_a_count_below_its_least_is_refused(stage):
    sections = defaults.STAGES[stage].items()
    counts = [
        f"{section}.{name}"
        for section, kind in sections
        for name, field in own_fields(kind).items()
        if field.metadata.get("least") is not None
    ]
    assert {"batch.rows", "train.steps", "data.row_length"} <= set(counts)
    for name in counts:
        config = fields_of(stage)
        section, _, field = name.partition(".")
        config[section][field] = -1
        with pytest.raises(UserError, match=rf"config: {name} = -1 must be at least [012]"):
            checked(config)


@pytest.mark.parametrize("stage", [s for s in defaults.STAGES if s != "oracle"])
def test_a_number_that_is_none_is_refused(stage):
    for name, value in leaves(fields_of(stage)).items():
        if isinstance(value, float):
            section, _, field = name.partition(".")
            for bad in (float("nan"), float("inf"), -float("inf"), 1e39):
                config = fields_of(stage)
                config[section][field] = bad
                with pytest.raises(UserError, match=rf"config: {name} = \S+ is no number that"):
                    checked(config)


@pytest.mark.parametrize(
    ("stage", "field", "value"),
    [
        ("sft", "optimizer.learning_rate", -1e-4),
        ("policy", "critic.learning_rate", -1e-4),
        ("policy", "optimizer.max_grad_norm", 0.0),
        ("reward", "optimizer.weight_decay", -0.1),
        ("pretrain", "train.ema_decay", 1.0),
        ("preference", "loss.beta", 0.0),
        ("online_preference", "loss.beta", -0.1),
        ("sft", "loss.label_smoothing", 1.0),
        ("policy", "kl.coefficient", -0.05),
        ("policy", "critic.value_clip", -0.2),
        ("policy", "advantage.gamma", 1.01),
        ("policy", "advantage.lam", -0.1),
        ("policy", "loss.importance_cap", 0.0),
        ("best_of_n", "reward.timeout_seconds", 0.0),
        ("preference", "eval.temperature", -1.0),
    ],
)
def test_a_number_outside_its_interval_is_refused(stage, field, value):
    config = fields_of(stage)
    section, _, name = field.partition(".")
    config[section][name] = value
    with pytest.raises(UserError, match=rf"config: {field} must be in .*, got {value}"):
        checked(config)


@pytest.mark.parametrize(
    ("value", "said"),
    [(-0.2, "must be in"), (float("nan"), "is no number"), (float("inf"), "is no number")],
)
def test_an_option_of_a_loss_is_finite_and_not_negative(value, said):
    config = defaults.on_policy("grpo", rollout={"samples": 2}, loss={"clip_low": value})
    config.reward.scorers = "gold"
    with pytest.raises(UserError, match=rf"config: loss\.clip_low .*{said}|loss\.clip_low {said}"):
        checked(config)


def test_an_option_of_another_loss_is_refused_with_those_that_have_it():
    config = defaults.base("preference", loss={"name": "simpo", "label_smoothing": 0.2})
    with pytest.raises(UserError, match="an option of cdpo, robust, exo_pair; 'simpo' has no"):
        checked(config)
    config = defaults.base("preference", loss={"name": "sigmod"})
    with pytest.raises(UserError, match=r"did you mean 'sigmoid'\? Known: sigmoid, cdpo, .*, rpo"):
        checked(config)
    config = defaults.base("preference", loss={"name": "simpo", "gamma": 1, "beta": 2})
    objective = defaults.resolve(config).loss.objective
    assert objective == Simpo(beta=2.0, gamma=1.0) and type(objective.gamma) is float


def test_replies_of_which_none_is_to_be_trained_are_not_expanded():
    both = {"trained_turns": "last", "stripped_turns": "expand"}
    for name in both:
        checked(defaults.base("sft", data={name: both[name]}))
    with pytest.raises(UserError, match=r"'expand' trains earlier replies, and .* set one of them"):
        checked(defaults.base("sft", data=both))


def test_one_stream_has_no_records_that_are_too_long():
    config = defaults.base("pretrain", data={"layout": "windows"})
    said = "data.over_long is read only with data.layout = documents"
    assert unread(defaults.resolve(config), "data.over_long") == said


def test_what_means_nothing_is_not_recorded_and_told_on_the_command_line(tmp_path):
    config = defaults.base("sft", optimizer={"schedule": "linear", "decay_fraction": 0.4})
    assert "decay_fraction" not in document(defaults.resolve(config))["optimizer"]
    assert document(defaults.resolve(config))["adapter"] == {"rank": 0}
    said = "adapter.kind is read only with adapter.rank"
    assert unread(defaults.resolve(config), "adapter.kind") == said
    config.adapter.update(rank=4, kind="dora")
    assert unread(defaults.resolve(config), "adapter.kind") is None
    assert set(document(defaults.resolve(config))["adapter"]) == {
        *("rank", "alpha", "targets", "kind", "base")
    }
    config = defaults.on_policy("ppo", advantage={"name": "group"}, rollout={"samples": 2})
    assert document(defaults.resolve(config))["critic"] == {}
    said = "critic.value_clip is read only with advantage.name = gae"
    assert unread(defaults.resolve(config), "critic.value_clip") == said


def test_the_path_of_a_source_may_hold_what_separates_sources(tmp_path):
    """A sweep names the directory of a run by what differs: commas and equality signs."""
    cell = tmp_path / "file=,seed=0"
    cell.mkdir()
    votes = cell / "votes.jsonl"
    votes.write_text('{"text": "a"}\n{"text": "b"}\n')
    given = f"{votes}=2,town[:50%]=0.5,mine.jsonl, {votes}[:1]"
    expected = {str(votes): 2, "town[:50%]": 0.5, "mine.jsonl": 1, f"{votes}[:1]": 1}
    assert sources.parse_sources(given) == expected
    assert [each.text for each in sources.read_source(f"{votes}[:1],{votes}", "text", "train")] == [
        *"aab"
    ]
    with (cell / "pairs.jsonl").open("w") as file:
        file.writelines(f'{{"prompt": "{i}?", "completion": "{i}."}}\n' for i in range(40))
    config = defaults.base("sft", data={"train": f"{cell}/pairs.jsonl=3", "validation": ""})
    settled = sources.settle_sources(config)
    assert settled.data.train == f"{cell}/pairs.jsonl[:95%]=3"
    assert settled.data.validation == f"{cell}/pairs.jsonl[95%:]"
    # Where there is no such file, commas separate; a file's ending is never a weight's.
    assert sources.parse_sources("b=0.1/a.jsonl=3,b=0.1/c.jsonl[:9]") == {
        "b=0.1/a.jsonl": 3,
        "b=0.1/c.jsonl[:9]": 1,
    }


def test_a_part_of_a_file_s_name_is_no_scorer():
    for scorers, names in (
        ("length=1, model=2", {"normalize", "on_error"}),
        ("regex", {"pattern", "timeout_seconds", "on_error"}),
        ("mathematics.py:regexp", {"timeout_seconds", "on_error"}),
        ("math", {"timeout_seconds", "on_error"}),
        ("number", {"on_error"}),  # of a record without an answer
        ("mine.py:score", {"timeout_seconds", "on_error"}),
        ("remodel.py:regex_of", {"timeout_seconds", "on_error"}),
    ):
        reward = {"scorers": "length"} if scorers == "math" else {"scorers": scorers}
        options = defaults.resolve(defaults.on_policy("grpo", reward=reward))
        if scorers == "math":  # whose package need not be there
            options = dataclasses.replace(
                options, reward=dataclasses.replace(options.reward, scorers=scorers)
            )
        fields = ("normalize", "pattern", "timeout_seconds", "on_error")
        assert {n for n in fields if unread(options, f"reward.{n}") is None} == names, scorers


@pytest.mark.parametrize(
    ("stage", "seed", "most"),
    [("sft", -1, 2**32 - 1), ("sft", 2**32, 2**32 - 1), ("ai_sft", 2**30, 2**30 - 1)],
)
def test_a_seed_that_would_not_be_taken_as_it_is(stage, seed, most):
    config = defaults.base(stage)
    config.seed = seed
    with pytest.raises(UserError, match=f"seed = {seed}: choose one from 0 to {most}"):
        checks.check(defaults.resolve(config))


@pytest.mark.parametrize("weight", ["nan", "inf", "-1", "0", "much"])
def test_the_weight_of_a_source_is_above_0(weight):
    with pytest.raises(UserError, match=f"weight of 'b' is no number above 0: '{weight}'"):
        sources.parse_sources(f"a,b={weight}")


@pytest.mark.parametrize(
    ("stage", "field"),
    [
        ("pretrain", "train.log_every"),
        ("sft", "train.checkpoint_every"),
        ("reward", "batch.microbatches"),
        ("preference", "eval.count"),
        ("policy", "train.epochs"),
        ("policy", "eval.during"),
        ("online_preference", "rollout.prompts"),
        ("best_of_n", "train.steps"),
    ],
)
def test_nothing_is_done_zero_times(stage, field):
    config = fields_of(stage)
    section, _, name = field.partition(".")
    config[section][name] = 0
    with pytest.raises(UserError, match=rf"config: {field} = 0 must be at least 1"):
        checked(config)


def test_the_command_line_says_who_reads_a_field(tmp_path):
    flags = ["--config.train.steps=3", "--config.rollout.missing_eos=subtract"]
    source = f"--config={ROOT}/experiments/best_of_n.py"
    result = run_main(source, f"--workdir={tmp_path}/run", *flags)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    said = "the best_of_n stage has no rollout.missing_eos; it is read by policy, online_preference"
    assert result.stderr.strip() == f"error: in the command line: {said}"


@pytest.mark.parametrize(
    "variant", [f"{name}.py:{v}" for name, variants in VARIANTS.items() for v in variants]
)
def test_every_experiment_states_fields_of_its_stage(variant, monkeypatch):
    monkeypatch.chdir(ROOT)
    defaults.resolve(chain.load_config(f"experiments/{variant}"))


def sampling(stage, **rollout):
    build = {"online_preference": defaults.online_preference, "best_of_n": defaults.best_of_n}
    limits = {"max_prompt_tokens": 8, "max_new_tokens": 8} | rollout
    return defaults.resolve(
        build[stage](data={"row_length": 64}, batch={"rows": 1}, rollout=limits)
    )


@pytest.fixture(scope="module")
def model():
    params = transformer.init(SMALL, jax.random.key(0))
    params = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(x.size), x.shape), params)
    return SimpleNamespace(
        config=SMALL, params=params, tokenizer=SimpleNamespace(ends=[2], decode_text=str)
    )


class Judge:
    """Likes long answers."""

    def score(self, rollout):
        lengths = rollout.lengths.astype(float)
        return Scores(lengths, np.ones(len(lengths), bool), {"length": lengths}, {})


@pytest.mark.parametrize("stage", ["online_preference", "best_of_n"])
def test_answers_are_drawn_as_the_rollout_says_and_measured_as_they_are(stage, model, monkeypatch):
    prompts = PromptSet([None] * 4, [[3 + i, 4, 5] for i in range(4)])

    def drawn(measured=False, **rollout):
        config = sampling(stage, **rollout)
        temperature = 1.0 if measured else None
        if stage == "best_of_n":
            blocks = best_of_n._blocks(config, model, prompts, Judge(), 2, 1, temperature)
            return [c.tokens for answers, _ in blocks for c in answers.completions]
        answers = sample_answers(
            config, model, prompts, samples=2, seed=1, multiple=1, temperature=temperature
        )
        return [c.tokens for c in answers.completions]

    plain = drawn()
    for field, value in {"top_k": 1, "top_p": 0.1, "min_p": 0.9, "temperature": 0.1}.items():
        assert drawn(**{field: value}) != plain, field
        assert drawn(measured=True, **{field: value}) == plain, field
    greedy = drawn(top_k=1)
    assert all(greedy[i] == greedy[i + 1] for i in range(0, len(greedy), 2))


@pytest.mark.parametrize(
    ("rollout", "chosen"),
    [
        ({}, 8),
        ({"missing_eos": "subtract", "missing_eos_penalty": 4.0}, 8),
        ({"missing_eos": "subtract", "missing_eos_penalty": 6.0}, 3),
        ({"missing_eos": "replace", "missing_eos_penalty": 0.0}, 3),
        ({"overlong_buffer": 4}, 8),
        ({"overlong_buffer": 4, "missing_eos": "subtract", "missing_eos_penalty": 4.5}, 3),
    ],
)
def test_an_answer_that_never_ended_pays_before_pairs_are_chosen(rollout, chosen, monkeypatch):
    """Scores are lengths: 8 of the answer that was cut off, 3 of the other."""
    config = sampling("online_preference", prompts=1, samples=2, **rollout)
    answers = [Completion([5] * 3, np.zeros(3), True), Completion([7] * 8, np.zeros(8), False)]

    def sample(config, model, prompts, **_):
        return Rollout.of(prompts, answers, ["a", "b"], config.rollout.max_new_tokens)

    monkeypatch.setattr(rollouts, "sample_answers", sample)
    prompts = PromptSet([None], [[1, 3, 4]])
    found = text_rollout(config, Model(None, None, None), Judge(), None, None, prompts, 0)
    assert found.scores.tolist() == [3, 8]  # what is reported as the score stays the score
    rows, tied = pack_best_and_worst(config, found, 1)
    (lengths,) = rows["lengths"][rows["example_ids"] >= 0].tolist()
    assert tied == 0 and lengths[CHOSEN] == chosen and lengths[REJECTED] == 11 - chosen


def test_a_mesh_that_does_not_fit_one_device_is_refused(monkeypatch):
    monkeypatch.setattr(mesh, "training_devices", lambda: jax.devices()[:1])
    config = defaults.base("sft")
    assert mesh.mesh_of(defaults.resolve(config)) is None
    config.mesh.fsdp = 2
    with pytest.raises(UserError, match="does not fit 1 devices"):
        mesh.mesh_of(defaults.resolve(config))


def test_gae_without_a_critic_and_an_unknown_algorithm_are_refused():
    config = defaults.on_policy("grpo", advantage={"name": "gae"}, reward={"scorers": "gold"})
    with pytest.raises(UserError, match=r"needs the section critic"):
        checked(config)
    with pytest.raises(UserError, match=r"no algorithm 'grop'; there are: ppo, grpo"):
        defaults.on_policy("grop")


@pytest.mark.parametrize(
    ("section", "field"), [("advantage", "name"), ("kl", "placement"), ("loss", "name")]
)
def test_no_name_falls_through_to_an_algorithm(section, field):
    config = defaults.on_policy("grpo", rollout={"samples": 2})
    config[section][field] = "another"
    with pytest.raises(UserError, match=f"{section}.{field} .*'another'"):
        defaults.resolve(config)
    reward = defaults.base("reward", loss={"name": "another"})
    with pytest.raises(UserError, match=r"loss\.name = 'another'"):
        defaults.resolve(reward)
