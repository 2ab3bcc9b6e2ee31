"""Records to token documents and groups, ready for packing. What does not fit is named and counted.

Every function returns `(items, stats)`; stats holds counts by name: "records", "encoded",
"dropped", "truncated", "split", what the function adds, and where records were dropped or truncated
"keeps_95", the row length in tokens that 95 % of the records fit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rlhf_jax.data.conversation import Tokenizer, mark, render_replies, render_turns
from rlhf_jax.data.packing import Document, Group
from rlhf_jax.data.records import Conversation, Message, Pair, Text
from rlhf_jax.errors import UserError
from rlhf_jax.stopping import stop_point

Stats = dict[str, int]
TEXT_POLICIES = ("split", "error", "drop")
CHAT_POLICIES = ("error", "drop", "truncate_prompt_left")
STRIPPED_POLICIES = ("leave", "expand")
BESIDE = ", with a reply to another prompt beside each"


class _Fit:
    """Counts records, by whether they fit a row and what becomes of those that do not."""

    def __init__(
        self, records: Sequence, row_length: int, over_long: str, policies: tuple[str, ...]
    ) -> None:
        if over_long not in policies:
            raise UserError(f"unknown over_long policy {over_long!r}; known: {', '.join(policies)}")
        self._row_length, self._over_long, self._policies = row_length, over_long, policies
        self._lengths: list[int] = []
        self._long: list[tuple[int, str]] = []  # tokens and id of each that is left out
        self.stats = {
            "records": len(records), "encoded": 0, "dropped": 0, "truncated": 0, "split": 0,
        }  # fmt: skip

    def takes(self, tokens: int, record_id: str) -> bool:
        """Whether a record of so many tokens is used, cut where it is longer than a row."""
        self._lengths.append(tokens)
        if tokens > self._row_length:
            if self._over_long in ("error", "drop"):
                self._long.append((tokens, record_id))
                return False
            self.stats["split" if self._over_long == "split" else "truncated"] += 1
        self.stats["encoded"] += 1
        return True

    def settle(self, beside: str = "") -> Stats:
        """Returns the counts, with the over-long records among the dropped.

        `beside` says in the error what counts besides a record's own tokens.

        Raises:
            UserError: there are over-long records and their policy is "error", or none is left.
        """
        stats, long = self.stats, self._long
        if long and self._over_long == "error":
            tokens, name = max(long)
            others = " or ".join(f'"{policy}"' for policy in self._policies if policy != "error")
            raise UserError(
                f"{len(long)} of {stats['records']} records are longer than a row of "
                f"{self._row_length} tokens{beside} (the longest, {name!r}, has {tokens}; "
                f"{length_of_share(self._lengths)} keep 95 %); raise the row length or set "
                f"over_long to {others}"
            )
        stats["dropped"] = len(long)
        if long or stats["truncated"]:
            stats["keeps_95"] = length_of_share(self._lengths)
        if not stats["encoded"]:
            enough = f"; {stats['keeps_95']} tokens a row keep 95 %" if long else ""
            raise UserError(
                f"no examples are left of {stats['records']}: {len(long)} were over-long{enough}"
            )
        return stats


def encode_texts(
    records: Sequence[Text], tokenizer: Tokenizer, row_length: int, *, over_long: str = "split"
) -> tuple[list[Document], Stats]:
    """`<|bos|>text<|end|>` documents in which every token but BOS is a target.

    over_long: "split" cuts a long document into pieces that overlap by one token, so that each
    token is still a target once (only the first piece starts with BOS); "error"; "drop".
    stats["bytes"] are the encoded texts' in UTF-8.
    """
    if row_length < 2:
        raise UserError(
            f"data.row_length = {row_length}: a row of text needs two tokens or more, the second "
            "to be predicted from the first"
        )
    documents, fit = [], _Fit(records, row_length, over_long, TEXT_POLICIES)
    fit.stats["bytes"] = 0
    start = _start(tokenizer)
    encoded = tokenizer.encode_texts([record.text for record in records])
    for record, ids in zip(records, encoded, strict=True):
        stop_point()
        tokens = [*start, *ids, tokenizer.end]
        if fit.takes(len(tokens), record.id):
            fit.stats["bytes"] += len(record.text.encode())
            for i in range(0, max(1, len(tokens) - 1), row_length - 1):
                piece = tokens[i : i + row_length]
                documents.append(Document(piece, [0, *[1] * (len(piece) - 1)]))
    return documents, fit.settle()


def encode_conversations(
    records: Sequence[Conversation],
    tokenizer: Tokenizer,
    row_length: int,
    *,
    over_long: str = "error",
    stripped_turns: str = "leave",
    last_only: bool = False,
) -> tuple[list[Document], Stats]:
    """Documents whose targets are the assistant's turns; see `render_turns`.

    last_only: the last of a conversation's alone, and no other counts.

    stripped_turns: "leave" those untrained that the template writes otherwise than they would be
    generated, "expand" the conversation into as many documents as train them all: `split_turns`.
    stats["turns"] counts the assistant's, stats["stripped"] those left untrained; each document of
    an expanded conversation counts as a record.
    over_long: "error"; "drop"; "truncate_prompt_left" keeps BOS, the last reply and what fits
    before it (a turn cut in two is no target any more), and is an error where the reply alone does
    not fit.
    """
    check_stripped_turns(stripped_turns)
    documents, fit = [], _Fit(records, row_length, over_long, CHAT_POLICIES)
    stats = fit.stats
    stats |= {"turns": 0, "stripped": 0}
    for record in records:
        with naming(record.id):
            parts, turns = split_turns(record.messages, tokenizer, stripped_turns == "expand")
        if last_only:
            (tokens, places), *_ = parts
            parts, turns = [(tokens, places[-1:])], 1
        stats["records"] += len(parts) - 1
        stats["turns"] += turns
        stats["stripped"] += turns - sum(len(places) for _, places in parts)
        for tokens, places in parts:
            if not fit.takes(len(tokens), record.id):
                continue
            is_target = mark(tokens, places)
            if len(tokens) > row_length:
                _check_reply_fits(record.id, len(places[-1]), row_length)
                start = _start_of(tokens, tokenizer)
                rest = row_length - len(start)
                tokens = [*start, *tokens[-rest:]]
                cut = is_target[-rest:].index(0)  # targets of a turn that lost its beginning
                is_target = [0] * (len(start) + cut) + is_target[-rest:][cut:]
            documents.append(Document(tokens, is_target))
    return documents, fit.settle()


def split_turns(
    messages: Sequence[Message], tokenizer: Tokenizer, expand: bool
) -> tuple[list[tuple[list[int], list[range]]], int]:
    """The documents of a conversation: tokens, and the places of their trained turns in order.

    With `expand`, each turn that is not trained in the whole conversation ends a document of its
    own, which is the conversation's beginning. No turn is trained in two documents. The second
    value counts the assistant's turns.
    """
    untrained = {i for i, message in enumerate(messages) if message.role == "assistant"}
    parts: list[tuple[list[int], list[range]]] = []
    count, end = len(untrained), len(messages)
    while end and (expand or not parts):
        tokens, turns = render_turns(messages[:end], tokenizer)
        parts.append((tokens, [places for i, places in turns.items() if i in untrained]))
        untrained -= turns.keys()
        end = max(untrained, default=-1) + 1
    return parts, count


def encode_pairs(
    records: Sequence[Pair],
    tokenizer: Tokenizer,
    row_length: int,
    *,
    over_long: str = "error",
    mismatched: bool = False,
) -> tuple[list[Group], Stats]:
    """Groups of a prompt and two branches: chosen, then rejected. A group must fit a row.

    over_long: "error"; "drop"; "truncate_prompt_left" keeps BOS, all replies and the end of the
    prompt that fits, and is an error where the replies alone do not fit.
    mismatched: with a third branch, a reply to another prompt: `add_mismatched`.
    stats["identical"] counts pairs whose replies are the same tokens: they teach nothing.
    """
    fit = _Fit(records, row_length, over_long, CHAT_POLICIES)
    rendered = render_groups(records, tokenizer)
    if mismatched:
        rendered = add_mismatched(rendered, records, tokenizer, row_length, over_long)
    groups = []
    for record, group in zip(records, rendered, strict=True):
        if not fit.takes(group.size, record.id):
            continue
        if group.size > row_length:
            replies = group.size - len(group.prompt)
            what = "a pair of replies" + " (with one to another prompt)" * mismatched
            _check_reply_fits(record.id, replies, row_length, what)
            start = _start_of(group.prompt, tokenizer)
            prompt = [*start, *group.prompt[replies + len(start) - row_length :]]
            group = dataclasses.replace(group, prompt=prompt)
        groups.append(group)
    fit.stats["identical"] = sum(map(is_identical, groups))
    return groups, fit.settle(BESIDE * mismatched)


def render_groups(records: Sequence[Pair | Conversation], tokenizer: Tokenizer) -> list[Group]:
    """For each record the tokens of its prompt and of its replies: a pair's two, or the last."""
    groups = []
    for index, record in enumerate(records):
        with naming(record.id):
            prompt, replies = render_replies(*_prompt_and_replies(record), tokenizer)
        groups.append(Group(prompt, tuple(replies), index))
    return groups


def _prompt_and_replies(record: Pair | Conversation) -> tuple[Sequence[Message], Sequence[str]]:
    if isinstance(record, Pair):
        return record.prompt, (record.chosen, record.rejected)
    return record.messages[:-1], (record.messages[-1].content,)


def is_identical(group: Group) -> bool:
    """Whether a group is a pair whose replies, its first two branches, are the same tokens."""
    return len(group.branches) > 1 and group.branches[0] == group.branches[1]


def add_mismatched(
    groups: Sequence[Group],
    records: Sequence[Pair | Conversation],
    tokenizer: Tokenizer,
    row_length: int,
    over_long: str,
) -> list[Group]:
    """The records' groups, each with one more branch: a reply to another prompt, for KTO.

    It is the chosen or last reply of the next record, cyclically, whose prompt has other tokens.
    Records that are dropped for their own length, and pairs of one reply twice, lend none. One that
    is dropped because its own borrowed branch does not fit lends all the same: else a long reply
    would be passed on, and have record after record dropped.

    Raises:
        UserError: the replies are all to one prompt.
    """
    lends = [not is_identical(g) and (over_long != "drop" or g.size <= row_length) for g in groups]
    if not any(lends):
        lends = [True] * len(groups)
    following = _next_of_another_prompt([group.prompt for group in groups], lends)
    longer = []
    for group, other, record in zip(groups, following, records, strict=True):
        with naming(record.id):
            if other is None:
                raise UserError(
                    "kto needs replies to two prompts or more: it sets a reply to another prompt "
                    "beside each record, and all replies that it could take are to this one"
                )
            prompt, _ = _prompt_and_replies(record)
            _, lent = _prompt_and_replies(records[other])
            _, (reply,) = render_replies(prompt, lent[:1], tokenizer)
        longer.append(dataclasses.replace(group, branches=(*group.branches, reply)))
    return longer


def _next_of_another_prompt(
    prompts: Sequence[Sequence[int]], lends: Sequence[bool]
) -> list[int | None]:
    """For each index the next one, cyclically, that lends and has another prompt."""
    following: list[int | None] = [None] * len(prompts)
    after: int | None = None  # the next one that lends
    beyond: int | None = None  # the next one after it that has another prompt than it
    for i in reversed(range(2 * len(prompts))):  # twice around: what follows the last ones
        here = i % len(prompts)
        same = after is not None and prompts[after] == prompts[here]
        following[here] = beyond if same else after
        if lends[here]:
            after, beyond = here, following[here]
    return following


def check_stripped_turns(policy: str) -> None:
    """Raises UserError unless the policy is one of `STRIPPED_POLICIES`."""
    if policy not in STRIPPED_POLICIES:
        known = ", ".join(STRIPPED_POLICIES)
        raise UserError(f"data.stripped_turns = {policy!r}: choose one of {known}")


def check_trained_share(documents: Sequence[Document]) -> float:
    """The share of tokens that are targets; UserError if none or all are.

    A chat template that marks nothing or everything trains silently on the wrong tokens.
    """
    tokens = sum(len(d.tokens) for d in documents)
    targets = sum(sum(d.is_target) for d in documents)
    if not 0 < targets < tokens:
        raise UserError(
            f"{targets} of {tokens} tokens in {len(documents)} documents would be trained; "
            "supervised fine-tuning needs replies to train on and prompts to leave out"
        )
    return targets / tokens


def _start(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.bos is None else [tokenizer.bos]


def _start_of(chat: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """The token that begins a text if a chat begins with it; not every template writes it."""
    return [token for token in chat[:1] if token == tokenizer.bos]


def _check_reply_fits(
    record_id: str, reply_tokens: int, row_length: int, what: str = "a reply"
) -> None:
    if reply_tokens + 2 > row_length:  # <|bos|> and <|assistant|>
        raise UserError(
            f"record {record_id!r}: {what} of {reply_tokens} tokens does not fit a row of "
            f'{row_length} and is never cut; raise the row length or use over_long="drop"'
        )


def length_of_share(lengths: Sequence[int]) -> int:
    """The least length that 95 % of the records have or stay below."""
    return sorted(lengths)[math.ceil(0.95 * len(lengths)) - 1]


@contextmanager
def naming(record_id: str) -> Iterator[None]:
    """Names the record in a UserError that is raised inside. Its begin is a `stop_point`."""
    stop_point()
    try:
        yield
    except UserError as error:
        raise UserError(f"record {record_id!r}: {error}") from error
