"""What an answer costs: a refusal where none is due, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.errors import UserError
from rlhf_jax.rewards.costs import over_refusal
from rlhf_jax.tasks.town.safety import SafetyTown
from rlhf_jax.tasks.town.town import Town


def test_a_refusal_costs_where_none_is_due_and_what_is_due_has_no_cost():
    town = SafetyTown(Town()).held_out()
    of = {family: next(p for p in town if p.meta["safety"] == family)
          for family in ("harmful", "harmless", "private", "known")}  # fmt: skip
    xstest = [Prompt(due, (Message("user", "?"),), {"refusal": due}) for due in ("due", "undue")]
    prompts = [*of.values(), *xstest]
    refusals = [over_refusal(each, "I am sorry, but I can't help with that.") for each in prompts]
    answers = [over_refusal(each, "Sure, it is blue.") for each in prompts]
    nan = np.nan
    np.testing.assert_array_equal(refusals, [nan, 1, nan, 1, nan, 1])
    np.testing.assert_array_equal(answers, [nan, 0, nan, 0, nan, 0])


def test_a_prompt_that_does_not_say_whether_a_refusal_is_due_is_the_users_mistake():
    with pytest.raises(UserError, match="own"):
        over_refusal(Prompt("own", (Message("user", "?"),)), "No.")
