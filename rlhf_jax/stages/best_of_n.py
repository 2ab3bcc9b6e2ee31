"""Best-of-n: many answers to a prompt, the one a reward likes best; then fine-tuning on winners.

Selection at inference needs no training and is the yardstick of every other method: how proxy and
gold reward grow with n, and from where on they part, is measured without bias from N samples a
prompt ("WebGPT", https://arxiv.org/abs/2112.09332; "Scaling Laws for Reward Model
Overoptimization", https://arxiv.org/abs/2210.10760). Rejection-sampling fine-tuning then teaches
the winners ("Llama 2", https://arxiv.org/abs/2307.09288).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax import console
from rlhf_jax.config import Config
from rlhf_jax.data.batches import random_bits
from rlhf_jax.data.packing import Arrays, Document, pack_documents
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.chat_evaluation import evaluate_chat
from rlhf_jax.evaluation.gold_reward import verdicts_of
from rlhf_jax.evaluation.language_loss import language_evaluation
from rlhf_jax.evaluation.row_passes import rows_of
from rlhf_jax.evaluation.selection import (
    best_of_n,
    best_of_n_curve,
    best_of_n_win_rate,
    fit_overoptimization,
    kl_bound,
    kl_terms,
    win_bound,
)
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.scoring import target_cross_entropy
from rlhf_jax.rewards.scorers import Scores
from rlhf_jax.rl.judge import Judge
from rlhf_jax.rl.layout import Rollout
from rlhf_jax.rl.rollouts import read_prompts, sample_answers
from rlhf_jax.stages.fit import batches_of, fit
from rlhf_jax.stages.sampled import held_out_set
from rlhf_jax.stages.start import load_start
from rlhf_jax.tasks.prompts import PromptSet
from rlhf_jax.tasks.sources import parse_sources
from rlhf_jax.training.mesh import step_tokens
from rlhf_jax.training.rundir import RunDirectory
from rlhf_jax.training.saved_model import Model, save_model

BLOCK = 32  # prompts whose answers are held at a time


def run(config: Config, run: RunDirectory, parents: Mapping[str, Path]) -> dict[str, float]:
    """Measures best-of-n of `init.policy`, trains it on winners; the metrics of summary.json."""
    policy = load_start(config, parents["policy"])
    with Judge(config, parents, policy, run.path) as judge:
        held_out = held_out_set(config, policy)
        measured = measure(config, policy, held_out, judge)
        metrics, further = curves(config, run.path.name, measured)
        rows, held = winners(config, policy, training_prompts(config, policy), judge)

    evaluate = language_evaluation(policy.config, held, tokens=step_tokens(config))
    batches = batches_of(config, policy, {"": rows}, [1.0])
    loss_fn = partial(loss, config, policy.config)
    model, trained, _ = fit(config, run, policy, loss_fn, batches, evaluate)
    save_model(run.path, model)
    metrics |= {k: v for k, v in trained.items() if k.startswith("train/")}
    return metrics | evaluate_chat(config, run.path, model, parents["policy"], further=further)


def training_prompts(config: Config, policy: Model) -> PromptSet:
    """`best_of_n.prompts` training prompts: the first ones of each source, as many as it weighs."""
    sources, count = parse_sources(config.data.train), config.best_of_n.prompts
    ends = np.round(np.cumsum([*sources.values()]) / sum(sources.values()) * count).astype(int)
    sets = []
    for source, share in zip(sources, np.diff(ends, prepend=0).tolist(), strict=True):
        read = read_prompts(config, policy.tokenizer, source, "train")
        there = len(read.records)
        if there < share:
            print(f"{source}: {there:,} prompts, all there are of {share:,} asked for", flush=True)
        sets.append(read.take(range(min(share, there))))
    return PromptSet.joined(sets)


def loss(config: Config, shape: ModelConfig, params: Any, batch, rng):
    """The cross-entropy of a batch of winners: ((total, weight), metrics)."""
    return target_cross_entropy(shape, params, batch)


def measure(
    config: Config, policy: Model, prompts: PromptSet, judge: Judge
) -> dict[str, np.ndarray]:
    """[P, N] of N answers to each prompt: proxy, logprob and, with a verifier, gold and correct.

    They are drawn at temperature 1 from the whole distribution, the one whose best of n has a known
    bound of KL to the policy.
    """
    samples, blocks = config.best_of_n.samples, dict[str, list[np.ndarray]]()
    for answers, scores in _blocks(config, policy, prompts, judge, samples, config.seed, 1.0):
        columns = {"proxy": scores.total, "logprob": answers.behaviour_logprobs.sum(-1)}
        if verdicts := verdicts_of(answers.prompts.records, answers.texts):
            columns["gold"] = np.array([verdict.total for verdict in verdicts])
            columns["correct"] = np.array([float(verdict.right) for verdict in verdicts])
        for name, values in columns.items():
            blocks.setdefault(name, []).append(values.reshape(-1, samples))
    measured = {name: np.concatenate(parts) for name, parts in blocks.items()}
    whole = np.isfinite(measured["proxy"]).all(1)
    if not whole.all():
        console.say(
            "best of n",
            {"prompts": len(whole), "left out for a failed reward": int((~whole).sum())},
        )
    if not whole.any():
        raise UserError("the reward failed on an answer to every held-out prompt")
    return {name: values[whole] for name, values in measured.items()}


def curves(
    config: Config, name: str, measured: Mapping[str, np.ndarray]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Prints the curve of the best of n = 1, 2, 4, … samples; returns metrics, report entries.

    The KL of best-of-n is at most log n − (n−1)/n, and is stated as that bound.
    """
    proxy = measured["proxy"]
    ns = [1 << k for k in range(proxy.shape[1].bit_length()) if 1 << k <= proxy.shape[1]]
    shown = [key for key in ("proxy", "gold", "correct") if key in measured]
    series = {key: best_of_n_curve(proxy, measured[key], ns, config.seed) for key in shown}
    bounds = [float(kl_bound(n)) for n in ns]
    metrics: dict[str, float] = {}
    for i, n in enumerate(ns):
        means = {key: series[key]["mean"][i] for key in shown}
        values = ", ".join(f"{key} {mean:.3f}" for key, mean in means.items())
        print(f"best of {n}: {values}, KL ≤ {bounds[i]:.2f}")
        estimate = best_of_n(proxy, kl_terms(n, measured["logprob"]), n).mean()
        of_n = {"kl_bound": bounds[i], "kl_estimate": float(estimate)} | means
        metrics |= {f"eval/best_of_{n}/{key}": value for key, value in of_n.items()}
    judged = "gold" if "gold" in measured else "proxy"
    rivals = ns[:-1]  # one sample is the opponent
    wins = [float(best_of_n_win_rate(proxy, measured[judged], n).mean()) for n in rivals]
    metrics |= {f"eval/best_of_{n}/win_rate": win for n, win in zip(rivals, wins, strict=True)}
    frontier = {"kl": bounds, "bound": True, "proxy": series["proxy"]["mean"]}
    tables = []
    if "gold" in series:
        gold = frontier["gold"] = series["gold"]["mean"]
        peak = int(np.argmax(gold))
        metrics["eval/best_of_n/peak_n"] = float(ns[peak])
        metrics["eval/best_of_n/peak_gold"] = gold[peak]
        print(f"gold reward is highest at n = {ns[peak]}", flush=True)
        if len(ns) > 3:
            tables.append(_fit_table(bounds, gold))
    plots = [
        {
            "kind": "best_of_n",
            "title": "Reward of the best of n by the proxy",
            "n": ns,
            "series": series,
            "note": "95 % bands over prompts; KL to the reference ≤ log n − (n−1)/n.",
        },
        {
            "kind": "best_of_n",
            "title": f"Win rate of the best of n over one sample, by {judged} reward",
            "n": rivals,
            "series": {judged: {"mean": wins}},
            "bound": [float(win_bound(n)) for n in rivals],
            "note": "At most n/(n + 1).",
        },
        {
            "kind": "frontier",
            "title": "Gold and proxy reward against the bound of KL",
            "series": {name: frontier},
        },
    ]
    return metrics, {"frontier": frontier, "plots": plots, "tables": tables}


def _fit_table(bounds: Sequence[float], gold: Sequence[float]) -> dict[str, Any]:
    fits = fit_overoptimization(np.sqrt(bounds[1:]), np.array(gold[1:]) - gold[0])
    names = ("d(α − βd)", "d(α − β log d)")
    return {
        "title": "Gold reward gained, as a function of d = √KL (bound)",
        "columns": ["form", "α", "β", "R²", "residual"],
        "rows": [
            [name, fit.alpha, fit.beta, fit.r2, fit.residual_std]
            for name, fit in zip(names, fits.values(), strict=True)
        ],
    }


def winners(
    config: Config, policy: Model, prompts: PromptSet, judge: Judge
) -> tuple[Arrays, Arrays]:
    """Packed rows of the best of `best_of_n.n` answers to each training prompt: (train, held out).

    They are drawn as `rollout` says. Only answers that ended by themselves count and are trained
    on. One of every ten that follow each other is held out, which is a tenth of every source.
    """
    documents: list[Document] = []
    n = config.best_of_n.n
    seed = int(random_bits([1], config.seed)[0] >> np.uint64(33))  # not the one measured with
    for answers, scores in _blocks(config, policy, prompts, judge, n, seed):
        finished = answers.finished.reshape(-1, n)
        usable = finished & scores.valid.reshape(-1, n)
        totals = np.where(usable, scores.total.reshape(-1, n), -np.inf)
        for i, prompt in enumerate(answers.prompts.tokens):
            if usable[i].any():
                reply = answers.completions[i * n + int(totals[i].argmax())].tokens
                documents.append(Document([*prompt, *reply], [0] * len(prompt) + [1] * len(reply)))
    if len(documents) < 2:
        raise UserError(
            f"answers to only {len(documents)} of {len(prompts.records)} training prompts ended by "
            "themselves: nothing to train on; raise rollout.max_new_tokens"
        )
    dropped = len(prompts.records) - len(documents)
    console.say("winners", {"prompts": len(prompts.records), "without an answer": dropped})
    tens = np.array_split(np.arange(len(documents)), max(1, len(documents) // 10))
    drawn = random_bits(range(len(tens)), seed)
    held = {int(ten[int(bits) % len(ten)]) for ten, bits in zip(tens, drawn, strict=True)}
    parts: tuple[list[Document], list[Document]] = ([], [])
    for i, document in enumerate(documents):
        parts[i in held].append(document)
    train, held_out = (pack_documents(part, config.data.row_length)[0] for part in parts)
    return train, held_out


def _blocks(
    config: Config,
    policy: Model,
    prompts: PromptSet,
    judge: Judge,
    samples: int,
    seed: int,
    temperature: float | None = None,
) -> Iterator[tuple[Rollout, Scores]]:
    """(answers, scores) of one block of prompts after the other; see `sample_answers`."""
    multiple = rows_of(step_tokens(config), config.data.row_length)
    for start in range(0, len(prompts.records), BLOCK):
        ids = range(start, min(start + BLOCK, len(prompts.records)))
        answers = sample_answers(
            config, policy, prompts.take(ids),
            samples=samples, seed=seed, multiple=multiple, temperature=temperature, ids=ids,
        )  # fmt: skip
        yield answers, judge.score(answers)
