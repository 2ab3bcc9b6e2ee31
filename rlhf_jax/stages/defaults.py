"""The options of every stage with their defaults; a file in experiments/ states what differs.

A stage has the fields that it reads and no others: its sections stand in `STAGES`, those of
on-policy stages in `rl/options.py`, an optimizer's, an adapter's and a model's beside these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict

from rlhf_jax import config as options
from rlhf_jax.config import Config, Only, option, others, variants
from rlhf_jax.data.encode import check_stripped_turns
from rlhf_jax.environments.trajectories import EnvironmentOptions
from rlhf_jax.errors import UserError, nearest
from rlhf_jax.losses.preference import LOSSES, PreferenceLoss
from rlhf_jax.models.config import Shape
from rlhf_jax.models.lora import AdapterConfig
from rlhf_jax.rl.options import (
    NO_FILE,
    AdvantageOptions,
    BestOfNOptions,
    CriticOptions,
    KlOptions,
    LagrangeOptions,
    OnlineRolloutOptions,
    PolicyOptions,
    PolicyRolloutOptions,
    RewardOptions,
)
from rlhf_jax.training.loop import Train
from rlhf_jax.training.optimizer import OptimizerConfig

SAMPLING = ("policy", "online_preference", "best_of_n")  # which sample and score answers
REWARD_LOSSES = ("bradley_terry", "pointwise")
FED_BACK = ("ai_sft", "ai_preference")  # which train on what judges and critics make of answers
MOST_FED_BACK_SEED = 2**30 - 1  # those answers are drawn by four times it, and JAX takes 32 bits


@dataclass(frozen=True)
class Init:
    """The start of the model: "experiments/sft.py[:variant]", or a finished run's directory."""

    # The model that is trained; "": the user must name one with --config.init.policy=…
    policy: str = ""


@dataclass(frozen=True)
class JudgedInit(Init):
    """The start of the model, and the model it is compared with."""

    reward: str = ""  # a model of the same pairs, whose accuracy is shown beside


@dataclass(frozen=True)
class FedBackInit(Init):
    """The start of the model, which gives the answers too, and who judges them."""

    judge: str = ""  # a language model or a reward model: feedback.judge=model


@dataclass(frozen=True)
class CriticisedInit(FedBackInit):
    """The start of the model, which gives the answers too, and who criticises and judges them."""

    critic: str = ""  # what criticises and revises answers; "": the policy itself


@dataclass(frozen=True)
class RewardedInit(Init):
    """The start of the model, and the reward models of the scorer "model"."""

    reward: str = ""  # the first
    # Further ones, of an ensemble: reward_1, reward_2, …
    members: Any = field(default_factory=dict, metadata=others("reward_"))


@dataclass(frozen=True)
class Data:
    """The data. Several sources are mixed by weight: "town=3,notes.jsonl=1".

    A source is a data set ("town", "hh_rlhf/helpful", "gsm8k@test", "town[:50%]"), a JSONL file
    ("notes.jsonl[:1000]"), or one that the package datasets loads ("hf:owner/name").
    """

    train: str = "town"  # what is trained on
    validation: str = "town"  # "": the last 5 % of the files in `train`
    row_length: int = option(256, least=1)  # tokens per packed row
    # Share of bad JSONL lines that are skipped and counted.
    max_bad_fraction: float = option(0.0, within="[0, 1)")
    columns: str = ""  # of files where names differ: "prompt:question,completion:answer"


@dataclass(frozen=True)
class RawData(Data):
    """Raw text."""

    # Records longer than a row: data/encode.py's policies.
    over_long: str = option("error", only=Only("layout", ("documents",)))
    layout: str = option("documents", choices=("documents", "windows"))  # of a stream of text


@dataclass(frozen=True)
class ChatData(Data):
    """Prompts or chats."""

    # Of a Hub model: "" its own, a name in hub/chat_formats.py, or a *.jinja file.
    chat_template: str = ""


@dataclass(frozen=True)
class LabelledData(ChatData):
    """Pairs, or conversations with labels."""

    over_long: str = "error"  # records longer than a row: data/encode.py's policies


@dataclass(frozen=True)
class VotedData(LabelledData):
    """Pairs, which may be the votes of labelers that differ, or conversations with labels."""

    # What becomes of labelers' votes: labelers/training.py.
    labelers: str = option("pooled", choices=("pooled", "majority", "weighted", "nuisance"))


@dataclass(frozen=True)
class SftData(LabelledData):
    """Conversations."""

    replay: str = ""  # raw text to mix in, its weights beside those of `train`
    # Earlier replies that the chat template strips of their thoughts, or doesn't end: "leave" them
    # untrained, or "expand": each is the last reply of a record of its own.
    stripped_turns: str = "leave"
    # "last": earlier replies of a conversation are read and not learnt, as in Llama 2's GAtt.
    trained_turns: str = option("all", choices=("all", "last"))

    def validate(self) -> None:
        """Raises UserError for a way to treat such replies that there is not, or has no effect."""
        check_stripped_turns(self.stripped_turns)
        if self.trained_turns == "last" and self.stripped_turns == "expand":
            raise UserError(
                "config: data.stripped_turns = 'expand' trains earlier replies, and "
                "data.trained_turns = 'last' none; set one of them"
            )


@dataclass(frozen=True)
class PolicyData(ChatData):
    """Prompts."""

    ptx: str = ""  # raw text whose loss is mixed in, as in InstructGPT


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer that is trained."""

    kind: str = option("bpe", choices=("bpe", "chars"))  # "chars": all of the text
    # Tokens, those of chats among them.
    vocab_size: int = option(2048, least=1, only=Only("kind", ("bpe",)))
    # Digits of a number that one token may have.
    digits: int = option(1, least=1, only=Only("kind", ("bpe",)))


@dataclass(frozen=True)
class LanguageLoss:
    """Cross-entropy of the next token."""

    z_loss: float = option(0.0, within="[0, inf)")  # weight of log²Z


@dataclass(frozen=True)
class SftLoss(LanguageLoss):
    """Cross-entropy of replies."""

    # Share of a target's probability that is spread over all tokens.
    label_smoothing: float = option(0.0, within="[0, 1)")


@dataclass(frozen=True)
class PreferenceOptions:
    """A loss of losses/preference.py."""

    name: str = option("sigmoid", only=NO_FILE)  # one of `LOSSES`
    objective: Any = field(default=None, metadata=variants(LOSSES, PreferenceLoss))
    file: str = ""  # "mine.py:cauchy": a function of yours in the place of a loss by name
    # Of the SFT term added to any loss; rpo, cpo and orpo have their own: leave it 0.
    sft_coefficient: float = option(0.0, within="[0, inf)")


@dataclass(frozen=True)
class RewardLoss:
    """A loss of losses/reward.py."""

    # On pairs; "pointwise" on conversations labelled from 0 (bad) to 1 (good).
    name: str = "bradley_terry"
    centering: float = option(0.0, within="[0, inf)")  # weight of (s_w + s_l)², of pairs

    def validate(self) -> None:
        """Raises UserError for a loss that there is not, or that centers nothing."""
        if self.name not in REWARD_LOSSES:
            known = ", ".join(REWARD_LOSSES)
            raise UserError(f"config.loss.name = {self.name!r}: choose one of {known}")
        if self.name == "pointwise" and self.centering:
            raise UserError(
                "config.loss.centering is for pairs: labels already say where a score is 0"
            )


@dataclass(frozen=True)
class Normalize:
    """Scores of what `init.policy` answers to training prompts, kept for their mean and std."""

    prompts: int = option(256, least=0)  # drawn from the training records; 0: keep none
    max_new_tokens: int = option(64, least=1)  # of an answer


@dataclass(frozen=True)
class Batch:
    """The rows of an update."""

    rows: int = option(32, least=1)  # packed rows per update, over all devices
    # Parts the rows go through one after the other, to save memory.
    microbatches: int = option(1, least=1)


@dataclass(frozen=True)
class AveragedTrain(Train):
    """The training loop of a stage whose data are there before it begins."""

    # Updates; without train.epochs.
    steps: int = option(100, least=1, only=Only("epochs", (0.0,)))
    # Passes over the training rows, those of all sources together; 0: so many steps as are stated.
    epochs: float = option(0.0, within="[0, inf)")
    # The metric of the evaluations on the way, as eval/loss, whose best model is kept in place of
    # the last.
    best: str = ""
    # Evaluations without a better one after which the run ends; 0: none does.
    patience: int = option(0, least=0, only=Only("best"))
    # 0: no moving average of the parameters; else it is the average that is kept.
    ema_decay: float = option(0.0, within="[0, 1)")


@dataclass(frozen=True)
class SampledTrain(Train):
    """The training loop on samples of the policy itself; a step is an iteration."""

    epochs: int = option(1, least=1)  # over an iteration's samples
    minibatches: int = option(1, least=1)  # updates per epoch


@dataclass(frozen=True)
class Compute:
    """How the model is computed."""

    compute_dtype: str = "float32"  # or "bfloat16": of activations and matrix products
    remat: str = "dots"  # what the backward pass recomputes: "none", "full", "dots" (all but dots)
    attention: str = "reference"  # the kernel: models/fused_attention.py


@dataclass(frozen=True)
class MeshAxes:
    """Over how many devices parameters are split; rows are split over these and all others."""

    fsdp: int = option(1, least=1)  # each holds a part of every parameter
    tensor: int = option(1, least=1)  # each computes a part of every layer


@dataclass(frozen=True)
class NoEvaluation:
    """The evaluation of a stage that has nothing to choose there."""


@dataclass(frozen=True)
class ChatEvaluation:
    """How a chat stage ends: held-out prompts are answered and judged."""

    source: str = "town"  # of held-out prompts: a data set or a JSONL file; "": data.validation
    count: int = option(256, least=1)  # prompts at most
    max_new_tokens: int = option(64, least=1)  # of an answer, its end included
    # Of the answers that are judged; 0: greedy.
    temperature: float = option(0.0, within="[0, inf)")


@dataclass(frozen=True)
class SampledEvaluation(ChatEvaluation):
    """The evaluation at the end, and on the way."""

    during: int = option(128, least=0)  # prompts sampled at train.eval_every


@dataclass(frozen=True)
class OnPolicyEvaluation(ChatEvaluation):
    """The evaluation at the end and on the way, of stages whose result it is."""

    during: int = option(128, least=1)  # prompts sampled at train.eval_every


@dataclass(frozen=True)
class BestOfN:
    """The curves of the best of n, and what is trained on."""

    samples: int = option(64, least=1)  # to each held-out prompt, for the curves: a power of 2
    n: int = option(8, least=1)  # to each training prompt, of which the best is trained on
    prompts: int = option(1000, least=1)  # of training


@dataclass(frozen=True)
class Feedback:
    """What is asked under the principles of a constitution, and of how many."""

    constitution: str = ""  # a file of principles; "": experiments/constitution.json
    principles: str = "overall"  # names, "a,b"; "": all
    # Who says which of two answers is better: "model", that of init.judge; "people", the town's
    # labelers; "gold", "gold,sensitivity=0.9,…" or "https://host/v1,model=name" as of
    # rlhf_jax.judges.
    judge: str = "model"
    count: int = option(1000, least=1)  # of what is made: pairs, prompts or conversations
    max_new_tokens: int = option(64, least=1)  # of an answer
    temperature: float = option(1.0, within="(0, inf)")  # of answers


_OF_ANSWERS = Only("of", ("revisions",))


@dataclass(frozen=True)
class WrittenFeedback(Feedback):
    """What conversations are made of, under the principles of a constitution, and how many."""

    # "revisions" of the policy's answers by a critic; from pairs in the order of gold "judging",
    # conversations in which a judge is asked, or "critiques", in which a critic is.
    of: str = option("revisions", choices=("revisions", "judging", "critiques"))
    # As above; "": nobody, and every revision is trained on, not those alone that a judge prefers.
    judge: str = option("", only=_OF_ANSWERS)
    max_new_tokens: int = option(64, least=1, only=_OF_ANSWERS)  # of an answer
    temperature: float = option(1.0, within="(0, inf)", only=_OF_ANSWERS)  # of answers


@dataclass(frozen=True)
class OracleOptions:
    """The oracle's rows."""

    rows: str = ""  # names of oracle/oracle_rows.py, separated by commas; none: all
    table_steps: int = option(350, least=1)  # of a row whose policy is a table
    transformer_steps: int = option(60, least=1)  # of one whose policy is a transformer
    preference_steps: int = option(600, least=1)  # of a loss on pairs
    threads: int = option(2, least=1)  # rows at a time


_TRAINED: dict[str, type] = {
    "batch": Batch,
    "optimizer": OptimizerConfig,
    "train": AveragedTrain,
    "adapter": AdapterConfig,
    "compute": Compute,
    "mesh": MeshAxes,
    "eval": SampledEvaluation,
}
_SAMPLED = _TRAINED | {"init": RewardedInit, "reward": RewardOptions, "eval": OnPolicyEvaluation}
STAGES: dict[str, dict[str, type]] = {
    "pretrain": {
        **{k: v for k, v in _TRAINED.items() if k not in ("adapter", "compute")},
        **{"data": RawData, "model": Shape, "tokenizer": Vocabulary},
        **{"loss": LanguageLoss, "eval": NoEvaluation},
    },
    "sft": _TRAINED
    | {"init": Init, "data": SftData, "loss": SftLoss, "eval": ChatEvaluation}
    | {"environment": EnvironmentOptions},
    "reward": _TRAINED
    | {"init": Init, "data": VotedData, "loss": RewardLoss}
    | {"normalize": Normalize, "eval": NoEvaluation},
    "preference": _TRAINED
    | {"init": JudgedInit, "data": VotedData, "loss": PreferenceOptions}
    | {"environment": EnvironmentOptions},
    "policy": _SAMPLED
    | {"data": PolicyData, "rollout": PolicyRolloutOptions, "train": SampledTrain}
    | {"loss": PolicyOptions}
    | {"kl": KlOptions, "lagrange": LagrangeOptions, "advantage": AdvantageOptions}
    | {"critic": CriticOptions, "environment": EnvironmentOptions},
    "online_preference": _SAMPLED
    | {"data": ChatData, "rollout": OnlineRolloutOptions, "train": SampledTrain}
    | {"loss": PreferenceOptions},
    "best_of_n": _SAMPLED | {"data": ChatData, "rollout": BestOfNOptions, "best_of_n": BestOfN},
    "oracle": {"oracle": OracleOptions},
}
STAGES["ai_sft"] = STAGES["sft"] | {"init": CriticisedInit, "feedback": WrittenFeedback}
STAGES["ai_preference"] = STAGES["preference"] | {"init": FedBackInit, "feedback": Feedback}
TRUNCATION = ("rollout.top_k", "rollout.top_p", "rollout.min_p")
WHOLE = (
    ": what is trained is the whole distribution, not its truncation, so ratios would not start at "
    "1; sample with rollout.temperature alone"
)
# Fields that were, and what is in their place.
GONE = {
    "loss.options": "each option is a field now, as --config.loss.clip_low=0.1",
    "rollout.max_staleness": "samples are train.epochs x train.minibatches - 1 updates old at most",
    "kl.exact_rows": "the full-vocabulary KL is measured on one row",
    "train.keep_last": "the last two checkpoints are kept",
    "eval.gold": "answers are judged wherever the held-out prompts have a verifier",
    "optimizer.b1": "it is 0.9",
    "optimizer.no_decay": "norms, biases and embeddings have no weight decay",
    "optimizer.muon_steps": "they are 5",
    "optimizer.muon_rms": "it is 0.2",
    "advantage.ddof": "it is 1",
    "advantage.eps": "it is 1e-4",
    "mesh.data": "rows are split over all devices that mesh.fsdp and mesh.tensor leave",
}


def module_of(stage: str) -> str:
    """The module whose `run` is the stage."""
    if stage == "oracle":
        return "rlhf_jax.oracle.stage"
    return f"rlhf_jax.{'judges' if stage in FED_BACK else 'stages'}.{stage}"


def base(stage: str, **sections: Mapping[str, Any]) -> ConfigDict:
    """The configuration of a stage: its sections' defaults, with `sections` laid over them."""
    config = ConfigDict({"stage": stage, "seed": 0})
    for name, section in STAGES[stage].items():
        config[name] = options.surface(section)
    return lay(config, sections)


def lay(config: ConfigDict, sections: Mapping[str, Mapping[str, Any]]) -> ConfigDict:
    """The config with the fields of `sections` laid over its own."""
    for name, values in sections.items():
        if name not in config:
            config[name] = ConfigDict()
        config[name].update(values)
    return config


_TO_GROUP = {"name": "group", "baseline": "mean", "scale": "group"}
_PER_RESPONSE = {"name": "policy_gradient", "aggregation": "sequence_mean"}
_IN_LOSS = {"placement": "loss", "estimator": "k3", "level": "token"}
_NO_KL = {"placement": "none"}
# What an on-policy algorithm is, as changes to the sections' defaults (KL in the reward).
ALGORITHMS: dict[str, dict[str, dict[str, Any]]] = {
    # https://arxiv.org/abs/1707.06347, as in https://arxiv.org/abs/1909.08593
    "ppo": {"advantage": {"name": "gae", "whiten": True}, "loss": {"name": "ppo"}},
    # https://arxiv.org/abs/2402.03300
    "grpo": {
        "advantage": _TO_GROUP,
        "loss": {"name": "ppo", "aggregation": "sequence_mean_token_mean"},
        "kl": _IN_LOSS,
    },
    # https://arxiv.org/abs/2503.20783
    "dr_grpo": {
        "advantage": {"name": "group", "baseline": "mean", "scale": "none"},
        "loss": {"name": "ppo", "aggregation": "constant"},
        "kl": _IN_LOSS,
    },
    # https://arxiv.org/abs/2503.14476
    "dapo": {
        "advantage": _TO_GROUP,
        "loss": {"name": "ppo", "clip_low": 0.2, "clip_high": 0.28},
        "kl": _NO_KL,
        "rollout": {"filter_zero_std": True, "resample": 2},
    },
    # https://arxiv.org/abs/2402.14740
    "rloo": {
        "advantage": {"name": "group", "baseline": "leave_one_out", "scale": "none"},
        "loss": _PER_RESPONSE,
    },
    # https://doi.org/10.1007/BF00992696
    "reinforce": {
        "advantage": {"name": "group", "baseline": "none", "scale": "none"},
        "loss": _PER_RESPONSE,
    },
    # https://arxiv.org/abs/2501.03262
    "reinforce_pp": {
        "advantage": {"name": "reward_to_go", "whiten": True},
        "loss": {"name": "ppo"},
    },
    # https://arxiv.org/abs/2310.10505
    "remax": {"advantage": {"name": "remax"}, "loss": _PER_RESPONSE},
    # https://arxiv.org/abs/2507.18071
    "gspo": {
        "advantage": _TO_GROUP,
        "loss": {"name": "gspo", "aggregation": "sequence_mean_token_mean"},
        "kl": _NO_KL,
    },
    # https://arxiv.org/abs/2506.13585
    "cispo": {"advantage": _TO_GROUP, "loss": {"name": "cispo"}, "kl": _NO_KL},
}


def on_policy(algorithm: str, **sections: Mapping[str, Any]) -> ConfigDict:
    """The configuration of the policy stage for one of `ALGORITHMS`, `sections` laid over it.

    Raises:
      UserError: there is no such algorithm.
    """
    if algorithm not in ALGORITHMS:
        raise UserError(f"there is no algorithm {algorithm!r}; there are: {', '.join(ALGORITHMS)}")
    config = lay(base("policy", batch={"rows": 8}), ALGORITHMS[algorithm])
    if config.advantage.name != "gae":
        del config.critic
    return lay(config, sections)


def online_preference(**sections: Mapping[str, Any]) -> ConfigDict:
    """The configuration of the online_preference stage, `sections` laid over it."""
    return lay(base("online_preference", batch={"rows": 8}), sections)


def best_of_n(**sections: Mapping[str, Any]) -> ConfigDict:
    """The configuration of the best_of_n stage, `sections` laid over it."""
    return lay(base("best_of_n", data={"row_length": 512}), sections)


def no_variant(file: str, variant: str, known: str) -> UserError:
    """The error for a variant that a file in experiments/ does not have."""
    return UserError(f"experiments/{file} has no variant {variant!r}; there are: {known}")


def model(preset: str, **changes: Any) -> dict[str, Any]:
    """The section model: a preset of models/config.py, and what differs."""
    return {"preset": preset} | changes


# Of the experiments' variants "own": a pre-trained model and the user's data.
OWN_DATA = {"train": "", "validation": "", "row_length": 1024, "over_long": "drop"}
OWN_PROMPTS = {"train": "", "validation": "", "row_length": 1024}
OWN_EVALUATION = {"source": "", "count": 64}  # on what is held out
OWN_ROLLOUT = {"max_prompt_tokens": 512, "max_new_tokens": 256}
TUNING = {"name": "adamw", "warmup_steps": 10, "schedule": "linear", "final_fraction": 0.0}


def resolve(config: ConfigDict) -> Config:
    """The dataclasses that a stage is run with.

    Raises:
        UserError: the stage has no such field, which is told with the stages that read it or the
            nearest that there is, or a field's value is wrong.
    """
    for name in options.leaves(config):
        if line := unknown_field(config.stage, name, config):
            raise UserError(f"config: {line}")
    sections = {
        name: options.build(section, config[name], name)
        for name, section in STAGES[config.stage].items()
        if name in config
    }
    return Config(config.stage, config.get("seed", 0), **sections)


def has_field(stage: str, name: str) -> bool:
    """Whether a stage reads the field of that dotted name, in any variant."""
    section, _, last = name.partition(".")
    if not last:
        return name in ("stage", "seed")
    kind = STAGES[stage].get(section)
    member = kind is RewardedInit and last.startswith("reward_")
    return kind is not None and (member or last in options.field_names(kind))


def unknown_field(stage: str, name: str, given: Mapping[str, Any] | None = None) -> str | None:
    """A line about a dotted name that is no field of the stage: who reads it, or the nearest.

    The options of a loss that `given` names by `loss.file` are known once its file is read.
    """
    of_file = name.startswith("loss.") and given and given.get("loss", {}).get("file")
    if has_field(stage, name) or of_file:
        return None
    readers = [each for each in STAGES if has_field(each, name)]
    if name in GONE:
        return f"there is no {name} any more: {GONE[name]}"
    if readers:
        why = WHOLE if stage == "policy" and name in TRUNCATION else ""
        return f"the {stage} stage has no {name}; it is read by {', '.join(readers)}{why}"
    section, _, last = name.rpartition(".")
    kinds = {at: kind for at, kind in STAGES[stage].items() if options.field_names(kind)}
    own = {at: sorted(options.field_names(kind)) for at, kind in kinds.items()}
    what = name
    if name in own:
        return f"{name} is a section. {_told(name, own)}"
    if section in own:
        near = f"{section}.{nearest(last, own[section])}"
    elif having := [each for each in STAGES if section in STAGES[each] and each != stage]:
        return f"the {stage} stage has no section {section}; it is of {', '.join(having)}"
    elif section:
        near, what = nearest(section, own), f"section {section}"
    else:  # named without its section
        every = {field: f"{at}.{field}" for at, names in own.items() for field in names}
        every |= {at: at for at in [*own, "seed"]}
        near = every[nearest(name, every)]
    told = _told(near.partition(".")[0], own)
    return f"the {stage} stage has no {what}; did you mean {near}? {told}"


def _told(section: str, own: Mapping[str, list[str]]) -> str:
    """A sentence that lists a section's fields, or all sections for what is none."""
    if section not in own:
        return f"The sections are: {', '.join(own)}"
    return f"The fields of {section} are: {', '.join(own[section])}"
