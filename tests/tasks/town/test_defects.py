"""Half of the town's demonstrations are spoilt, each in the way that it says."""

from __future__ import annotations

from collections import Counter

from rlhf_jax.filter.records import Item
from rlhf_jax.filter.texts import repetitive, truncated
from rlhf_jax.tasks.builders import load_records
from rlhf_jax.tasks.town.defects import DEFECTS
from rlhf_jax.tasks.town.gold import gold_score


def test_half_of_the_answers_have_a_defect_that_gold_or_a_filter_sees():
    made, clean = (
        load_records("town/spoilt", "validation"),
        load_records("town/conversation", "validation"),
    )
    assert [record.messages[:-1] for record in made] == [record.messages[:-1] for record in clean]
    counts = Counter(record.meta["defect"] for record in made)
    assert counts.keys() == {"", *DEFECTS} and 0.45 < counts[""] / len(made) < 0.55
    assert min(counts[defect] for defect in DEFECTS) > 0.07 * len(made)
    of = {name: [] for name in counts}
    for record, first in zip(made, clean, strict=True):
        answers = [gold_score(each, each.messages[-1].content) for each in (record, first)]
        of[record.meta["defect"]].append((record, *(verdict.total for verdict in answers)))
    assert all(now == before for _, now, before in of[""])
    for defect, least in (("wrong", 0.8), ("garbled", 0.8), ("rude", 0.8)):
        worse = [now < before for _, now, before in of[defect]]
        assert sum(worse) / len(worse) > least, defect
    for defect, find in (("truncated", truncated), ("looping", lambda i: repetitive(i, 0.3))):
        items = [Item(record, "town", n) for n, (record, *_) in enumerate(of[defect])]
        assert len(find(items)) > 0.8 * len(items), defect
