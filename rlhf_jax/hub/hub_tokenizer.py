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

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf_jax.data.records import Message
from rlhf_jax.errors import UserError
from rlhf_jax.hub.rendered_text import ANOTHER, Part, find_parting, looks_like_markup, render
from rlhf_jax.hub.template import DEFAULT, TOOL_USE, Template
from rlhf_jax.hub.tokenizer_settings import CONFIG, FILE, TokenizerSettings, read_settings
from rlhf_jax.hub.vocabulary import CLOSE, OPEN, Spelling, Vocabulary, add_stated, drop_beyond

_NO_END = f"the chat template writes no token that ends the assistant's turn; {ANOTHER}"


class HubTokenizer:
    """A vocabulary, its settings and its chat template; a `conversation.Tokenizer`.

    Attributes:
      ids: those of its tokens. vocab_size: one more than the highest of them.
      bos, end: ids of the tokens that begin and end a text; `bos` is None where none begins it.
    """

    def __init__(self, text: str, settings: TokenizerSettings):
        """Reads the text of a tokenizer.json.

        Raises:
            UserError: `text` is no tokenizer, or the settings name a token that it lacks.
        """
        self.settings = settings
        self.vocabulary = vocabulary = Vocabulary(text, settings.bos, settings.eos)
        self.ids, self.vocab_size = vocabulary.ids, vocabulary.size
        self.bos = None if vocabulary.bos is None else vocabulary.id_of(vocabulary.bos)
        self.end = vocabulary.id_of(vocabulary.eos)
        for each in settings.ends:
            if each not in self.ids:
                raise UserError(f"eos_token_id {each} is no id of the tokenizer")
        named = settings.named | {"bos_token": vocabulary.bos or "", "eos_token": vocabulary.eos}
        self._templates = {
            name: Template(settings.templates[name], named, for_tools=name == TOOL_USE)
            for name in (DEFAULT, TOOL_USE)
            if name in settings.templates
        }
        self._given_ends = tuple(dict.fromkeys([self.end, *settings.ends]))

    @classmethod
    def load(cls, directory: Path) -> HubTokenizer:
        """Reads tokenizer.json, tokenizer_config.json and the chat template of a directory.

        Raises:
            UserError: naming the file that is missing or wrong.
        """
        if not (directory / FILE).is_file():
            raise UserError(
                f"{directory} has no {FILE}: save the tokenizer as a fast one with transformers"
            )
        settings = read_settings(directory)
        try:
            text = (directory / FILE).read_text("utf-8")
            text = add_stated(text, settings.added, prevail=settings.prevail)
            if settings.size is not None:
                text, dropped = drop_beyond(text, settings.size, settings.uses)
                if dropped:
                    print(f"{directory}: the model has no ids for {', '.join(dropped)}", flush=True)
            return cls(text, settings)
        except (OSError, UnicodeDecodeError, UserError) as error:
            raise UserError(f"{directory}: {error}") from error

    def save(self, run: Path) -> None:
        """Writes what `load` reads into `tokenizer` in a run directory."""
        directory = run / "tokenizer"
        directory.mkdir(exist_ok=True)
        self.export(directory)
        (directory / CONFIG).write_text(json.dumps(self.special_ids, indent=2), "utf-8")

    def export(self, directory: Path) -> None:
        """Writes what transformers reads, all but config.json: settings as they came."""
        self.settings.write(directory, self.vocabulary, self.ends)

    @property
    def special_ids(self) -> dict[str, Any]:
        """bos_token_id, eos_token_id and pad_token_id for a config.json."""
        return self.settings.special_ids(self.vocabulary, self.ends)

    def with_template(self, template: str) -> HubTokenizer:
        """Returns this tokenizer under another chat template, in place of all its own.

        Raises:
            UserError: the template does not fit the vocabulary.
        """
        settings = dataclasses.replace(self.settings, templates={DEFAULT: template})
        tokenizer = HubTokenizer(json.dumps(self.vocabulary.content), settings)
        tokenizer._template_end(DEFAULT)
        return tokenizer

    @property
    def has_template(self) -> bool:
        """Whether it can render chats: it has a template that works."""
        return bool(self._template_ends)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Ids that end a reply: those given, and those that templates write which work."""
        return tuple(dict.fromkeys([*self._given_ends, *self._template_ends.values()]))

    @cached_property
    def hash(self) -> str:
        """sha256 of all that decides ids."""
        words = self.vocabulary
        sources = self.settings.templates
        document = [words.content, words.bos, words.eos, sources.get(DEFAULT), list(self.ends)]
        if TOOL_USE in sources:
            document.append(sources[TOOL_USE])
        packed = json.dumps(document, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(packed.encode()).hexdigest()

    @cached_property
    def spelling(self) -> Spelling:
        """Encodes text between the template's control tokens."""
        added, always = self.vocabulary.added, {self.bos, *self._given_ends}
        control = {n for n, i in added.items() if i in always or i in self.vocabulary.special}
        for each in self._templates.values():
            control |= find_parting(added.keys() - control, control, each)
        sources = "\n".join(each.source for each in self._templates.values())
        named = {text for text in added if looks_like_markup(text) and text in sources}
        return Spelling(self.vocabulary, control, named)

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(self.vocabulary.added[text] for text in self.spelling.control)

    @cached_property
    def marks(self) -> tuple[str, ...]:
        """The texts that part templates' turns: control tokens, or else words between two."""
        asked, answer = self.spelling.hide(OPEN), self.spelling.hide(CLOSE)
        marks = set()
        for name in self._template_ends or (DEFAULT,):
            whole = self._exchange(name, OPEN)
            between = whole.partition(asked)[2].partition(answer)[0].strip()
            marks |= {match[0] for match, _ in self.spelling.find_control(whole)}
            if next(self.spelling.find_control(between), None) is None:
                marks.add(between)
        return tuple(sorted(marks))

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts as they stand at the beginning; never a special token."""
        return [self.encode(text) for text in texts]

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""
        return self.spelling.encode(self.spelling.hide(text))

    def decode(self, ids: Iterable[int], *, control: bool = False) -> str:
        """Text of `ids`; control tokens are left out, or written by name if `control`."""
        ids = [int(i) for i in ids]
        if any(i < 0 for i in ids):
            raise ValueError("token ids are at least 0")
        if not control:  # not all of which a tokenizer.json calls special
            ids = [i for i in ids if i not in self._control_ids]
        return self.vocabulary.whole.decode(ids, skip_special_tokens=not control)

    def decode_text(self, ids: Sequence[int]) -> str:
        """The text of a turn or document; control tokens are left out."""
        return self.decode(ids)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation that awaits a reply."""
        prompts, (text,) = self._render_parts(messages, [(range(len(messages)), True)])
        return self._lay(text, prompts)[0]

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
        prompts, (prompt, *wholes) = self._render_parts(pool, [(range(size), True), *answers], size)
        replies = []
        for whole in wholes:
            if not whole.startswith(prompt):
                raise self._explain_break(prompt, whole)
            replies.append(self._cut_at_end(self._continue(prompt, whole[len(prompt) :])))
        return self._lay(prompt, prompts)[0], replies

    def conversation(self, messages: Sequence[Message]) -> tuple[list[int], dict[int, range]]:
        """Tokens of a whole conversation and where turns stand in them: see `render_turns`.

        Raises:
            UserError: what the template writes of a conversation does not begin with what it wrote
                of the prompt, or it never ends the last turn.
        """
        replies = [i for i, message in enumerate(messages) if message.role == "assistant"]
        prompts, texts = self._render_parts(messages, [(range(i + 1), False) for i in replies])
        whole, alone = texts[-1], dict(zip(replies, texts, strict=True))
        tokens, begins = self._lay(whole, prompts)
        last = len(messages) - 1
        if last not in begins:
            raise self._explain_break(prompts[last], whole)
        turns = {}
        for i in replies:
            end = self._find_end(alone[i], len(prompts[i]), self.ends)
            # Templates drop the thoughts of earlier replies, or end the last one only.
            if i == last or (i in begins and end and whole.startswith(alone[i][: end[1]])):
                turns[i] = range(begins[i], begins[i] + len(self._cut_at_end(tokens[begins[i] :])))
        return tokens[: turns[last].stop], turns

    def continuation(self, messages: Sequence[Message], *, for_tools: bool = False) -> list[int]:
        """Tokens between what ends a reply and the next reply, as the template writes them.

        Raises:
            UserError: as `conversation`.
        """
        pool = [Message("user", "a"), Message("assistant", "b"), *messages]
        parts: list[Part] = [(range(1), True), (range(2), False), (range(len(pool)), True)]
        prompt, reply, whole = self._render(pool, parts, for_tools=for_tools)
        end = self._find_end(reply, len(prompt), self.ends)
        if end is None or not whole.startswith(reply[: end[1]]):
            raise self._explain_break(reply, whole)
        return self._continue(whole[: end[1]], whole[end[1] :])

    def _render(
        self, messages: Sequence[Message], parts: Sequence[Part], *, for_tools: bool = False
    ) -> list[str]:
        return render(self._templates, self.spelling, messages, parts, for_tools=for_tools)

    def _exchange(self, name: str, question: str) -> str:
        """A question and the answer `CLOSE` as the template of this name writes them."""
        messages = [Message("user", question), Message("assistant", CLOSE)]
        return self._render(messages, [(range(2), False)], for_tools=name == TOOL_USE)[0]

    def _render_parts(
        self, messages: Sequence[Message], parts: Sequence[Part], size: int | None = None
    ) -> tuple[dict[int, str], list[str]]:
        """Prompts of the replies among the first `size` messages, by their indices; the parts."""
        turns = [i for i, m in enumerate(messages[:size]) if m.role == "assistant"]
        texts = self._render(messages, [*((range(i), True) for i in turns), *parts])
        return dict(zip(turns, texts, strict=False)), texts[len(turns) :]

    def _lay(self, text: str, prompts: Mapping[int, str]) -> tuple[list[int], dict[int, int]]:
        """Tokens of rendered text in which no reply merges with its prompt, and their begins.

        `prompts` are those of the replies in it, by their messages' indices. What does not begin
        with one, since the template writes it otherwise once the conversation goes on, is left out.
        """
        places: dict[int, int] = {}
        for i, prompt in prompts.items():
            if text.startswith(prompt) and len(prompt) >= max(places.values(), default=0):
                places[i] = len(prompt)
        bounds = [*places.values(), len(text)]
        tokens = self.spelling.encode(text[: bounds[0]])
        if self.bos is not None and tokens[:2] == [self.bos, self.bos]:
            # Llama 2 begins every exchange with one, which is no more than one at the beginning.
            raise UserError("the chat template writes the token that begins a text twice")
        begins = {}
        for (i, begin), end in zip(places.items(), bounds[1:], strict=True):
            begins[i] = len(tokens)
            tokens += self._continue(text[:begin], text[begin:end])
        return tokens, begins

    def _continue(self, prompt: str, text: str) -> list[int]:
        """Ids of rendered text that follows a prompt, whose ids stay what they are without it."""
        starts = [match.start() for match, _ in self.spelling.find_control(prompt)]
        lead = prompt[starts[-1] if starts else 0 :]
        before = self.spelling.encode(lead, first=False)
        both = self.spelling.encode(lead + text, first=False)
        if both[: len(before)] == before:
            return both[len(before) :]
        return self.spelling.encode(text, first=False)

    def _cut_at_end(self, ids: list[int]) -> list[int]:
        """The first of `ids` up to a reply's end."""
        ends = self._control_ids.intersection(self.ends)
        for place, token in enumerate(ids):
            if token in ends:
                return ids[: place + 1]
        raise UserError(_NO_END)

    def _find_end(
        self, text: str, start: int, ids: Collection[int] | None = None
    ) -> tuple[int, int] | None:
        """(id, where it stops) of the first control token, of `ids`, in rendered text."""
        for match, token in self.spelling.find_control(text, start):
            if ids is None or token in ids:
                return token, match.end()
        return None

    @cached_property
    def _template_ends(self) -> dict[str, int]:
        """Ids of the tokens that templates write after a reply, by the names of those that work."""
        ends = {}
        for name in self._templates:
            with suppress(UserError):
                ends[name] = self._template_end(name)
        return ends

    def _template_end(self, name: str) -> int:
        """Id of the token that the template of this name writes after a reply.

        Raises:
            UserError: there is none, or there is no template or one that fails.
        """
        whole = self._exchange(name, "a")
        end = self._find_end(whole, whole.rfind(CLOSE))
        if end is None or CLOSE not in whole:
            raise UserError(_NO_END)
        return end[0]

    def _explain_break(self, prompt: str, whole: str) -> UserError:
        """An error saying where a prompt and its reply are not what the template makes of both."""
        ours, theirs = self.spelling.encode(prompt), self.spelling.encode(whole)
        pairs = enumerate(zip(ours, theirs, strict=False))
        same = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
        first, second = (self.decode(ids[same : same + 1], control=True) for ids in (ours, theirs))
        return UserError(
            "the chat template writes a conversation differently from its prompt: token "
            f"{same} is {second!r}, not {first!r}; what is trained would not be what is generated; "
            f"{ANOTHER}"
        )
