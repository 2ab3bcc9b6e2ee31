"""The tokenizer and chat template that came with a Hugging Face model.

Control tokens come from the template only: what a message says is encoded as the text it is, so
"<|im_start|>" typed by a user is a few ordinary tokens. (The tokens a vocabulary adds that are not
special, "<think>" or "<tool_call>", are those tokens in an assistant's text too.) For texts that
hold no such thing ids are those of the tokenizers library for the whole conversation, except that a
reply never merges with the template's text before it: the tokens of a prompt, then those of its
reply, are the tokens of the conversation, always.

Tool calls and schemas go to the template, where no text in them becomes a token of the vocabulary's
added ones, special or not: "</tool_call>" in an argument is text.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from rlhf_jax.data.records import Message
from rlhf_jax.data.template import Template
from rlhf_jax.errors import UserError

FILE, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_NO_TEMPLATE = "the model has no chat template: name one, --config.data.chat_template=chatml"
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"  # stand around the number of a token that a message spells
_ESCAPED = r"\\ue0f[01]"  # the same as JSON that is all ASCII writes them
_SPELLED = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")


class _Added(NamedTuple):
    id: int
    text: str
    special: bool


class HubTokenizer:
    """An immutable tokenizer.json with its settings.

    Attributes:
      ids: of its tokens. vocab_size: the highest of them and 1.
      bos, end: ids of the token that begins a text, None where it has none, and of that which ends
        one. ends: ids that end a reply.
      hash: of all that decides ids.
    """

    def __init__(
        self,
        text: str,
        *,
        bos: str | None = None,
        eos: str | None = None,
        template: str | None = None,
        ends: Sequence[int] = (),
    ):
        """Raises UserError if `text` is no tokenizer, or bos or eos no token of it."""
        self._content = _parsed(text)
        whole = _built(self._content)
        self._whole = whole
        self.ids = frozenset(whole.get_vocab().values())
        self.vocab_size = 1 + max(self.ids, default=-1)
        self._added = _added_tokens(self._content)
        names = sorted((a.text for a in self._added), key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._by_text = {a.text: a for a in self._added}
        self._special = frozenset(a.id for a in self._added if a.special)
        bare = self._content | {"added_tokens": [], "post_processor": None}
        self._first, self._later = _built(bare), _built(_without_first_prefix(bare))
        self._bos_text, self._eos_text = bos, eos
        self.bos = None if bos is None else self._id(bos)
        if eos is None:
            raise UserError("the tokenizer names no eos_token, so nothing would end a text")
        self.end = self._id(eos)
        for each in ends:
            if each not in self.ids:
                raise UserError(f"eos_token_id {each} is no id of the tokenizer")
        probe = whole.encode("a").ids
        self._adds_bos = self.bos is not None and bool(probe) and probe[0] == self.bos
        self._template_text = template
        named = {"bos_token": bos or "", "eos_token": eos}
        self._template = None if template is None else Template(template, named)
        self.ends: tuple[int, ...] = tuple(dict.fromkeys([self.end, *ends]))
        document = [self._content, bos, eos, template, list(self.ends)]
        packed = json.dumps(document, sort_keys=True, separators=(",", ":"))
        self.hash = hashlib.sha256(packed.encode()).hexdigest()
        if self._template is not None:
            self._lead, self._around, self._last = self._reply_format()
            self.ends = tuple(dict.fromkeys([*self.ends, self._last]))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts as they stand at the beginning; never a special token."""
        return [self._encode(text, first=True) for text in texts]

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""
        return self._encode(text, first=True)

    def decode(self, ids: Iterable[int], *, control: bool = False) -> str:
        """Text of `ids`; special tokens are left out, or written by name if `control`."""
        ids = [int(i) for i in ids]
        if any(i < 0 for i in ids):
            raise ValueError("token ids are at least 0")
        return self._whole.decode(ids, skip_special_tokens=not control)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation that awaits a reply."""
        text = self._rendered(messages, add_generation_prompt=True)
        return self._with_bos(self._tokens(text))

    def reply(self, text: str) -> list[int]:
        """Tokens of an assistant's reply as they follow `prompt`, up to the token that ends it."""
        shown = self._disguised(Message("assistant", text))
        if self._template is None:
            raise UserError(_NO_TEMPLATE)
        before, after = self._around
        return [*self._continued(self._lead, before + shown + after), self._last]

    def conversation(
        self, messages: Sequence[Message], *, last_turn_only: bool = False
    ) -> tuple[list[int], list[int]]:
        """Tokens of a whole conversation and which of them are trained: see `chat`.

        Raises:
            UserError: what the template writes of a conversation does not begin with what it wrote
                of the prompt, or it never ends a turn.
        """
        whole = self._rendered(messages)
        tokens: list[int] = []
        is_target: list[int] = []
        done = 0
        turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
        for i in turns:
            prompt = self._rendered(messages[:i], add_generation_prompt=True)
            if not whole.startswith(prompt):
                raise self._broken(prompt, whole)
            end = self._find_end(whole, len(prompt), self.ends)
            before = self._tokens(whole[done : len(prompt)], first=not tokens)
            lead = prompt[self._last_control(prompt) :]
            reply = self._continued(lead, whole[len(prompt) : end.start()])
            reply.append(self._by_text[end[0]].id)
            trained = int(not last_turn_only or i == turns[-1])
            tokens += [*before, *reply]
            is_target += [0] * len(before) + [trained] * len(reply)
            done = end.end()
        count = len(tokens)
        tokens = self._with_bos(tokens)
        return tokens, [0] * (len(tokens) - count) + is_target

    @property
    def has_template(self) -> bool:
        """Whether it can render chats."""
        return self._template is not None

    def with_template(self, template: str) -> HubTokenizer:
        """The same tokenizer under another chat template.

        Raises:
            UserError: the template does not fit the vocabulary.
        """
        text = json.dumps(self._content)
        names = {"bos": self._bos_text, "eos": self._eos_text}
        return HubTokenizer(text, **names, template=template, ends=self.ends)

    def save(self, directory: str | Path) -> None:
        """Writes what `load` and transformers read into a directory that exists."""
        directory = Path(directory)
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self._bos_text,
            "eos_token": self._eos_text,
            "clean_up_tokenization_spaces": False,
        }
        (directory / FILE).write_text(json.dumps(self._content, ensure_ascii=False), "utf-8")
        if self._template_text is not None:
            (directory / TEMPLATE).write_text(self._template_text, "utf-8")
        (directory / SETTINGS).write_text(json.dumps(settings, indent=2), "utf-8")
        generation = {"eos_token_id": list(self.ends), "bos_token_id": self.bos}
        (directory / "generation_config.json").write_text(json.dumps(generation, indent=2))

    def export(self, directory: str | Path) -> None:
        """As `save`: that is what transformers reads."""
        self.save(directory)

    @property
    def pad(self) -> int:
        """What transformers pads batches with: some token has to be it."""
        return self.end

    @classmethod
    def load(cls, directory: str | Path) -> HubTokenizer:
        """Reads tokenizer.json, tokenizer_config.json and the chat template of a directory.

        Raises:
            UserError: naming the file that is missing or wrong.
        """
        directory = Path(directory)
        if not (directory / FILE).is_file():
            raise UserError(
                f"{directory} has no {FILE}: save the tokenizer as a fast one with transformers"
            )
        settings = _json_object(directory / SETTINGS)
        generation = _json_object(directory / "generation_config.json")
        config = _json_object(directory / "config.json")
        ends = generation.get("eos_token_id", config.get("eos_token_id"))
        listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if not all(isinstance(e, int) and not isinstance(e, bool) for e in listed):
            raise UserError(f"{directory}: eos_token_id = {ends!r} should be ids")
        try:
            return cls(
                (directory / FILE).read_text("utf-8"),
                bos=_token(settings, "bos_token"),
                eos=_token(settings, "eos_token"),
                template=_template(directory, settings),
                ends=listed,
            )
        except (OSError, UnicodeDecodeError, UserError) as error:
            raise UserError(f"{directory}: {error}") from error

    def _id(self, text: str) -> int:
        found = self._whole.token_to_id(text)
        if found is None:
            raise UserError(f"the token {text!r} is not in the vocabulary")
        return int(found)

    def _encode(self, text: str, *, first: bool) -> list[int]:
        """Ids of text that stands between control tokens, or at the beginning (`first`)."""
        if not text:
            return []
        try:
            encoder = self._first if first else self._later
            ids: list[int] = encoder.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"the tokenizer cannot encode {text[:60]!a}: {error}") from error
        if not self._special.isdisjoint(ids):
            raise UserError(f"the text {text[:60]!a} would be encoded as a control token")
        return ids

    def _disguised(self, message: Message) -> str:
        """The message's text with every token it spells, and may not be, replaced by a number."""
        return self._hidden(message.content, but_ordinary=message.role == "assistant")

    def _hidden(self, text: str, *, but_ordinary: bool = False) -> str:
        """Text with the added tokens it spells replaced; special ones only if `but_ordinary`."""
        if _OPEN in text or _CLOSE in text:
            raise UserError(f"a message holds {_OPEN!r} or {_CLOSE!r}, which are used internally")

        def hide(match: re.Match[str]) -> str:
            added = self._by_text[match[0]]
            if but_ordinary and not added.special:
                return match[0]
            return f"{_OPEN}{added.id}{_CLOSE}"

        return self._names.sub(hide, text)

    def _all_hidden(self, value: Any) -> Any:
        """`_hidden` of every text in a JSON value."""
        if isinstance(value, str):
            return self._hidden(value)
        if isinstance(value, dict):
            return {self._hidden(k): self._all_hidden(v) for k, v in value.items()}
        return [self._all_hidden(v) for v in value] if isinstance(value, list) else value

    def _rendered(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        if self._template is None:
            raise UserError(_NO_TEMPLATE)
        turns = [{"role": m.role, "content": self._disguised(m)} for m in messages]
        more = [self._all_hidden(json.loads(m.more)) if m.more else {} for m in messages]
        tools = more[0].pop("tools", None) if more else None
        render = partial(self._template.render, add_generation_prompt=add_generation_prompt)
        text = render([a | b for a, b in zip(turns, more, strict=True)], tools=tools)
        if tools and render([a | b for a, b in zip(turns, more, strict=True)]) == text:
            raise UserError("the chat template ignores tools; use a model whose template has them")
        for i, keys in enumerate(more):
            if "tool_calls" not in keys:
                continue
            less = [*more[:i], {}, *more[i + 1 :]]
            if render([a | b for a, b in zip(turns, less, strict=True)], tools=tools) == text:
                raise UserError(
                    "the chat template ignores tool_calls; use a model whose template has them"
                )
        if any(more) and re.search(f"(?i){_ESCAPED}", text):
            raise UserError(
                "the chat template escapes non-ASCII letters of tool calls, which hold a control "
                "token's name; take it out of them"
            )
        return text

    def _tokens(self, text: str, *, first: bool = True) -> list[int]:
        """Ids of rendered text: its control tokens, and the runs of text between them."""
        ids: list[int] = []
        done = 0
        for match in self._names.finditer(text):
            ids += self._run(text[done : match.start()], first=first and not done)
            ids.append(self._by_text[match[0]].id)
            done = match.end()
        return ids + self._run(text[done:], first=first and not done)

    def _run(self, text: str, *, first: bool) -> list[int]:
        by_id = {str(a.id): a.text for a in self._added}
        return self._encode(_SPELLED.sub(lambda m: by_id[m[1]], text), first=first)

    def _continued(self, lead: str, text: str) -> list[int]:
        """Ids of text that follows `lead`, whose ids stay what they are without it."""
        before = self._tokens(lead, first=False)
        both = self._tokens(lead + text, first=False)
        if both[: len(before)] == before:
            return both[len(before) :]
        return self._tokens(text, first=False)

    def _find_end(self, text: str, start: int, ids: Collection[int]) -> re.Match[str]:
        """The first token of `ids` from `start` on in rendered text."""
        for match in self._names.finditer(text, start):
            if self._by_text[match[0]].id in ids:
                return match
        raise UserError("the chat template writes no token that ends the assistant's turn")

    def _last_control(self, text: str) -> int:
        """Where the last control token of rendered text ends."""
        ends = [match.end() for match in self._names.finditer(text)]
        return ends[-1] if ends else 0

    def _with_bos(self, ids: list[int]) -> list[int]:
        if self.bos is None:
            return ids
        if self._adds_bos and ids[:1] != [self.bos]:
            ids = [self.bos, *ids]
        if ids[:2] == [self.bos, self.bos]:  # Llama 2 begins every exchange with one
            raise UserError("the chat template writes the token that begins a text twice")
        return ids

    def _reply_format(self) -> tuple[str, tuple[str, str], int]:
        """(a prompt's text after its last control token, what is around a reply, its last id)."""
        messages = [Message("user", "a"), Message("assistant", "b")]
        prompt = self._rendered(messages[:1], add_generation_prompt=True)
        whole = self._rendered(messages)
        if not whole.startswith(prompt):
            raise self._broken(prompt, whole)
        end = self._find_end(whole, len(prompt), self._special | {*self.ends})
        text = whole[len(prompt) : end.start()]
        if "b" not in text:
            raise UserError("the chat template writes no token that ends the assistant's turn")
        before, _, after = text.partition("b")
        lead = prompt[self._last_control(prompt) :]
        return lead, (before, after), self._by_text[end[0]].id

    def _broken(self, prompt: str, whole: str) -> UserError:
        """That a prompt and its reply are not what the template makes of both."""
        ours, theirs = self._tokens(prompt), self._tokens(whole)
        same = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
            min(len(ours), len(theirs)),
        )
        first, second = (self.decode(ids[same : same + 1], control=True) for ids in (ours, theirs))
        return UserError(
            "the chat template writes a conversation differently from its prompt: token "
            f"{same} is {second!r}, not {first!r}; what is trained would not be what is generated"
        )


def _parsed(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not a tokenizer.json: {str(error)[:200]}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError("not a tokenizer.json: it has no model")
    return content


def _built(content: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        made = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"not a tokenizer.json: {str(error)[:200]}") from error
    made.no_truncation()
    made.no_padding()
    return made


def _added_tokens(content: dict[str, Any]) -> list[_Added]:
    found = []
    for entry in content.get("added_tokens") or []:
        flags = [name for name in ("lstrip", "rstrip", "single_word") if entry.get(name)]
        if flags:
            raise UserError(
                f"the added token {entry['content']!r} with {flags[0]} is not supported"
            )
        found.append(_Added(entry["id"], entry["content"], bool(entry.get("special"))))
    return found


def _without_first_prefix(content: dict[str, Any]) -> dict[str, Any]:
    """The same where a prefix is put before the first piece of a text only: for later pieces."""
    changed = copy.deepcopy({k: v for k, v in content.items() if k != "model"})

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if node.get("prepend_scheme") == "first":
                node["prepend_scheme"] = "never"
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(changed)
    return changed | {"model": content["model"]}


def _json_object(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty where there is no file."""
    if not path.exists():
        return {}
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {str(error)[:200]}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path} is no JSON object")
    return document


def _token(settings: dict[str, Any], name: str) -> str | None:
    value = settings.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise UserError(f"{SETTINGS}: {name} = {str(value)[:60]!r} is no token")
    return value


def _template(directory: Path, settings: dict[str, Any]) -> str | None:
    """chat_template.jinja, or the one in tokenizer_config.json, the "default" of several."""
    if (directory / TEMPLATE).is_file():
        return (directory / TEMPLATE).read_text("utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise UserError(f"{SETTINGS}: chat_template is no text")
    return found
