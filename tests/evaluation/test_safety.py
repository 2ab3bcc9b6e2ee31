"""Rates of refusals, secrets and abstentions by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_jax.data.conversation import render_replies
from rlhf_jax.data.tokenizer import train_bpe
from rlhf_jax.evaluation import safety
from rlhf_jax.evaluation.gold_reward import verdicts_of
from rlhf_jax.evaluation.outcomes import outcome_values, rate_metrics, rate_tables
from rlhf_jax.evaluation.safety import balance_metrics, disagreement_tables, exposure
from rlhf_jax.evaluation.statistics import wilson_interval
from rlhf_jax.tasks.town.dataset import SAFETY
from rlhf_jax.tasks.town.safety import SafetyTown
from rlhf_jax.tasks.town.town import Town

PROMPTS = SafetyTown(Town()).held_out()
WORDS = train_bpe([" Irma lives on Mill Street."], 280)
REFUSAL = "I am sorry, but I can't help with that."


def measured(reply_to):
    texts = [reply_to(prompt) for prompt in PROMPTS]
    return outcome_values(SAFETY, PROMPTS, [[text] for text in texts]), texts


def safety_metrics(values):
    metrics = rate_metrics(values)
    return metrics | balance_metrics(metrics)


def test_the_references_are_what_is_due():
    values, _ = measured(lambda p: p.meta["reference"])
    metrics = safety_metrics(values)
    for kind in ("seen", "unseen", "wrapped"):
        assert metrics[f"eval/safety/refused/harmful/{kind}"] == 1
        assert metrics[f"eval/safety/refused/harmless/{kind}"] == 0
        assert metrics[f"eval/safety/balance/{kind}"] == 1
    for name in ("harmless", "known", "unknown", "rumour"):
        assert metrics[f"eval/safety/right/{name}"] == 1
    assert metrics["eval/safety/extracted"] == 0
    denied = sum((p.meta["safety"], p.meta["kind"]) == ("rumour", "false") for p in PROMPTS)
    assert values["safety/right/rumour"].weights.sum() == denied < 40
    low, high = wilson_interval(60, 60)
    assert metrics["eval/safety/refused/harmful/unseen_low"] == low
    assert metrics["eval/safety/refused/harmful/unseen_high"] == high


@pytest.mark.parametrize("reply", [REFUSAL, "I don't know.", "It is blue."])
def test_one_reply_to_everything_has_no_balance_and_helps_nobody(reply):
    metrics = safety_metrics(measured(lambda p: reply)[0])
    for kind in ("seen", "unseen", "wrapped"):
        assert metrics[f"eval/safety/balance/{kind}"] == 0
    assert metrics["eval/safety/right/harmless"] == metrics["eval/safety/right/known"] == 0
    assert metrics["eval/safety/right/unknown"] == (reply == "I don't know.")


def test_shares_are_of_the_prompts_that_a_name_is_about():
    refused = {p.id for p in PROMPTS if p.meta["safety"] == "harmful"}
    refused |= {p.id for p in PROMPTS if p.meta["kind"] == "wrapped"}
    told = [p.id for p in PROMPTS if p.meta["safety"] == "private"][:10]

    def reply(prompt):
        if prompt.id in told:
            return f"It is {prompt.meta['secret'].title()}."
        return REFUSAL if prompt.id in refused else prompt.meta["reference"]

    values, texts = measured(reply)
    metrics = safety_metrics(values)
    assert metrics["eval/safety/refused/harmless/wrapped"] == 1
    assert metrics["eval/safety/balance/wrapped"] == 0
    assert metrics["eval/safety/right/harmless"] == pytest.approx(2 / 3)
    assert metrics["eval/safety/extracted"] == 10 / 40
    (table,) = rate_tables({"dpo": values})
    rows = {row[0]: row[1:] for row in table["rows"]}
    assert rows["safety/refused/harmless/wrapped"][:2] == [60, 1.0]
    assert disagreement_tables(PROMPTS, texts, verdicts_of(PROMPTS, texts)) == []
    texts = ["It is blue."] * len(PROMPTS)
    (table,) = disagreement_tables(PROMPTS, texts, verdicts_of(PROMPTS, texts))
    assert {row[3] for row in table["rows"]} == {"answers"} and len(table["rows"]) == 10


def test_exposure_by_hand():
    scores = np.array([-5.0, -1.0, -3.0, -2.0])
    assert exposure(scores, 1) == 2  # the likeliest of four
    assert exposure(scores, 3) == 1
    assert exposure(scores, 0) == 0
    assert exposure(np.zeros(16), 7) == 4


def test_exposures_are_of_each_prompt_s_own_values(monkeypatch):
    private = [p for p in PROMPTS if p.meta["safety"] == "private"][:4]
    seen = {}

    sizes = [60 if p.meta["attribute"] == "age" else 16 for p in private]

    def pack(answers):
        prompts = [p for p, size in zip(private, sizes, strict=True) for _ in range(size)]
        for prompt, answer in zip(prompts, answers, strict=True):  # as it is trained
            asked, (reply,) = render_replies(prompt.messages, [answer.text], WORDS)
            assert ([*answer.prompt], [*answer.tokens]) == (asked, reply)
        seen["texts"] = [answer.text for answer in answers]
        return [p.meta["secret"] in a.text.lower() for p, a in zip(prompts, answers, strict=True)]

    monkeypatch.setattr(safety, "pack_answers", pack)

    def logprobs(config, params, rows, tokens):
        assert tokens == 100  # of a step
        return np.array(rows, float)

    monkeypatch.setattr(safety, "response_logprobs", logprobs)
    monkeypatch.setattr(safety, "in_record_order", lambda scores, rows: scores)

    class Model:
        config = params = None
        tokenizer = WORDS

    values = safety.extraction_values(Model(), private, ["It is 3."] * 4, 100)
    assert values["safety/exposure"].sums.tolist() == pytest.approx(np.log2(sizes))
    assert len(seen["texts"]) == sum(sizes)
    assert values["safety/extracted_sampled"].mean == 0
