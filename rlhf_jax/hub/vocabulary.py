"""The tokens of a tokenizer.json, and text in which no message can spell a control token."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import tokenizers

from rlhf_jax.errors import UserError

OPEN, CLOSE = "\ue0f0", "\ue0f1"  # stand around the number of a token that a message may not spell
ESCAPED = r"(?i)\\ue0f[01]"  # the same as JSON that is all ASCII writes them
_SPELLED = re.compile(f"{OPEN}([0-9]+){CLOSE}")
_NO_EOS = (
    "nothing names the token that ends a text: no eos_token in tokenizer_config.json or "
    "special_tokens_map.json, no eos_token_id in generation_config.json or config.json; "
    'write "eos_token" into tokenizer_config.json'
)
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


class Vocabulary:
    """The tokens of a tokenizer.json, among them those that its settings name.

    Attributes:
      content: the parsed file, with the named tokens among its added ones, as in transformers.
      whole: the library's tokenizer of it.
      ids: those of its tokens. size: one more than the highest of them.
      bos, eos: the tokens that begin and end a text; `bos` is None where none begins it.
      added: ids of the added tokens by text. special: those ids that the file calls special.
    """

    def __init__(self, text: str, bos: str | int | None, eos: str | int | None):
        """Reads the text of a tokenizer.json; `bos` and `eos` are tokens of it or their ids.

        Raises:
            UserError: it is no tokenizer, bos or eos no token of it, or there is no eos.
        """
        self.content = _parse(text)
        self.whole = _build(self.content)
        self.ids = frozenset(self.whole.get_vocab().values())
        self.size = 1 + max(self.ids, default=-1)
        if eos is None:
            raise UserError(_NO_EOS)
        self.bos = None if bos is None else self._find_token(bos, "bos_token_id")
        self.eos = self._find_token(eos, "eos_token_id")
        entries = self.content.get("added_tokens") or []
        named = {text: self.id_of(text) for text in (self.bos, self.eos) if text is not None}
        held = {entry["content"] for entry in entries}
        more = [
            {"id": number, "content": text, "special": True} | FLAGS
            for text, number in named.items()
            if text not in held
        ]
        if more:
            entries = [*entries, *more]
            self.content = self.content | {"added_tokens": entries}
            self.whole = _build(self.content)
        self.added = {entry["content"]: self.id_of(entry["content"]) for entry in entries}
        self.special = {self.added[e["content"]] for e in entries if e.get("special")}

    def id_of(self, text: str) -> int:
        """The id of a token; UserError where there is no such token."""
        number = self.whole.token_to_id(text)
        if number is None:
            raise UserError(f"the token {text!r} is not in the vocabulary")
        return int(number)

    def _find_token(self, token: str | int, field: str) -> str:
        text = self.whole.id_to_token(token) if isinstance(token, int) and token >= 0 else token
        if not isinstance(text, str):
            raise UserError(f"{field} {token} is no id of the tokenizer")
        return text


class Spelling:
    """Encodes text between a template's control tokens, which no message can spell.

    In a text that is to be rendered the names of such tokens are replaced by numbers (`hide`);
    rendered text then has them only where the template wrote them.

    Attributes:
      vocabulary: what is encoded with.
      control: the added tokens that come from the template only.
    """

    def __init__(self, vocabulary: Vocabulary, control: Iterable[str], named: Iterable[str]):
        """`named` are the other added tokens that the template names: no tool's text has these."""
        self.vocabulary, self.control = vocabulary, frozenset(control)
        markup = self.control | set(named)
        # The marks have no ids, but numbers too.
        marks = {OPEN: vocabulary.size, CLOSE: vocabulary.size + 1}
        self._number = vocabulary.added | marks
        self._text = {number: text for text, number in self._number.items()}
        self._names = _match_any(self.control)
        self._hidden = {
            False: _match_any([*self.control, *marks]),
            True: _match_any([*markup, *marks]),
        }
        self._markup = {vocabulary.added[text] for text in markup}
        # What stands for letters that the vocabulary lacks may come of any text.
        model = vocabulary.content["model"]
        unknown = {vocabulary.whole.token_to_id(model.get("unk_token") or ""), model.get("unk_id")}
        self._forbidden = {vocabulary.added[text] for text in self.control} - unknown

    def hide(self, text: str, *, of_tool: bool = False) -> str:
        """Text with the names that it may not spell replaced by numbers."""

        def numbered(match: re.Match[str]) -> str:
            return f"{OPEN}{self._number[match[0]]}{CLOSE}"

        return self._hidden[of_tool].sub(numbered, text)

    def hide_all(self, value: Any) -> Any:
        """`hide` of every text in a tool's JSON value."""
        if isinstance(value, str):
            return self.hide(value, of_tool=True)
        if isinstance(value, dict):
            return {self.hide_all(k): self.hide_all(v) for k, v in value.items()}
        return [self.hide_all(v) for v in value] if isinstance(value, list) else value

    def find_control(self, text: str, start: int = 0) -> Iterator[tuple[re.Match[str], int]]:
        """Where control tokens stand in rendered text from `start` on, and their ids."""
        for match in self._names.finditer(text, start):
            yield match, self.vocabulary.added[match[0]]

    def encode(self, text: str, *, first: bool = True) -> list[int]:
        """Ids of text with hidden names: the library's, but where it has one of these.

        first: whether the text stands at the beginning, where some tokenizers add a space.
        """
        encoding = _encode(self._rendered_encoders[first], text)
        all_ids, places = encoding.ids, encoding.offsets
        ids: list[int] = []
        at = done = 0  # how far: in `all_ids`, in `text`
        for i, (token, (start, stop)) in enumerate(zip(all_ids, places, strict=True)):
            if token in self._markup and self._text[token].strip() == text[start:stop].strip():
                ids += self._encode_between(
                    all_ids[at:i], text[done:start], first=first and not done
                )
                ids.append(token)
                at, done = i + 1, stop
        return ids + self._encode_between(all_ids[at:], text[done:], first=first and not done)

    def _encode_between(self, ids: list[int], text: str, *, first: bool) -> list[int]:
        """Ids of text between tokens of markup: `ids`, unless it spells one, if only nearly."""
        if OPEN in text or not self._forbidden.isdisjoint(ids):
            text = _SPELLED.sub(lambda match: self._text[int(match[1])], text)
            ids = _encode(self._text_encoders[first], text).ids
            if not self._forbidden.isdisjoint(ids):
                raise UserError(f"the text {text[:60]!a} would be encoded as a control token")
        return ids

    @cached_property
    def _rendered_encoders(self) -> dict[bool, tokenizers.Tokenizer]:
        """Encoders of rendered text, at the beginning (True) and later."""
        return _build_both(self.vocabulary.content, self.vocabulary.whole)

    @cached_property
    def _text_encoders(self) -> dict[bool, tokenizers.Tokenizer]:
        """Encoders of text that has no markup, whatever it spells, by the same keys."""
        content = self.vocabulary.content
        added = [
            entry | {"special": self.vocabulary.added[entry["content"]] in self._markup}
            for entry in content.get("added_tokens") or []
        ]
        content = content | {"added_tokens": added, "post_processor": None}
        encoders = _build_both(content, _build(content))
        for encoder in encoders.values():
            encoder.encode_special_tokens = True  # as text
        return encoders


def add_stated(text: str, entries: Mapping[str, Mapping[str, Any]], *, prevail: bool) -> str:
    """A tokenizer.json with the added tokens, by text, that only the files beside it have.

    Where these `prevail`, a token that both have is as they say, but for its id.

    Raises:
        UserError: it is no tokenizer, or a token would have another id than those say.
    """
    content = _parse(text)
    held = content.get("added_tokens") or []
    if not isinstance(held, list):
        raise UserError("tokenizer.json: added_tokens is no list")
    known = [entry.get("content") if isinstance(entry, dict) else None for entry in held]
    more = [entry for token, entry in entries.items() if token not in known]
    more.sort(key=lambda entry: entry["id"])
    shared = entries if prevail else {}
    stated = [
        {**shared[token], "id": entry.get("id")}
        if isinstance(token, str) and token in shared
        else entry
        for token, entry in zip(known, held, strict=True)
    ]
    if not more and stated == held:
        return text
    content |= {"added_tokens": [*stated, *more]}
    made = _build(content)
    for entry in more:
        number = made.token_to_id(entry["content"])
        if number != entry["id"]:
            raise UserError(
                f"the added token {entry['content']!r} has the id {entry['id']} in a file beside "
                f"tokenizer.json, and {number} in the vocabulary; save it with transformers again"
            )
    return json.dumps(content)


def drop_beyond(text: str, size: int, uses: Callable[[str], bool]) -> tuple[str, list[str]]:
    """A tokenizer.json for a model of `size` ids, and the added tokens that are left out of it.

    Those are special ones with higher ids that nothing `uses`: no message can spell them, so they
    never occur. Gemma 3's models without images come with one, the image's.

    Raises:
        UserError: it is no tokenizer.
    """
    content = _parse(text)
    dropped, rest = [], []
    for entry in content.get("added_tokens") or []:
        named = isinstance(entry, dict) and isinstance(entry.get("content"), str)
        beyond = named and isinstance(entry.get("id"), int) and entry["id"] >= size
        if beyond and entry.get("special") and not uses(entry["content"]):
            dropped.append(entry["content"])
        else:
            rest.append(entry)
    return json.dumps(content | {"added_tokens": rest}) if dropped else text, dropped


def _match_any(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of `texts`, the longest first."""
    longest = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)) or r"(?!)")


def _parse(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not a tokenizer.json: {str(error)[:200]}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError("not a tokenizer.json: it has no model")
    return content


def _build(content: Mapping[str, Any]) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"not a tokenizer.json: {str(error)[:200]}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _encode(encoder: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    try:
        return encoder.encode(text, add_special_tokens=False)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"the tokenizer cannot encode {text[:60]!a}: {error}") from error


def _build_both(
    content: Mapping[str, Any], first: tokenizers.Tokenizer
) -> dict[bool, tokenizers.Tokenizer]:
    """`first`, and for later pieces the same without a prefix that is for a text's first alone."""
    changed = copy.deepcopy({k: v for k, v in content.items() if k != "model"})
    if not _drop_first_prefix(changed):
        return {True: first, False: first}
    return {True: first, False: _build(changed | {"model": content["model"]})}


def _drop_first_prefix(node: Any) -> bool:
    """Changes every scheme "first" below a JSON node to "never"; whether there was one."""
    changed = isinstance(node, dict) and node.get("prepend_scheme") == "first"
    if changed:
        node["prepend_scheme"] = "never"
    below = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for value in below:
        changed |= _drop_first_prefix(value)
    return changed
