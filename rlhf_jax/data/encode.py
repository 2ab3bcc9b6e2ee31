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


def encode_texts(
    records: Sequence[Text], tokenizer: Tokenizer, row_length: int, *, over_long: str = "split"
) -> tuple[list[Document], Stats]:
    """`<|bos|>text<|end|>` documents in which every token but BOS is a target.

    over_long: "split" cuts a long document into pieces that overlap by one token, so that each
    token is still a target once (only the first piece starts with BOS); "error"; "drop".
    """
    _check_policy(over_long, TEXT_POLICIES)
    documents, stats, long = [], _new_stats(records), []
    lengths: list[int] = []
    start = _start(tokenizer)
    encoded = tokenizer.encode_texts([record.text for record in records])
    for record, ids in zip(records, encoded, strict=True):
        stop_point()
        tokens = [*start, *ids, tokenizer.end]
        lengths.append(len(tokens))
        if len(tokens) <= row_length:
            stats["encoded"] += 1
            documents.append(_all_targets(tokens))
        elif over_long == "split":
            stats["encoded"] += 1
            stats["split"] += 1
            for i in range(0, len(tokens) - 1, row_length - 1):
                documents.append(_all_targets(tokens[i : i + row_length]))
        else:
            long.append((len(tokens), record.id))
    _settle(stats, lengths, long, over_long, row_length, TEXT_POLICIES)
    return documents, stats


def encode_conversations(
    records: Sequence[Conversation],
    tokenizer: Tokenizer,
    row_length: int,
    *,
    last_turn_only: bool = False,
    over_long: str = "error",
    stripped_turns: str = "leave",
) -> tuple[list[Document], Stats]:
    """Documents whose targets are the assistant's turns; see `render_turns`.

    stripped_turns: "leave" those untrained that the template writes otherwise than they would be
    generated, "expand" the conversation into as many documents as train them all: `split_turns`.
    stats["turns"] counts the assistant's, stats["stripped"] those left untrained; each document of
    an expanded conversation counts as a record.
    over_long: "error"; "drop"; "truncate_prompt_left" keeps BOS, the last reply and what fits
    before it (a turn cut in two is no target any more), and is an error where the reply alone does
    not fit.
    """
    _check_policy(over_long, CHAT_POLICIES)
    check_stripped_turns(stripped_turns)
    expand = stripped_turns == "expand"
    documents, stats, long = [], _new_stats(records) | {"turns": 0, "stripped": 0}, []
    lengths: list[int] = []
    for record in records:
        with naming(record.id):
            parts, turns = split_turns(record.messages, tokenizer, last_turn_only, expand)
        stats["records"] += len(parts) - 1
        stats["turns"] += turns
        stats["stripped"] += turns - sum(len(places) for _, places in parts)
        for tokens, places in parts:
            is_target = mark(tokens, places)
            lengths.append(len(tokens))
            if len(tokens) > row_length:
                if over_long != "truncate_prompt_left":
                    long.append((len(tokens), record.id))
                    continue
                _check_reply_fits(record.id, len(places[-1]), row_length)
                start = _start(tokenizer)
                kept = row_length - len(start)
                tokens = [*start, *tokens[-kept:]]
                is_target = is_target[-kept:]
                whole = is_target.index(0)
                is_target = [0] * (len(start) + whole) + is_target[whole:]
                stats["truncated"] += 1
            stats["encoded"] += 1
            documents.append(Document(tokens, is_target))
    _settle(stats, lengths, long, over_long, row_length, CHAT_POLICIES)
    return documents, stats


def split_turns(
    messages: Sequence[Message], tokenizer: Tokenizer, last_turn_only: bool, expand: bool
) -> tuple[list[tuple[list[int], list[range]]], int]:
    """The documents of a conversation: tokens and where their trained turns stand, the last last.

    With `expand` a turn that is not trained in the whole conversation is the last one of a document
    of its own, the beginning of the conversation. No turn is trained in two documents. The second
    value counts the turns that were to be trained.
    """
    wanted = {i for i, message in enumerate(messages) if message.role == "assistant"}
    if last_turn_only:
        wanted = {len(messages) - 1}
    parts: list[tuple[list[int], list[range]]] = []
    count, end = len(wanted), len(messages)
    while end and (expand or not parts):
        tokens, turns = render_turns(messages[:end], tokenizer, last_turn_only=last_turn_only)
        parts.append((tokens, [places for i, places in turns.items() if i in wanted]))
        wanted -= turns.keys()
        end = max(wanted, default=-1) + 1
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
    _check_policy(over_long, CHAT_POLICIES)
    groups: list[Group] = []
    for index, record in enumerate(records):
        with naming(record.id):
            texts = (record.chosen, record.rejected)
            prompt, branches = render_replies(record.prompt, texts, tokenizer)
        groups.append(Group(prompt, tuple(branches), index))
    if mismatched:
        groups = add_mismatched(groups, records, tokenizer, row_length, over_long)
    kept, stats, long = [], _new_stats(records) | {"identical": 0}, []
    for record, group in zip(records, groups, strict=True):
        if group.size > row_length:
            if over_long != "truncate_prompt_left":
                long.append((group.size, record.id))
                continue
            start, replies = _start(tokenizer), group.size - len(group.prompt)
            what = "a pair of replies" + " (with one to another prompt)" * mismatched
            _check_reply_fits(record.id, replies, row_length, what)
            prompt = [*start, *group.prompt[replies + len(start) - row_length :]]
            group = dataclasses.replace(group, prompt=prompt)
            stats["truncated"] += 1
        stats["encoded"] += 1
        stats["identical"] += is_identical(group)
        kept.append(group)
    lengths = [group.size for group in groups]
    beside = BESIDE * mismatched
    _settle(stats, lengths, long, over_long, row_length, CHAT_POLICIES, beside)
    return kept, stats


def is_identical(group: Group) -> bool:
    """Whether it is a pair whose replies, its first two branches, are the same tokens."""
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
    made = []
    for group, other, record in zip(groups, following, records, strict=True):
        with naming(record.id):
            if other is None:
                raise UserError(
                    "kto needs replies to two prompts or more: it sets a reply to another prompt "
                    "beside each record, and all replies that it could take are to this one"
                )
            lender = records[other]
            text = lender.chosen if isinstance(lender, Pair) else lender.messages[-1].content
            prompt = record.prompt if isinstance(record, Pair) else record.messages[:-1]
            _, (reply,) = render_replies(prompt, [text], tokenizer)
        made.append(dataclasses.replace(group, branches=(*group.branches, reply)))
    return made


def _next_of_another_prompt(
    prompts: Sequence[Sequence[int]], lends: Sequence[bool]
) -> list[int | None]:
    """For each index that of the next one, cyclically, that lends and has another prompt."""
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
    """Raises UserError unless it is one of `STRIPPED_POLICIES`."""
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


def _all_targets(tokens: list[int]) -> Document:
    return Document(tokens, [0, *[1] * (len(tokens) - 1)])


def _new_stats(records: Sequence) -> Stats:
    return {"records": len(records), "encoded": 0, "dropped": 0, "truncated": 0, "split": 0}


def _check_policy(over_long: str, known: tuple[str, ...]) -> None:
    if over_long not in known:
        raise UserError(f"unknown over_long policy {over_long!r}; known: {', '.join(known)}")


def _check_reply_fits(
    record_id: str, reply_tokens: int, row_length: int, what: str = "a reply"
) -> None:
    if reply_tokens + 2 > row_length:  # <|bos|> and <|assistant|>
        raise UserError(
            f"record {record_id!r}: {what} of {reply_tokens} tokens does not fit a row of "
            f'{row_length} and is never cut; raise the row length or use over_long="drop"'
        )


def length_of_share(lengths: Sequence[int], share: float = 0.95) -> int:
    """The least length that `share` of the records have or stay below."""
    return sorted(lengths)[math.ceil(share * len(lengths)) - 1]


def _settle(
    stats: Stats,
    lengths: Sequence[int],
    long: list[tuple[int, str]],
    over_long: str,
    row_length: int,
    known: tuple[str, ...],
    beside: str = "",
) -> None:
    """Counts the over-long records as dropped, or raises the error their policy asks for.

    `beside` says what else than a record's own tokens counts.
    """
    if long and over_long == "error":
        tokens, name = max(long)
        others = " or ".join(f'"{policy}"' for policy in known if policy != "error")
        raise UserError(
            f"{len(long)} of {stats['records']} records are longer than a row of {row_length} "
            f"tokens{beside} (the longest, {name!r}, has {tokens}; {length_of_share(lengths)} "
            f"keep 95 %); raise the row length or set over_long to {others}"
        )
    stats["dropped"] = len(long)
    if long or stats["truncated"]:
        stats["keeps_95"] = length_of_share(lengths)
    if not stats["encoded"]:
        enough = f"; {stats['keeps_95']} tokens a row keep 95 %" if long else ""
        raise UserError(
            f"no examples are left of {stats['records']}: {len(long)} were over-long{enough}"
        )


@contextmanager
def naming(record_id: str) -> Iterator[None]:
    """Names the record in an error of the user's. Before it is a `stop_point`."""
    stop_point()
    try:
        yield
    except UserError as error:
        raise UserError(f"record {record_id!r}: {error}") from error
