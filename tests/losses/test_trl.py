"""Losses and gradients against TRL's own trainers, on one small model and one batch.

Every number of every gradient is compared. TRL's setting → ours, where they are not one name:

SFTTrainer
    completion_only_loss=True            the prompt is no target: `Document.is_target`
    label_smoothing_factor               loss.label_smoothing
    num_items_in_batch                   (total, weight): tokens of the whole batch, always
    loss_type="dft"                      none
RewardTrainer
    center_rewards_coefficient (None)    loss.centering (0)
    column "margin"                      none
DPOTrainer
    loss_type="ipo"                      ipo_reduction=mean; ours, "sum", is the paper's
    label_smoothing                      label_smoothing, of robust and exo_pair; aot has none
    f_divergence_type="js_divergence"    divergence=js, and so on; of sigmoid and robust only
    f_alpha_divergence_coef = a          alpha = 1 − a
    discopop_tau                         temperature
    loss_type=["sigmoid", "sft"]         loss.sft_coefficient: a mean over pairs of token means,
                                         where TRL's is a mean over the batch's tokens. They are one
                                         on a pair, so the pairs are given to TRL one by one
    ld_alpha, use_weighting              none
CPOTrainer, ORPOTrainer, KTOTrainer
    simpo_gamma                          gamma
    cpo_alpha, ORPO's NLL                sft_coefficient: as above; ORPO's is of the prompt too
    KTO's mean over 2N responses         half our mean over N pairs; our kl is of mismatched chosen
                                         responses only, so those are given to TRL
GRPOTrainer
    loss_type, epsilon, delta, …         OBJECTIVES below
    temperature                          rollout.temperature
    scale_rewards                        advantage.scale
    a reward of None                     weight 0: the same advantages; that sequence then leaves
                                         our means, but not TRL's numbers of tokens and sequences
    beta                                 kl.coefficient, estimator=k3, level=token
    use_bias_correction_kl (True)        kl.importance (False): the ratio of tokens or sequences by
                                         kl.level, TRL's by importance_sampling_level
    entropy_coef                         loss.entropy_coefficient: ours is averaged as the loss is,
                                         TRL's over tokens, which is one for token_mean
    vllm_importance_sampling_mode        loss.importance and loss.importance_mode
    vllm_importance_sampling_clip_max    loss.importance_cap
    mask_truncated_completions           rollout.truncated="mask": a sequence left out also leaves
                                         our number of sequences, but not TRL's
    off_policy_mask_threshold, top_entropy_quantile, loss_type="vespo",
    multi_objective_aggregation          none
RLOOTrainer
    advantages, beta                     group, leave_one_out; kl.placement=reward, k1
    the clip of whole responses          ppo_sequence, sequence_mean
PPOTrainer, which TRL 1.16 no longer has: its formulae are written down here
    the score on the slot behind EOS     `token_rewards(position="after")`, `with_next_slot`; our
                                         stage has it on the last token
    whiten_rewards                       `whiten(shift_mean=False)`
    missing_eos_penalty                  `missing_eos(mode="subtract")`
    vf_coef                              none: the critic is a model with an optimizer of its own
"""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from rlhf_jax.data.packing import Document, Group, pack_documents, pack_groups
from rlhf_jax.hub.hf_config import read_config
from rlhf_jax.hub.hf_weights import read_weights, write_weights
from rlhf_jax.losses.advantages import gae, whiten
from rlhf_jax.losses.cross_entropy import TokenStatistics, token_cross_entropy
from rlhf_jax.losses.policy import value_loss
from rlhf_jax.losses.reductions import mean
from rlhf_jax.losses.reward import bradley_terry
from rlhf_jax.losses.shaping import kl_estimate, missing_eos, token_rewards
from rlhf_jax.models import scoring
from rlhf_jax.rl.layout import Rollout, pack_rows, select
from rlhf_jax.rl.objectives import advantages, policy_objective
from rlhf_jax.sampling.generate import Completion
from rlhf_jax.stages import defaults, preference
from rlhf_jax.tasks.prompts import PromptSet

torch = pytest.importorskip("torch", reason="needs requirements-parity.txt")
transformers = pytest.importorskip("transformers", reason="needs requirements-parity.txt")
trl = pytest.importorskip("trl", reason="needs requirements-parity.txt")
datasets = pytest.importorskip("datasets", reason="needs requirements-parity.txt")
cpo_trainer = pytest.importorskip("trl.experimental.cpo")
orpo_trainer = pytest.importorskip("trl.experimental.orpo")
gmpo_trainer = pytest.importorskip("trl.experimental.gmpo")

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
PAD, EOS = 0, 1
ROW = 48
NEW = 10  # tokens of an answer at most
TEMPERATURE = 0.7


def draw(seed, lengths):
    random = np.random.default_rng(seed)
    return [random.integers(2, 61, n).tolist() for n in lengths]


PROMPTS = draw(0, (5, 9, 3, 7))
CHOSEN = [[*ids, EOS] for ids in draw(1, (6, 2, 9, 4))]
REJECTED = [[*ids, EOS] for ids in draw(2, (3, 8, 9, 1))]
PAIRS = [
    Group(p, (c, r), i) for i, (p, c, r) in enumerate(zip(PROMPTS, CHOSEN, REJECTED, strict=True))
]
EACH = 4
FINISHED = np.array([True, True, False, True, True, True, True, False])
ANSWERS = [
    [*ids[:-1], EOS] if finished else ids
    for ids, finished in zip(draw(3, (6, 3, NEW, 5, 1, 8, 4, 7)), FINISHED, strict=True)
]
REWARDS = [1.0, -0.5, 2.0, 0.25, 0.75, 0.5, -1.0, None]


def text(ids):
    return " ".join("</s>" if i == EOS else f"w{i}" for i in ids)


@pytest.fixture(scope="module")
def tokenizer():
    """One word a token, so that TRL's texts have our ids."""
    words = {"<pad>": PAD, "</s>": EOS} | {f"w{i}": i for i in range(2, 61)}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>"
    )


def save_model(directory, kind, seed, near=None):
    """A random model, or one near another; norms too, so that none can hide a mistake."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        **SHAPE, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None, num_labels=1
    )
    model = kind(config)
    if near is not None:
        model.load_state_dict(near.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            if near is not None:
                parameter += 0.03 * torch.randn_like(parameter)
            elif parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    family, read = read_config(directory)
    if kind is transformers.LlamaForSequenceClassification:
        read = dataclasses.replace(read, head="scalar")
    return model, types.SimpleNamespace(
        path=directory, config=read, params=read_weights(directory, family, read)
    )


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """Policy and reference as we read them, and the reference as torch has it."""
    path = tmp_path_factory.mktemp("models")
    theirs, ours = save_model(path / "policy", transformers.LlamaForCausalLM, 0)
    reference, ours_reference = save_model(
        path / "reference", transformers.LlamaForCausalLM, 1, near=theirs
    )
    return types.SimpleNamespace(ours=ours, reference=ours_reference, torch_reference=reference)


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    path = tmp_path_factory.mktemp("scorer")
    return save_model(path, transformers.LlamaForSequenceClassification, 2)


def make_trainer(name, model, rows, tokenizer, path, *, fields, **arguments):
    """TRL's trainer of that name in the middle of its training; `fields` of its config."""
    config = getattr(trl, f"{name}Config")(
        output_dir=str(path),
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        **fields,
    )
    trainer = getattr(trl, f"{name}Trainer")(
        model=str(model.path),
        args=config,
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer,
        **arguments,
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def collated(trainer, indices=None):
    """A batch as TRL tokenizes and collates it."""
    rows = trainer.train_dataset
    return trainer.data_collator([rows[i] for i in indices or range(len(rows))])


def pair_texts():
    return {
        "prompt": [text(ids) for ids in PROMPTS],
        "chosen": [" " + text(ids) for ids in CHOSEN],
        "rejected": [" " + text(ids) for ids in REJECTED],
    }


# Compiled once, not once for every loss on top of them.
target_statistics = jax.jit(
    scoring.target_statistics, static_argnums=0, static_argnames="temperature"
)
sequence_logprobs = jax.jit(scoring.sequence_logprobs, static_argnums=0)
sequence_scores = jax.jit(scoring.sequence_scores, static_argnums=0)
target_values = jax.jit(scoring.target_values, static_argnums=0)


def compare(tmp_path, read, ours, model, loss):
    """Value and gradients: `ours` is a function of params to (total, weight)."""
    value, gradient = jax.value_and_grad(lambda params: mean(ours(params)))(read.params)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5, atol=1e-5)
    model.zero_grad()
    loss.backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    write_weights(tmp_path, read.config, gradient)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, theirs in wanted.items():
        largest = theirs.abs().max().item()
        assert largest > 0, name
        np.testing.assert_allclose(found[name], theirs, rtol=0, atol=1e-4 * largest, err_msg=name)


@pytest.mark.parametrize(
    ("completion_only", "smoothing"),
    [(True, 0.0), (True, 0.1), pytest.param(False, 0.1, marks=pytest.mark.slow)],
)
def test_sft(policy, tokenizer, tmp_path, completion_only, smoothing):
    rows = {"prompt": [text(ids) for ids in PROMPTS], "completion": [" " + text(c) for c in CHOSEN]}
    fields = {"completion_only_loss": completion_only, "label_smoothing_factor": smoothing}
    trainer = make_trainer("SFT", policy.ours, rows, tokenizer, tmp_path, fields=fields)
    documents = [
        Document(p + c, [0] + [0 if completion_only else 1] * (len(p) - 1) + [1] * len(c))
        for p, c in zip(PROMPTS, CHOSEN, strict=True)
    ]
    batch, _ = pack_documents(documents, ROW)

    def ours(params):
        statistics = target_statistics(policy.ours.config, params, batch)
        return token_cross_entropy(statistics, batch["weights"], label_smoothing=smoothing)[0]

    loss = trainer.compute_loss(trainer.model, collated(trainer))
    compare(tmp_path, policy.ours, ours, trainer.model, loss)


@pytest.mark.parametrize("centering", [None, 0.01])
def test_reward(scorer, tokenizer, tmp_path, centering):
    _, reward_model = scorer
    fields = {"center_rewards_coefficient": centering}
    trainer = make_trainer("Reward", reward_model, pair_texts(), tokenizer, tmp_path, fields=fields)
    batch, _ = pack_groups(PAIRS, ROW, branches=2)

    def ours(params):
        scores = sequence_scores(reward_model.config, params, batch).reshape(-1, 2)
        return bradley_terry(
            scores[:, 0],
            scores[:, 1],
            batch["valid"].reshape(-1),
            centering=centering or 0.0,
        )[0]

    loss = trainer.compute_loss(trainer.model, collated(trainer))
    compare(tmp_path, reward_model, ours, trainer.model, loss)


@pytest.fixture(scope="module")
def dpo(policy, tokenizer, tmp_path_factory):
    return make_trainer(
        "DPO",
        policy.ours,
        pair_texts(),
        tokenizer,
        tmp_path_factory.mktemp("dpo"),
        fields={},
        ref_model=policy.torch_reference,
    )


@pytest.fixture(scope="module")
def pairs(policy):
    """Packed pairs with the reference's log-probs."""
    batch, _ = pack_groups(PAIRS, ROW, branches=2)
    reference = policy.reference
    logprobs = sequence_logprobs(reference.config, reference.params, batch)
    return batch | {"reference_logprobs": np.asarray(logprobs)}


def preference_objective(monkeypatch, policy, batch, **fields):
    """The stage's own loss as a function of params."""
    monkeypatch.setattr(preference, "sequence_logprobs", sequence_logprobs)
    config = defaults.resolve(defaults.base("preference", loss=fields))
    return lambda params: preference.loss(config, policy.ours.config, params, batch, None)[0]


SMOOTHED = {"label_smoothing": 0.2}
ALPHA = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}
DPO = {
    "sigmoid": ("sigmoid", {}, {}),
    "hinge": ("hinge", {}, {}),
    "ipo": ("ipo", {}, {"ipo_reduction": "mean"}),
    "exo_pair": ("exo_pair", SMOOTHED, {"label_smoothing": 0.2}),
    "nca_pair": ("nca_pair", {}, {}),
    "robust": ("robust", SMOOTHED, {"label_smoothing": 0.2}),
    "bco_pair": ("bco_pair", {}, {}),
    "sppo_hard": ("sppo_hard", {}, {}),
    "aot": ("aot", {}, {}),
    "aot_unpaired": ("aot_unpaired", {}, {}),
    "apo_zero": ("apo_zero", {}, {}),
    "apo_down": ("apo_down", {}, {}),
    "discopop": ("discopop", {"args.discopop_tau": 0.1}, {"temperature": 0.1}),
    "sigmoid_norm": ("sigmoid_norm", {}, {}),
    "forward_kl": ("sigmoid", {"f_divergence_type": "forward_kl"}, {"divergence": "forward_kl"}),
    "js": ("sigmoid", {"f_divergence_type": "js_divergence"}, {"divergence": "js"}),
    "alpha": ("sigmoid", ALPHA, {"divergence": "alpha", "alpha": 0.7}),
    "robust-alpha": (
        "robust",
        {**ALPHA, **SMOOTHED},
        {"divergence": "alpha", "alpha": 0.7, "label_smoothing": 0.2},
    ),
}


def set_fields(monkeypatch, trainer, fields):
    for name, value in fields.items():
        owner, _, attribute = name.rpartition(".")
        monkeypatch.setattr(getattr(trainer, owner) if owner else trainer, attribute, value)


@pytest.mark.parametrize("case", DPO)
def test_dpo(policy, dpo, pairs, monkeypatch, tmp_path, case):
    name, fields, options = DPO[case]
    set_fields(monkeypatch, dpo, {"loss_types": [name], "beta": 0.3} | fields)
    ours = preference_objective(monkeypatch, policy, pairs, name=name, beta=0.3, **options)
    loss = dpo.compute_loss(dpo.model, collated(dpo))
    compare(tmp_path, policy.ours, ours, dpo.model, loss)


def test_dpo_with_sft(policy, dpo, pairs, monkeypatch, tmp_path):
    fields = {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "beta": 0.3}
    set_fields(monkeypatch, dpo, fields)
    ours = preference_objective(
        monkeypatch, policy, pairs, name="sigmoid", beta=0.3, sft_coefficient=0.5
    )
    losses = [dpo.compute_loss(dpo.model, collated(dpo, [i])) for i in range(len(PAIRS))]
    compare(tmp_path, policy.ours, ours, dpo.model, torch.stack(losses).mean())


def their_logprobs(trainer, batch):
    """Summed log-probs and lengths of the answers, chosen before rejected."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    output = trainer.model(**inputs, labels=labels, fused_lm_head=True)
    return output.log_probs.sum(1), batch["completion_mask"].sum(1)


def cpo(logprobs, lengths, **fields):
    trainer = types.SimpleNamespace(
        accelerator=types.SimpleNamespace(device="cpu"), label_smoothing=0.0, alpha=0.0, **fields
    )
    if fields["loss_type"] == "simpo":
        logprobs = logprobs / lengths
    return cpo_trainer.CPOTrainer.cpo_loss(trainer, *logprobs.chunk(2))[0].mean()


def orpo(logprobs, lengths, *, beta):
    """With the NLL of the answers, the mean of token means."""
    trainer = types.SimpleNamespace(accelerator=types.SimpleNamespace(device="cpu"), beta=beta)
    chosen, rejected = (logprobs / lengths).chunk(2)
    ratio, *_ = orpo_trainer.ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)
    return -(chosen + ratio).mean()


REFERENCE_FREE = {
    "cpo": (
        lambda *logprobs: cpo(*logprobs, loss_type="sigmoid", beta=0.3),
        {"sft_weight": 0.0},
    ),
    "simpo": (
        lambda *logprobs: cpo(*logprobs, loss_type="simpo", beta=0.3, simpo_gamma=0.7),
        {"gamma": 0.7},
    ),
    "orpo": (lambda *logprobs: orpo(*logprobs, beta=0.3), {}),
}


@pytest.mark.parametrize("name", REFERENCE_FREE)
def test_reference_free(policy, dpo, pairs, monkeypatch, tmp_path, name):
    theirs, fields = REFERENCE_FREE[name]
    ours = preference_objective(monkeypatch, policy, pairs, name=name, beta=0.3, **fields)
    loss = theirs(*their_logprobs(dpo, collated(dpo)))
    compare(tmp_path, policy.ours, ours, dpo.model, loss)


@pytest.mark.slow
def test_kto(policy, tokenizer, monkeypatch, tmp_path):
    answers = [ids for pair in zip(CHOSEN, REJECTED, strict=True) for ids in pair]
    rows = {
        "prompt": [text(ids) for ids in PROMPTS for _ in range(2)],
        "completion": [" " + text(ids) for ids in answers],
        "label": [True, False] * len(PROMPTS),
    }
    trainer = make_trainer(
        "KTO",
        policy.ours,
        rows,
        tokenizer,
        tmp_path,
        fields={"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7},
        ref_model=policy.torch_reference,
    )
    following = [*CHOSEN[1:], CHOSEN[0]]
    mismatched = [
        {"prompt_ids": p, "completion_ids": c, "KL_completion_ids": c, "label": True}
        for p, c in zip(PROMPTS, following, strict=True)
    ]
    of_kl = {n: x for n, x in trainer.data_collator(mismatched).items() if n.startswith("KL_")}
    loss = trainer.compute_loss(trainer.model, collated(trainer) | of_kl)

    groups = [
        Group(pair.prompt, (*pair.branches, other), pair.example)
        for pair, other in zip(PAIRS, following, strict=True)
    ]
    batch, _ = pack_groups(groups, ROW, branches=3)
    reference = policy.reference
    logprobs = sequence_logprobs(reference.config, reference.params, batch)
    ours = preference_objective(
        monkeypatch,
        policy,
        batch | {"reference_logprobs": np.asarray(logprobs)},
        name="kto",
        beta=0.3,
        desirable_weight=1.5,
        undesirable_weight=0.7,
    )
    assert trainer._metrics["train"]["kl"] > [0]
    compare(tmp_path, policy.ours, ours, trainer.model, 2 * loss)


def sampling_trainer(name, policy, tokenizer, path, **fields):
    """A trainer whose samples are ANSWERS and whose rewards are the column "score"."""

    def reward(completions, score, **_):
        return score

    fields |= {
        "per_device_train_batch_size": len(ANSWERS),
        "num_generations": EACH,
        "max_completion_length": NEW,
        "temperature": TEMPERATURE,
    }
    rows = {"prompt": [text(ids) for ids in PROMPTS], "score": [0.0] * len(PROMPTS)}
    trainer = make_trainer(
        name, policy.ours, rows, tokenizer, path, fields=fields, reward_funcs=reward
    )
    trainer.ref_model.load_state_dict(policy.torch_reference.state_dict())
    return trainer


def scored(trainer, rewards, behaviour=None):
    """What TRL makes of ANSWERS before it trains on them."""
    prompts = [p for p in PROMPTS[: len(ANSWERS) // EACH] for _ in range(EACH)]
    texts = [text(ids) for ids in ANSWERS]
    if isinstance(trainer, trl.RLOOTrainer):
        made = prompts, ANSWERS, texts
    else:
        made = prompts, ANSWERS, None, texts, behaviour, {}, None, None
    trainer._generate = lambda prompts: made
    return trainer._generate_and_score_completions(
        [{"prompt": text(p), "score": r} for p, r in zip(prompts, rewards, strict=True)]
    )


@pytest.fixture(scope="module")
def grpo(policy, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("grpo")
    return sampling_trainer("GRPO", policy, tokenizer, path, beta=0.1)


@pytest.fixture(scope="module")
def rollout(policy):
    """ANSWERS as packed rows; what policy and reference say of them, and samplers near it."""
    completions = [
        Completion(a, np.zeros(len(a), np.float32), bool(f))
        for a, f in zip(ANSWERS, FINISHED, strict=True)
    ]
    prompts = PROMPTS[: len(ANSWERS) // EACH]
    rows = pack_rows(
        Rollout.of(PromptSet(prompts, prompts), completions, [""] * len(ANSWERS), NEW),
        row_length=ROW,
        max_prompt=max(map(len, prompts)),
        multiple=2,
        shortest=8,
    )
    members = rows["members"].reshape(-1)
    assert len(members) > len(ANSWERS)

    def logprobs(model):
        return in_order(members, statistics_of(model.config, model.params, rows).logprobs)

    mask = in_order(members, rows["mask"].reshape(-1, NEW))
    noise = np.random.default_rng(4).normal(size=(2, *mask.shape)).astype(np.float32) * mask
    now = logprobs(policy.ours)
    return types.SimpleNamespace(
        rows=rows,
        members=members,
        mask=mask,
        logprobs=now,
        ref_logprobs=logprobs(policy.reference),
        old_logprobs=now + 0.3 * noise[0],
        behaviour_logprobs=now + 0.3 * noise[1],
    )


def in_order(members, x):
    """The packed rows' [N, …]."""
    return np.asarray(x)[np.argsort(members, kind="stable")[-len(ANSWERS) :]]


def statistics_of(config, params, rows):
    """By sequence, [rows · sequences, T]."""
    found = target_statistics(config, params, rows, temperature=TEMPERATURE)
    return TokenStatistics(*(select(x, rows) for x in found))


def policy_settings(algorithm, **sections):
    rollout = {"samples": EACH, "max_new_tokens": NEW, "temperature": TEMPERATURE}
    return defaults.resolve(defaults.on_policy(algorithm, rollout=rollout, **sections))


def our_advantages(settings, rollout, rewards):
    weights = np.array([r is not None for r in rewards], np.float32)
    sampled = Rollout(
        scores=np.array([0.0 if r is None else r for r in rewards], np.float32),
        weights=weights,
        finished=FINISHED,
        mask=rollout.mask,
        behaviour_logprobs=rollout.logprobs,
        old_logprobs=rollout.logprobs,
        ref_logprobs=rollout.ref_logprobs,
        old_values=np.zeros_like(rollout.mask),
        last_values=np.zeros_like(weights),
        greedy_scores=np.zeros(len(weights) // EACH, np.float32),
    )
    return advantages(settings, sampled, jnp.float32(settings.kl.coefficient))[0]["advantages"]


def placed(rollout, x):
    """[N, …] where the packed rows have it."""
    real = (rollout.members >= 0).reshape(-1, *[1] * (x.ndim - 1))
    return jnp.where(real, x[rollout.members], 0)


def our_policy_objective(settings, policy, rollout, weights=None, **arrays):
    """Of params; `arrays` [N, …] replace those of the rollout."""
    weights = np.ones(len(ANSWERS), np.float32) if weights is None else weights
    names = ("old_logprobs", "ref_logprobs", "behaviour_logprobs")
    batch = {name: getattr(rollout, name) for name in names} | {"sequence_weights": weights}
    batch = {name: placed(rollout, x) for name, x in (batch | arrays).items()}
    batch["mask"] = jnp.asarray(rollout.rows["mask"].reshape(-1, NEW))
    batch["kl_coefficient"] = jnp.full(1, settings.kl.coefficient)

    def objective(params):
        statistics = statistics_of(policy.ours.config, params, rollout.rows)
        return policy_objective(settings, settings.loss.objective, statistics, batch)[0]

    return objective


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_grpo_advantages(policy, grpo, rollout, monkeypatch, scale):
    monkeypatch.setattr(grpo, "scale_rewards", scale)
    settings = policy_settings("grpo", advantage={"scale": scale})
    for rewards in (REWARDS, [1.0] * EACH + REWARDS[EACH:]):
        wanted = scored(grpo, rewards)["advantages"].numpy()[:, None] * rollout.mask
        found = our_advantages(settings, rollout, rewards)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def clipping(low, high, **options):
    return {"clip_low": low, "clip_high": high} | options


CLIP = {"epsilon_low": 0.1, "epsilon_high": 0.2}
NARROW = {"epsilon_low": 0.02, "epsilon_high": 0.05}
PPO = {"name": "ppo", **clipping(0.1, 0.2)}
GSPO = {"name": "gspo", **clipping(0.02, 0.05)}
NO_KL = {"kl": {"placement": "none"}}
KL = {"kl": {"coefficient": 0.1}}
OBJECTIVES = {
    "grpo": ({"loss_type": "grpo", **CLIP}, "grpo", {"loss": PPO, **KL}),
    "grpo-unbiased-kl": (
        {"loss_type": "grpo", "args.use_bias_correction_kl": True, **CLIP},
        "grpo",
        {"loss": PPO, "kl": {"coefficient": 0.1, "importance": True}},
    ),
    "grpo-delta": (
        {"loss_type": "grpo", "args.delta": 1.3, "beta": 0.0, **CLIP},
        "grpo",
        {"loss": {"name": "ppo", **clipping(0.1, 0.2, delta=1.3)}, **NO_KL},
    ),
    "bnpo": (
        {"loss_type": "bnpo", **CLIP},
        "grpo",
        {"loss": {**PPO, "aggregation": "token_mean"}, **KL},
    ),
    "dr_grpo": ({"loss_type": "dr_grpo", **CLIP}, "dr_grpo", {"loss": PPO, **KL}),
    "dapo": ({"loss_type": "dapo", "beta": 0.0, **CLIP}, "dapo", {"loss": PPO}),
    "dapo-entropy": (
        {
            "loss_type": "dapo",
            "beta": 0.0,
            "entropy_coef": 0.3,
            "_entropy_bonus_enabled": True,
            **CLIP,
        },
        "dapo",
        {"loss": {**PPO, "entropy_coefficient": 0.3}},
    ),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", **NARROW},
        "grpo",
        {"loss": GSPO, **KL},
    ),
    "luspo": (
        {
            "loss_type": "luspo",
            "importance_sampling_level": "sequence",
            "beta": 0.0,
            **NARROW,
        },
        "grpo",
        {"loss": {**GSPO, "aggregation": "sequence_mean"}, **NO_KL},
    ),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.1},
        "grpo",
        {
            "loss": {
                "name": "cispo",
                "clip_high": 1.1,
                "aggregation": "token_mean",
            },
            **KL,
        },
    ),
    "sapo": (
        {"loss_type": "sapo", "args.sapo_temperature_pos": 1.2, "args.sapo_temperature_neg": 1.6},
        "grpo",
        {"loss": {"name": "sapo", "tau_positive": 1.2, "tau_negative": 1.6}, **KL},
    ),
    "gmpo": (
        CLIP,
        "grpo",
        {"loss": {"name": "gmpo", **clipping(0.1, 0.2)}, **KL},
    ),
}


@pytest.mark.parametrize("case", OBJECTIVES)
def test_grpo(policy, grpo, rollout, monkeypatch, tmp_path, case):
    fields, algorithm, sections = OBJECTIVES[case]
    batch = scored(grpo, REWARDS)
    set_fields(monkeypatch, grpo, {"args.use_bias_correction_kl": False} | fields)
    kind = gmpo_trainer.GMPOTrainer if case == "gmpo" else trl.GRPOTrainer
    old = {"old_per_token_logps": torch.tensor(rollout.old_logprobs)}
    loss = kind._compute_loss(grpo, grpo.model, batch | old)
    ours = our_policy_objective(
        policy_settings(algorithm, **sections),
        policy,
        rollout,
        advantages=batch["advantages"].numpy()[:, None] * rollout.mask,
    )
    compare(tmp_path, policy.ours, ours, grpo.model, loss)


def test_answers_cut_off_are_left_out(policy, grpo, rollout, monkeypatch, tmp_path):
    fields = {
        "loss_type": "dapo",
        "mask_truncated_completions": True,
        "args.use_bias_correction_kl": False,
        **CLIP,
    }
    set_fields(monkeypatch, grpo, fields)
    batch = scored(grpo, REWARDS)
    old = {"old_per_token_logps": torch.tensor(rollout.old_logprobs)}
    loss = grpo._compute_loss(grpo.model, batch | old)
    ours = our_policy_objective(
        policy_settings("grpo", loss={**PPO, "aggregation": "token_mean"}, **KL),
        policy,
        rollout,
        weights=FINISHED.astype(np.float32),
        advantages=batch["advantages"].numpy()[:, None] * rollout.mask,
    )
    compare(tmp_path, policy.ours, ours, grpo.model, loss)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_the_sampler_is_corrected(policy, grpo, rollout, monkeypatch, tmp_path, level, mode):
    """TRL's old log-probs are then those of the policy."""
    fields = {
        "loss_type": "dapo",
        "beta": 0.0,
        "use_vllm": True,
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": f"{level}_{mode}",
        "vllm_importance_sampling_clip_max": 1.2,
    }
    set_fields(monkeypatch, grpo, fields)
    behaviour = [
        row[: len(a)].tolist() for row, a in zip(rollout.behaviour_logprobs, ANSWERS, strict=True)
    ]
    batch = scored(grpo, REWARDS, behaviour)
    importance = {"importance": level, "importance_mode": mode, "importance_cap": 1.2}
    ours = our_policy_objective(
        policy_settings("dapo", loss=importance),
        policy,
        rollout,
        old_logprobs=rollout.logprobs,
        advantages=batch["advantages"].numpy()[:, None] * rollout.mask,
    )
    compare(tmp_path, policy.ours, ours, grpo.model, grpo._compute_loss(grpo.model, batch))


def test_rloo(policy, tokenizer, rollout, tmp_path):
    fields = {"beta": 0.2, "epsilon": 0.1, "epsilon_high": 0.3}
    trainer = sampling_trainer("RLOO", policy, tokenizer, tmp_path, **fields)
    batch = scored(trainer, REWARDS)
    settings = policy_settings(
        "rloo",
        kl={"coefficient": 0.2},
        loss={"name": "ppo_sequence", **clipping(0.1, 0.3)},
    )
    found = our_advantages(settings, rollout, REWARDS)
    wanted = batch["advantages"].numpy()[:, None] * rollout.mask
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    batch["old_logps"] = torch.tensor((rollout.old_logprobs * rollout.mask).sum(1))
    ours = our_policy_objective(settings, policy, rollout, advantages=found)
    compare(tmp_path, policy.ours, ours, trainer.model, trainer.compute_loss(trainer.model, batch))


def whitened(x, mask, shift_mean=True):
    mean = x[mask].mean()
    x = (x - mean) * torch.rsqrt(x[mask].var() + 1e-8)
    return torch.where(mask, x if shift_mean else x + mean, 0)


def ppo_advantages(rollout, scores, values, *, estimator, whiten_rewards):
    """(advantages, returns) as trl/experimental/ppo/ppo_trainer.py had them, commit 0062ee1.

    Steps 4 to 6 of its `train`, with kl_coef=0.05, gamma=0.9, lam=0.8.
    """
    lengths = torch.tensor(rollout.mask.sum(1)).long()
    inside = torch.arange(NEW) < lengths[:, None]
    behind = torch.arange(NEW) <= lengths[:, None]
    ratio = torch.tensor(rollout.ref_logprobs - rollout.logprobs)
    kl = -ratio if estimator == "k1" else ratio.exp() - 1 - ratio
    rewards = torch.where(inside, -0.05 * kl, 0)
    rewards[torch.arange(len(lengths)), lengths.clamp(max=NEW - 1)] += scores
    if whiten_rewards:
        rewards = whitened(rewards, behind, shift_mean=False)
    advantages = torch.zeros_like(rewards)
    last, following = torch.zeros(len(lengths)), torch.zeros(len(lengths))
    for t in reversed(range(NEW)):
        last = rewards[:, t] + 0.9 * following - values[:, t] + 0.9 * 0.8 * last
        advantages[:, t], following = last, values[:, t]
    return whitened(advantages, inside), advantages + values


def clipped_loss(ratio, advantages, inside):
    return torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))[inside].mean()


def clipped_value_loss(values, old_values, returns, behind):
    near = values.clamp(old_values - 0.2, old_values + 0.2)
    return 0.5 * torch.max((values - returns) ** 2, (near - returns) ** 2)[behind].mean()


@pytest.fixture(scope="module")
def queries():
    """Prompts padded on the left, answers on the right: ids, attention mask and positions."""
    prompts = [p for p in PROMPTS[: len(ANSWERS) // EACH] for _ in range(EACH)]
    width = max(map(len, prompts))
    ids = torch.zeros(len(ANSWERS), width + NEW, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (prompt, answer) in enumerate(zip(prompts, ANSWERS, strict=True)):
        start, end = width - len(prompt), width + len(answer)
        ids[i, start:end] = torch.tensor(prompt + answer)
        mask[i, start:end] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    return width, inputs | {"position_ids": mask.cumsum(1) - mask}


def with_next_slot(mask):
    """The mask [N, T] with the slot behind each row's last token added, where there is one."""
    behind = jnp.arange(NEW) == mask.sum(1, keepdims=True)
    return jnp.where(behind & mask.any(1, keepdims=True), 1, mask)


def our_values(config, params, rows):
    """Before every token, and on the slot behind the last the value after it."""
    before, after = target_values(config, params, rows)
    mask = rows["mask"].reshape(-1, NEW)
    behind = np.arange(NEW) == mask.sum(1, keepdims=True)
    return jnp.where(behind, after.reshape(-1, 1), select(before, rows))


@pytest.mark.parametrize(("estimator", "whiten_rewards"), [("k1", False), ("k3", True)])
def test_ppo(policy, scorer, rollout, queries, tmp_path, estimator, whiten_rewards):
    critic, our_critic = scorer
    width, inputs = queries
    mask = jnp.asarray(rollout.mask)
    with_next = with_next_slot(mask)
    inside, behind = (torch.tensor(np.asarray(x)) > 0 for x in (mask, with_next))
    noise = np.random.default_rng(5).normal(size=mask.shape).astype(np.float32)
    now = in_order(rollout.members, our_values(our_critic.config, our_critic.params, rollout.rows))
    values = (now + 0.3 * noise) * np.asarray(with_next)
    scores = np.array([r or 0.0 for r in REWARDS], np.float32)

    penalised = torch.tensor(scores) - 1.5 * torch.tensor(~FINISHED)
    wanted, wanted_returns = ppo_advantages(
        rollout,
        penalised,
        torch.tensor(values),
        estimator=estimator,
        whiten_rewards=whiten_rewards,
    )
    shaped = missing_eos(jnp.asarray(scores), jnp.asarray(FINISHED), mode="subtract", penalty=1.5)
    kl = kl_estimate(jnp.asarray(rollout.logprobs), jnp.asarray(rollout.ref_logprobs), estimator)
    rewards = token_rewards(jnp.zeros_like(shaped), mask, kl, coefficient=0.05)
    behind_or_last = jnp.minimum(mask.sum(1, keepdims=True), NEW - 1)
    rewards += jnp.where(jnp.arange(NEW) == behind_or_last, shaped[:, None], 0)
    if whiten_rewards:
        average = jnp.sum(rewards * with_next) / jnp.sum(with_next)
        rewards = jnp.where(with_next > 0, whiten(rewards, with_next) + average, 0)
    found, returns = gae(rewards, jnp.asarray(values), with_next, gamma=0.9, lam=0.8)
    found = whiten(found, mask)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(returns, wanted_returns.where(behind, 0), rtol=1e-5, atol=1e-5)

    actor = transformers.LlamaForCausalLM.from_pretrained(policy.ours.path)
    logits = actor(**inputs).logits[:, width - 1 : -1] / TEMPERATURE
    answers = inputs["input_ids"][:, width:, None]
    logprobs = logits.log_softmax(-1).gather(-1, answers)[..., 0]
    ratio = (logprobs - torch.tensor(rollout.old_logprobs)).exp()
    ours = our_policy_objective(policy_settings("ppo"), policy, rollout, advantages=found)
    compare(tmp_path, policy.ours, ours, actor, clipped_loss(ratio, wanted, inside))

    def our_value_loss(params):
        return value_loss(
            our_values(our_critic.config, params, rollout.rows),
            placed(rollout, values),
            placed(rollout, returns),
            with_next_slot(jnp.asarray(rollout.rows["mask"].reshape(-1, NEW))),
            clip=0.2,
        )[0]

    predicted = critic.score(critic.model(**inputs).last_hidden_state)[:, width - 1 : -1, 0]
    loss = clipped_value_loss(predicted, torch.tensor(values), wanted_returns, behind)
    compare(tmp_path, our_critic, our_value_loss, critic, loss)
