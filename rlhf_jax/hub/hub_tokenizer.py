"""The tokenizer and chat template that came with a Hugging Face model.

Control tokens come from the template only: what a message says is encoded as the text it is, so
"<|im_start|>" typed by a user is a few ordinary tokens. Control tokens are a vocabulary's special
ones, those that begin and end texts, and those of its other added ones with which the template
parts turns, as DeepSeek's "<｜User｜>". Any message may spell the rest: runs of spaces, "<think>".
Where a text spells no control token its ids are those of the tokenizers library for the whole
conversation, except that a reply never merges with the template's text before it: the tokens of a
prompt, then those of its reply, are the tokens of the conversation, always.

Tool calls, schemas and results go to the template, where no text in them becomes a token that the
template names, control or not: "</tool_call>" in an argument is text.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from rlhf_jax.data.records import Message
from rlhf_jax.data.template import Template
from rlhf_jax.errors import UserError
from rlhf_jax.hub.chat_formats import WITH_TOOLS

FILE, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_SPECIAL_MAP, _GENERATION, _CONFIG = (
    f"{name}.json" for name in ("special_tokens_map", "generation_config", "config")
)
# Settings that are written anew, or say where and how files were loaded.
_ANEW = (
    *("chat_template", "auto_map", "name_or_path", "tokenizer_file", "special_tokens_map_file"),
    *("is_local", "local_files_only"),
)
# Whose classes in transformers have a bos_token though no file names it, as "<|endoftext|>". Other
# models begin no text then, whatever id their config.json gives: Qwen's gives one.
_BOS_BY_CLASS = ("gpt2", "gpt_neox", "gptneox", "gemma")
_NO_EOS = (
    f"nothing names the token that ends a text: no eos_token in {SETTINGS} or {_SPECIAL_MAP}, no "
    f'eos_token_id in {_GENERATION} or {_CONFIG}; write "eos_token" into {SETTINGS}'
)
_WITH_TOOLS = (
    f"templates that take tools: --config.data.chat_template={' or '.join(WITH_TOOLS)}, where "
    "their control tokens are in the vocabulary, or a .jinja file"
)
_NO_TEMPLATE = "the model has no chat template: name one, --config.data.chat_template=chatml"
_ANOTHER = "to use another: --config.data.chat_template=chatml, or a *.jinja file"
_NO_END = f"the chat template writes no token that ends the assistant's turn; {_ANOTHER}"
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"  # stand around the number of what a message may not spell
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
        one.
      pad: id of the token that fills batches, None where none is named.
    """

    def __init__(
        self,
        text: str,
        *,
        bos: str | int | None = None,
        eos: str | int | None,
        template: str | None = None,
        ends: Sequence[int] = (),
        came: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        """Made of the text of a tokenizer.json.

        Args:
          bos, eos: tokens or their ids.
          came: {file: what it said} of tokenizer_config.json, generation_config.json and
            config.json, of which `save` and `export` write again what says nothing of ids.

        Raises:
            UserError: `text` is no tokenizer, or bos or eos no token of it.
        """
        self._came = dict(came or {})
        content = _parsed(text)
        self._whole = _built(content)
        self.ids = frozenset(self._whole.get_vocab().values())
        self.vocab_size = 1 + max(self.ids, default=-1)
        if eos is None:
            raise UserError(_NO_EOS)
        bos = None if bos is None else self._named(bos, "bos_token_id")
        eos = self._named(eos, "eos_token_id")
        self._bos_text, self._eos_text = bos, eos
        self.bos = None if bos is None else self._id(bos)
        self.end = self._id(eos)
        self._content = _with_added(content, {bos: self.bos, eos: self.end})
        if self._content is not content:
            self._whole = _built(self._content)
        whole = self._whole
        self._pad_text = self._named_pad()
        self.pad = None if self._pad_text is None else whole.token_to_id(self._pad_text)
        self._added = [
            _Added(self._id(entry["content"]), entry["content"], bool(entry.get("special")))
            for entry in self._content.get("added_tokens") or []
        ]
        self._by_text = {a.text: a for a in self._added}
        marks = {_OPEN: self.vocab_size, _CLOSE: self.vocab_size + 1}  # no ids, but numbers too
        self._number = {a.text: a.id for a in self._added} | marks
        self._by_id = {number: text for text, number in self._number.items()}
        for each in ends:
            if each not in self.ids:
                raise UserError(f"eos_token_id {each} is no id of the tokenizer")
        probe = whole.encode("a").ids
        self._adds_bos = self.bos is not None and bool(probe) and probe[0] == self.bos
        self._template_text = template
        named = {"bos_token": bos or "", "eos_token": eos}
        self._template = None if template is None else Template(template, named)
        self._given_ends = tuple(dict.fromkeys([self.end, *ends]))

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Ids that end a reply: those given, and the one that the template writes, if it works."""
        try:
            return tuple(dict.fromkeys([*self._given_ends, self._template_end()]))
        except UserError:
            return self._given_ends

    @cached_property
    def marks(self) -> tuple[str, ...]:
        """With what the template parts turns: control tokens, or else the words between two."""
        asked, answer = (f"{_OPEN}{self._number[mark]}{_CLOSE}" for mark in (_OPEN, _CLOSE))
        whole = self._rendered([Message("user", _OPEN), Message("assistant", _CLOSE)])
        between = whole.partition(asked)[2].partition(answer)[0].strip()
        marks = {match[0] for match in self._names.finditer(whole)}
        return tuple(sorted(marks if self._names.search(between) else marks | {between}))

    @cached_property
    def hash(self) -> str:
        """Of all that decides ids."""
        document = [self._content, self._bos_text, self._eos_text, self._template_text]
        packed = json.dumps([*document, list(self.ends)], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(packed.encode()).hexdigest()

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts as they stand at the beginning; never a special token."""
        return [self.encode(text) for text in texts]

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""
        return self._tokens(self._hidden(text))

    def decode(self, ids: Iterable[int], *, control: bool = False) -> str:
        """Text of `ids`; special tokens are left out, or written by name if `control`."""
        ids = [int(i) for i in ids]
        if any(i < 0 for i in ids):
            raise ValueError("token ids are at least 0")
        return self._whole.decode(ids, skip_special_tokens=not control)

    def decode_text(self, ids: Sequence[int]) -> str:
        """The text of a turn or document; special tokens are left out."""
        return self.decode(ids)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation that awaits a reply."""
        prompts, (text,) = self._renderings(messages, [(range(len(messages)), True)])
        return self._laid(text, prompts)[0]

    def replies(
        self, messages: Sequence[Message], texts: Sequence[str]
    ) -> tuple[list[int], list[list[int]]]:
        """The tokens of `prompt`, and of each text as the reply to it, up to what ends the reply.

        Raises:
            UserError: as `conversation`.
        """
        size = len(messages)
        answers = [([*range(size), size + i], False) for i in range(len(texts))]
        pool = [*messages, *(Message("assistant", text) for text in texts)]
        prompts, (prompt, *wholes) = self._renderings(pool, [(range(size), True), *answers], size)
        made = []
        for whole in wholes:
            if not whole.startswith(prompt):
                raise self._broken(prompt, whole)
            made.append(self._ended(self._continued(prompt, whole[len(prompt) :])))
        return self._laid(prompt, prompts)[0], made

    def conversation(self, messages: Sequence[Message]) -> tuple[list[int], dict[int, range]]:
        """Tokens of a whole conversation and where turns stand in them: see `render_turns`.

        Raises:
            UserError: what the template writes of a conversation does not begin with what it wrote
                of the prompt, or it never ends the last turn.
        """
        replies = [i for i, message in enumerate(messages) if message.role == "assistant"]
        prompts, texts = self._renderings(messages, [(range(i + 1), False) for i in replies])
        whole, alone = texts[-1], dict(zip(replies, texts, strict=True))
        tokens, begins = self._laid(whole, prompts)
        last = len(messages) - 1
        if last not in begins:
            raise self._broken(prompts[last], whole)
        turns = {}
        for i in replies:
            end = self._find_end(alone[i], len(prompts[i]), self.ends)
            # Templates drop the thoughts of earlier replies, or end the last one only.
            if i == last or (i in begins and end and whole.startswith(alone[i][: end.end()])):
                turns[i] = range(begins[i], begins[i] + len(self._ended(tokens[begins[i] :])))
        return tokens[: turns[last].stop], turns

    @property
    def has_template(self) -> bool:
        """Whether it can render chats: it has a template, and that works."""
        try:
            self._template_end()
        except UserError:
            return False
        return True

    def with_template(self, template: str) -> HubTokenizer:
        """The same tokenizer under another chat template.

        Raises:
            UserError: the template does not fit the vocabulary.
        """
        made = HubTokenizer(
            json.dumps(self._content),
            bos=self._bos_text,
            eos=self._eos_text,
            template=template,
            ends=self._given_ends,
            came=self._came,
        )
        made._template_end()
        return made

    def save(self, run: Path) -> None:
        """Writes what `load` reads into `tokenizer` in a run directory."""
        directory = run / "tokenizer"
        directory.mkdir(exist_ok=True)
        self.export(directory)
        (directory / _CONFIG).write_text(json.dumps(self.special_ids, indent=2), "utf-8")

    def export(self, directory: str | Path) -> None:
        """Writes what transformers reads, all but config.json: settings as they came."""
        directory = Path(directory)
        settings: dict[str, Any] = {
            "clean_up_tokenization_spaces": False,
            # Without it transformers 4 gives models token_type_ids, which they refuse.
            "model_input_names": ["input_ids", "attention_mask"],
        }
        settings |= {k: v for k, v in self._came.get(SETTINGS, {}).items() if k not in _ANEW}
        settings |= {
            # One that reads tokenizer.json as it is: others make parts of it anew.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self._bos_text,
            "eos_token": self._eos_text,
        }
        if self._pad_text is not None:
            settings["pad_token"] = self._pad_text
        if isinstance(settings.get("extra_special_tokens"), list):  # read by transformers 5 only
            settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
        (directory / FILE).write_text(json.dumps(self._content, ensure_ascii=False), "utf-8")
        if self._template_text is not None:
            (directory / TEMPLATE).write_text(self._template_text, "utf-8")
        (directory / SETTINGS).write_text(json.dumps(settings, indent=2), "utf-8")
        given = self._came.get(_GENERATION)
        generation = self.special_ids if given is None else dict(given)
        generation["eos_token_id"] = self._ends_as(generation.get("eos_token_id"))
        (directory / _GENERATION).write_text(json.dumps(generation, indent=2), "utf-8")

    @property
    def special_ids(self) -> dict[str, Any]:
        """bos_token_id, eos_token_id and pad_token_id for a config.json."""
        given = self._came.get(_CONFIG, {})
        pad = given.get("pad_token_id")
        return {
            "bos_token_id": given.get("bos_token_id", self.bos),
            "eos_token_id": self._ends_as(given.get("eos_token_id")),
            "pad_token_id": self.pad if pad is None else pad,
        }

    def _ends_as(self, given: Any) -> Any:
        """`ends` as an eos_token_id: in the form that came if it has them all."""
        listed = given if isinstance(given, list) else [given]
        same = all(isinstance(e, int) for e in listed) and set(listed) == set(self.ends)
        return given if same else list(self.ends)

    def _named_pad(self) -> str | None:
        """The pad token by the tokenizer's settings, or by the id in one of the configs."""
        if (text := _token(self._came.get(SETTINGS, {}), "pad_token")) is not None:
            return text
        for name in (_CONFIG, _GENERATION):
            number = self._came.get(name, {}).get("pad_token_id")
            if isinstance(number, int) and 0 <= number < self.vocab_size:
                return self._whole.id_to_token(number)
        return None

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
        config = _json_object(directory / _CONFIG)
        generation = _json_object(directory / _GENERATION)
        ids = config | generation
        ends = _ids(directory, ids, "eos_token_id")
        names = settings
        if "added_tokens_decoder" not in settings:  # with it, transformers reads no other file
            names = settings | _json_object(directory / _SPECIAL_MAP)
        bos: str | int | None = _token(names, "bos_token")
        eos: str | int | None = _token(names, "eos_token")
        if eos is None and ends:
            eos = ends[0]
        kind = str(settings.get("tokenizer_class") or config.get("model_type")).lower()
        if "bos_token" not in names and kind.startswith(_BOS_BY_CLASS):
            bos = next(iter(_ids(directory, ids, "bos_token_id")), None)
        try:
            return cls(
                (directory / FILE).read_text("utf-8"),
                bos=bos,
                eos=eos,
                template=_template(directory, settings),
                ends=ends,
                came=_came(names, generation, config),
            )
        except (OSError, UnicodeDecodeError, UserError) as error:
            raise UserError(f"{directory}: {error}") from error

    def _id(self, text: str) -> int:
        found = self._whole.token_to_id(text)
        if found is None:
            raise UserError(f"the token {text!r} is not in the vocabulary")
        return int(found)

    def _named(self, token: str | int, field: str) -> str:
        found = self._whole.id_to_token(token) if isinstance(token, int) and token >= 0 else token
        if not isinstance(found, str):
            raise UserError(f"{field} {token} is no id of the tokenizer")
        return found

    @cached_property
    def _control(self) -> frozenset[int]:
        """Ids of the added tokens that come from the template only."""
        always = {self.bos, *self._given_ends, *(a.id for a in self._added if a.special)}
        control = {a.text for a in self._added if a.id in always}
        if self._template is not None:
            control |= _parting(self._by_text.keys() - control, control, self._template)
        return frozenset(self._by_text[text].id for text in control)

    @cached_property
    def _forbidden(self) -> frozenset[int]:
        """Those that no text may give: not what stands for letters the vocabulary lacks."""
        model = self._content["model"]
        unknown = self._whole.token_to_id(model.get("unk_token") or "")
        return self._control - {unknown, model.get("unk_id")}

    @cached_property
    def _markup(self) -> frozenset[int]:
        """Control tokens, and the ids of the other added ones that the template names."""
        source = "" if self._template is None else self._template.source
        marks = {self._by_text[text].id for text in _marks(self._by_text) if text in source}
        return self._control | marks

    @cached_property
    def _names(self) -> re.Pattern[str]:
        """Finds control tokens in rendered text."""
        return _any_of(self._by_id[each] for each in self._control)

    @cached_property
    def _hidden_names(self) -> dict[bool, re.Pattern[str]]:
        """What is hidden in a message's text, and (True) in a tool's."""
        kinds = {False: self._control, True: self._markup}
        return {
            of_tool: _any_of([*(self._by_id[each] for each in ids), _OPEN, _CLOSE])
            for of_tool, ids in kinds.items()
        }

    @cached_property
    def _rendered_encoders(self) -> dict[bool, tokenizers.Tokenizer]:
        """Encode rendered text: later than the beginning (False) and from the beginning (True)."""
        later = _without_first_prefix(self._content)
        return {True: self._whole, False: _built(later) if later else self._whole}

    @cached_property
    def _text_encoders(self) -> dict[bool, tokenizers.Tokenizer]:
        """The same for text that has none of `_markup`, whatever it spells."""
        added = [
            entry | {"special": self._by_text[entry["content"]].id in self._markup}
            for entry in self._content.get("added_tokens") or []
        ]
        content = self._content | {"added_tokens": added, "post_processor": None}
        later = _without_first_prefix(content)
        first = _built(content)
        made = {True: first, False: _built(later) if later else first}
        for each in made.values():
            each.encode_special_tokens = True  # as text
        return made

    def _hidden(self, text: str, *, of_tool: bool = False) -> str:
        """Text with what it spells, and may not, replaced by numbers."""

        def hide(match: re.Match[str]) -> str:
            return f"{_OPEN}{self._number[match[0]]}{_CLOSE}"

        return self._hidden_names[of_tool].sub(hide, text)

    def _all_hidden(self, value: Any) -> Any:
        """`_hidden` of every text in a JSON value."""
        if isinstance(value, str):
            return self._hidden(value, of_tool=True)
        if isinstance(value, dict):
            return {self._all_hidden(k): self._all_hidden(v) for k, v in value.items()}
        return [self._all_hidden(v) for v in value] if isinstance(value, list) else value

    def _rendered(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        return self._rendered_all(messages, [(range(len(messages)), add_generation_prompt)])[0]

    def _rendered_all(
        self, messages: Sequence[Message], wanted: Sequence[tuple[Sequence[int], bool]]
    ) -> list[str]:
        """Texts of conversations, each made of (places of its messages, add_generation_prompt)."""
        if self._template is None:
            raise UserError(_NO_TEMPLATE)
        more = [self._all_hidden(json.loads(m.more)) if m.more else {} for m in messages]
        tools = more[0].pop("tools", None) if more else None
        turns = [
            {"role": m.role, "content": self._hidden(m.content, of_tool=m.role == "tool")} | keys
            for m, keys in zip(messages, more, strict=True)
        ]
        with_tools = tools or any(_of_tools(turn) for turn in turns)
        try:
            texts = self._template.render_all(turns, wanted, tools=tools)
        except UserError as error:
            raise UserError(f"{error}; {_WITH_TOOLS if with_tools else _ANOTHER}") from error
        if with_tools or any(more):  # the longest has them all
            longest = max(range(len(wanted)), key=lambda k: len(wanted[k][0]))
            places, opened = wanted[longest]
            self._check_tools([turns[i] for i in places], tools, opened, texts[longest])
        return texts

    def _check_tools(
        self, turns: list[dict[str, Any]], tools: Any, opened: bool, text: str
    ) -> None:
        """Raises UserError if `text`, what the template made of turns, lacks what they hold."""
        assert self._template is not None
        render = partial(self._template.render, add_generation_prompt=opened)
        for what, fewer, fewer_tools in _without_each(turns, tools):
            try:
                ignored = render(fewer, tools=fewer_tools) == text
            except UserError:  # it asks for what was taken out
                continue
            if ignored:
                raise UserError(f"the chat template ignores {what}; {_WITH_TOOLS}")
        if re.search(f"(?i){_ESCAPED}", text):
            raise UserError(
                "the chat template escapes non-ASCII letters of tool calls, which hold a control "
                "token's name; take it out of them"
            )

    def _tokens(self, text: str, *, first: bool = True) -> list[int]:
        """Ids of text with hidden names: the library's, but where it has one of these."""
        encoding = _encoding(self._rendered_encoders[first], text)
        all_ids, places = encoding.ids, encoding.offsets
        ids: list[int] = []
        at = done = 0  # how far: in `all_ids`, in `text`
        for i, (token, (start, stop)) in enumerate(zip(all_ids, places, strict=True)):
            if token in self._markup and self._by_id[token].strip() == text[start:stop].strip():
                ids += self._between(all_ids[at:i], text[done:start], first=first and not done)
                ids.append(token)
                at, done = i + 1, stop
        return ids + self._between(all_ids[at:], text[done:], first=first and not done)

    def _between(self, ids: list[int], text: str, *, first: bool) -> list[int]:
        """Ids of text between tokens of `_markup`: `ids`, unless it spells one, if only nearly."""
        if _OPEN in text or not self._forbidden.isdisjoint(ids):
            text = _SPELLED.sub(lambda m: self._by_id[int(m[1])], text)
            ids = _encoding(self._text_encoders[first], text).ids
            if not self._forbidden.isdisjoint(ids):
                raise UserError(f"the text {text[:60]!a} would be encoded as a control token")
        return ids

    def _renderings(
        self,
        messages: Sequence[Message],
        wanted: Sequence[tuple[Sequence[int], bool]],
        size: int | None = None,
    ) -> tuple[dict[int, str], list[str]]:
        """What `wanted` asks for: texts of some of the messages, awaiting a reply or not.

        Before these the prompt of every reply among the first `size` messages, by its index.
        """
        turns = [i for i, m in enumerate(messages[:size]) if m.role == "assistant"]
        both = [*((range(i), True) for i in turns), *wanted]
        texts = self._rendered_all(messages, both)
        return dict(zip(turns, texts, strict=False)), texts[len(turns) :]

    def _laid(self, text: str, prompts: Mapping[int, str]) -> tuple[list[int], dict[int, int]]:
        """Tokens of rendered text in which no reply merges with its prompt, and their begins.

        `prompts` are those of the replies in it, by their messages' indices. What does not begin
        with one, since the template writes it otherwise once the conversation goes on, is left out.
        """
        places: dict[int, int] = {}
        for i, prompt in prompts.items():
            if text.startswith(prompt) and len(prompt) >= max(places.values(), default=0):
                places[i] = len(prompt)
        bounds = [*places.values(), len(text)]
        tokens = self._with_bos(self._tokens(text[: bounds[0]]))
        begins = {}
        for (i, begin), end in zip(places.items(), bounds[1:], strict=True):
            begins[i] = len(tokens)
            tokens += self._continued(text[:begin], text[begin:end])
        return tokens, begins

    def _continued(self, prompt: str, text: str) -> list[int]:
        """Ids of rendered text that follows a prompt, whose ids stay what they are without it."""
        lead = prompt[self._last_control(prompt) :]
        before = self._tokens(lead, first=False)
        both = self._tokens(lead + text, first=False)
        if both[: len(before)] == before:
            return both[len(before) :]
        return self._tokens(text, first=False)

    def _ended(self, ids: list[int]) -> list[int]:
        """Of ids that begin with a reply those up to its end."""
        ends = self._control.intersection(self.ends)
        for place, token in enumerate(ids):
            if token in ends:
                return ids[: place + 1]
        raise UserError(_NO_END)

    def _find_end(self, text: str, start: int, ids: Collection[int]) -> re.Match[str] | None:
        """The first control token of `ids` from `start` on in rendered text."""
        found = self._names.finditer(text, start)
        return next((match for match in found if self._by_text[match[0]].id in ids), None)

    def _template_end(self) -> int:
        """Id of the token that the template writes after a reply.

        Raises:
            UserError: there is none, or there is no template or one that fails.
        """
        whole = self._rendered([Message("user", "a"), Message("assistant", _CLOSE)])
        end = self._find_end(whole, whole.rfind(_CLOSE), self._control)
        if end is None or _CLOSE not in whole:
            raise UserError(_NO_END)
        return self._by_text[end[0]].id

    def _last_control(self, text: str) -> int:
        """Where the last control token of rendered text stands."""
        starts = [match.start() for match in self._names.finditer(text)]
        return starts[-1] if starts else 0

    def _with_bos(self, ids: list[int]) -> list[int]:
        if self.bos is None:
            return ids
        if self._adds_bos and ids[:1] != [self.bos]:
            ids = [self.bos, *ids]
        if ids[:2] == [self.bos, self.bos]:  # Llama 2 begins every exchange with one
            raise UserError("the chat template writes the token that begins a text twice")
        return ids

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
            f"{same} is {second!r}, not {first!r}; what is trained would not be what is generated; "
            f"{_ANOTHER}"
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


def _with_added(content: dict[str, Any], named: Mapping[str | None, int | None]) -> dict[str, Any]:
    """`content` with the tokens that its settings name among its added ones, as transformers does.

    Args:
      named: token → id.
    """
    added = content.get("added_tokens") or []
    held = {entry["content"] for entry in added}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    more = [
        {"id": number, "content": text, "special": True} | flags
        for text, number in named.items()
        if text is not None and text not in held
    ]
    return content | {"added_tokens": [*added, *more]} if more else content


def _of_tools(turn: Mapping[str, Any]) -> bool:
    return turn["role"] == "tool" or bool(turn.get("tool_calls"))


def _without_each(turns: list[dict[str, Any]], tools: Any) -> Iterator[tuple[str, list, Any]]:
    """(what it is, turns and tools without it) of all that concerns tools in a conversation."""
    if tools:
        yield "tools", turns, None
    for i, turn in enumerate(turns):

        def changed(less: dict[str, Any], i: int = i) -> list[dict[str, Any]]:
            return [*turns[:i], less, *turns[i + 1 :]]

        if turn["role"] == "tool" and turn["content"]:
            yield "tool results", changed(turn | {"content": ""}), tools
        calls = turn.get("tool_calls", [])
        for j in range(len(calls)):
            others = {"tool_calls": [*calls[:j], *calls[j + 1 :]]} if len(calls) > 1 else {}
            rest = {k: v for k, v in turn.items() if k != "tool_calls"}
            yield "tool_calls", changed(rest | others), tools


def _encoding(encoder: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    try:
        return encoder.encode(text, add_special_tokens=False)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"the tokenizer cannot encode {text[:60]!a}: {error}") from error


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of `texts`, the longest first."""
    longest = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)) or r"(?!)")


def _marks(texts: Iterable[str]) -> set[str]:
    """Those that look like a format's marks, <x> or [x]: letters, and something else."""
    return {t for t in texts if re.search(r"[^\W_]", t) and re.search(r"[^\w\s]", t)}


def _parting(texts: Iterable[str], control: Iterable[str], template: Template) -> set[str]:
    """Those of `texts`, added tokens beside the `control` tokens, that part a template's turns.

    That is all that it names or writes, without what opens and closes a block in a turn, such as
    <think> and </think>; with these too where nothing else stands between a question and its
    answer. All, where the template refuses the conversation that would show it.
    """
    marks = _marks(texts)
    if not marks:
        return marks
    question, answer = (f"{_OPEN}{number}{_CLOSE}" for number in range(2))
    roles = zip(("system", "user", "assistant"), ("s", question, answer), strict=True)
    turns = [{"role": role, "content": content} for role, content in roles]
    try:
        try:
            whole = template.render(turns)
        except UserError:  # some know no system message
            whole = template.render(turns[1:])
    except UserError:
        return marks
    shown = f"{whole}\n{template.source}"
    written = {mark for mark in marks if mark in shown}
    known = "\n".join((shown, *texts))

    def other(mark: str) -> str:
        return mark.replace("/", "", 1) if "/" in mark else f"{mark[0]}/{mark[1:]}"

    parting = {mark for mark in written if other(mark) not in known}
    between = whole.partition(question)[2].partition(answer)[0]
    alone = not any(token in between for token in (*control, *parting))
    return written if alone else parting


def _without_first_prefix(content: dict[str, Any]) -> dict[str, Any] | None:
    """The same for later pieces, where a prefix is put before a text's first piece only."""
    changed = copy.deepcopy({k: v for k, v in content.items() if k != "model"})
    found = False

    def walk(node: Any) -> None:
        nonlocal found
        if isinstance(node, dict):
            if node.get("prepend_scheme") == "first":
                node["prepend_scheme"] = "never"
                found = True
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(changed)
    return changed | {"model": content["model"]} if found else None


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


def _came(
    settings: Mapping[str, Any], generation: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Mapping[str, Any]]:
    """What the files of a directory say that an export of its tokenizer says again."""
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    found = {SETTINGS: settings, _CONFIG: {name: config[name] for name in ids if name in config}}
    return found | ({_GENERATION: generation} if generation else {})


def _ids(directory: Path, settings: dict[str, Any], name: str) -> list[int]:
    """The ids that a model's configuration gives: one, several or none."""
    value = settings.get(name)
    listed = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in listed):
        raise UserError(f"{directory}: {name} = {value!r} should be ids")
    return listed


def _token(settings: Mapping[str, Any], name: str) -> str | None:
    value = settings.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise UserError(f"{SETTINGS} or {_SPECIAL_MAP}: {name} = {str(value)[:60]!r} is no token")
    return value


def _template(directory: Path, settings: dict[str, Any]) -> str | None:
    """chat_template.jinja, or the one in tokenizer_config.json, the "default" of several."""
    if (directory / TEMPLATE).is_file():
        return (directory / TEMPLATE).read_text("utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None
