"""Our own tokenizers, byte-level BPE or one id per character, and our format of chats.

    <|bos|><|user|> question<|end|><|assistant|> answer<|end|><|user|>…

The seven control tokens have ids 0…6 and are absent from the added vocabulary, so no text can
produce one: "<|assistant|>" typed by a user is encoded as the bytes it is made of. Only the chat
format emits control ids.

Tool calls, a tool's name, and with the first turn the tools there are, follow the content of a turn
as one line of JSON, {"tool_calls": […]}, {"name": …}, {"tools": […]}.

The text of a turn or document is encoded with a space in front, which `decode_text` takes away: a
word then has the same token at the start as anywhere else, and can be copied from there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from rlhf_jax.data.records import Message
from rlhf_jax.errors import UserError

CONTROL_TOKENS = (
    "<|pad|>",
    "<|bos|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
)
PAD, BOS, END, SYSTEM, USER, ASSISTANT, TOOL = range(len(CONTROL_TOKENS))
ROLE_IDS = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT, "tool": TOOL}
# Our format in Jinja, for transformers.
TEMPLATE = (
    "<|bos|>{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{% set more = "
    "{'tools': tools} if loop.first and tools else "
    "{'tool_calls': message['tool_calls']} if message['tool_calls'] else "
    "{'name': message['name'], 'tool_call_id': message['tool_call_id']} "
    "if message['name'] and message['tool_call_id'] else "
    "{'name': message['name']} if message['name'] else "
    "{'tool_call_id': message['tool_call_id']} if message['tool_call_id'] %}"
    "{% if message['content'] %}{{ ' ' + message['content'] }}{% endif %}"
    "{% if more %}{{ ('\\n' if message['content'] else ' ') + more | tojson }}{% endif %}"
    "<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MIN_BPE_VOCAB = len(CONTROL_TOKENS) + 256


class OwnTokenizer:
    """An immutable tokenizer made from the text of a `tokenizer.json`; a `conversation.Tokenizer`.

    Attributes:
      vocab_size: ids are 0 … vocab_size − 1.
      control: control token → id; empty for a character-level tokenizer.
      hash: sha256 of the canonical JSON; equal hashes give equal ids for every text.
    """

    bos: int | None = BOS
    end = END
    ends: tuple[int, ...] = (END,)
    has_template = True

    def __init__(self, text: str):
        """Raises UserError if `text` is no tokenizer, or one whose text could give control ids."""
        try:
            content = json.loads(text)
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"not a tokenizer.json: {str(error)[:200]}") from error
        self._json = json.dumps(content, sort_keys=True, separators=(",", ":"))
        self.hash = hashlib.sha256(self._json.encode()).hexdigest()
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.control = _control_ids(content)
        self.marks = tuple(self.control)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; never a control id. UserError for a character it cannot represent."""
        return self._encode_batch([text])[0]

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of whole turns or documents, without control tokens; works on all cores."""
        if not self.control:
            raise UserError(
                "a character-level tokenizer has no <|bos|>; train on windows of a stream"
            )
        return self._encode_batch([f" {text}" if text else "" for text in texts])

    def decode(self, ids: Iterable[int], *, control: bool = False) -> str:
        """Text of `ids`; control tokens are left out, or written by name if `control`."""
        ids = [int(i) for i in ids]
        if any(not 0 <= i < self.vocab_size for i in ids):
            raise ValueError(f"token ids must lie in [0, {self.vocab_size})")
        if not control:
            ids = [i for i in ids if i >= len(self.control)]
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def decode_text(self, ids: Sequence[int]) -> str:
        """The text of a turn or document; control tokens are left out."""
        return self.decode(ids).removeprefix(" ")

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation that awaits a reply."""
        return [*self.conversation(messages)[0], ASSISTANT]

    def replies(
        self, messages: Sequence[Message], texts: Sequence[str]
    ) -> tuple[list[int], list[list[int]]]:
        """The tokens of `prompt`, and of each text as a reply to it."""
        # One at a time: waking the library's threads takes longer than encoding a few turns.
        return self.prompt(messages), [[*self.encode_texts([text])[0], END] for text in texts]

    def conversation(self, messages: Sequence[Message]) -> tuple[list[int], dict[int, range]]:
        """Tokens of messages, and where the assistant's stand in them, by index."""
        if not self.control:
            raise UserError(
                "a character-level tokenizer has no control tokens and cannot render chats; "
                "train a BPE"
            )
        tokens, turns = [BOS], {}
        for i, message in enumerate(messages):
            ids = self._turn(message)
            if message.role == "assistant":
                turns[i] = range(len(tokens) + 1, len(tokens) + len(ids))
            tokens += ids
        return tokens, turns

    def continuation(self, messages: Sequence[Message], *, for_tools: bool = False) -> list[int]:
        """Tokens of the turns that answer a reply, up to the next one."""
        return [*(i for message in messages for i in self._turn(message)), ASSISTANT]

    def _turn(self, message: Message) -> list[int]:
        """Tokens of a turn, its role first and its end last."""
        text = "\n".join(filter(None, (message.content, message.more)))
        return [ROLE_IDS[message.role], *self.encode_texts([text])[0], END]

    def with_template(self, template: str) -> NoReturn:
        """Raises UserError: our format is the only one."""
        raise UserError(
            "config: data.chat_template is for models from the Hub; one pre-trained here has the "
            "format of data/tokenizer.py"
        )

    def save(self, run: Path) -> None:
        """Writes a Hugging Face `tokenizer.json` into a run directory."""
        (run / "tokenizer.json").write_text(self._json, encoding="utf-8")

    def export(self, directory: Path) -> None:
        """Writes what transformers reads, its chat template included.

        There the control tokens are special tokens, so that text which spells one becomes one.
        """
        if not self.control:
            raise UserError("a character-level tokenizer has no chat format to export")
        content = json.loads(self._json)
        content["added_tokens"] = [
            {"id": i, "content": name, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for name, i in self.control.items()
        ]
        roles = {"bos_token": BOS, "eos_token": END, "pad_token": PAD}
        settings = {name: CONTROL_TOKENS[i] for name, i in roles.items()} | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            # Without it transformers 4 gives models token_type_ids, which they refuse.
            "model_input_names": ["input_ids", "attention_mask"],
            "padding_side": "left",  # what is generated follows the prompt
            "chat_template": TEMPLATE,
        }
        (directory / "tokenizer.json").write_text(json.dumps(content), "utf-8")
        (directory / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
        (directory / "generation_config.json").write_text(json.dumps(self.special_ids))

    @property
    def special_ids(self) -> dict[str, Any]:
        """bos_token_id, eos_token_id and pad_token_id for a config.json."""
        return {"bos_token_id": BOS, "eos_token_id": [END], "pad_token_id": PAD}

    @classmethod
    def load(cls, path: Path) -> OwnTokenizer:
        """Reads what `save` wrote; UserError naming the file if it cannot."""
        try:
            return cls(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, UserError) as error:
            raise UserError(f"cannot load the tokenizer {path}: {error}") from error

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            if len(texts) > 1:  # and does not say for which text
                return [ids for text in texts for ids in self._encode_batch([text])]
            text = ascii(texts[0][:60])
            raise UserError(f"the tokenizer cannot encode {text}: {error}") from error
        return [encoding.ids for encoding in encodings]


def train_bpe(texts: Iterable[str], vocab_size: int, *, digits: int = 1) -> OwnTokenizer:
    """Trains a byte-level BPE; the same texts always give the same tokenizer.

    Every byte has an id, so any text round-trips. A token has at most so many `digits` of a number,
    counted from its first, and nothing beside them. The vocabulary is smaller than `vocab_size`
    where the texts offer too few merges: read `.vocab_size`.

    Neural Machine Translation of Rare Words with Subword Units, https://arxiv.org/abs/1508.07909
    """
    if vocab_size < MIN_BPE_VOCAB:
        raise UserError(
            f"vocab_size={vocab_size} is too small: {len(CONTROL_TOKENS)} control tokens and 256 "
            f"bytes need at least {MIN_BPE_VOCAB}"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True)
            if digits == 1
            else pre_tokenizers.Split(tokenizers.Regex(rf"\p{{N}}{{1,{digits}}}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = []
    return OwnTokenizer(json.dumps(content))


def train_chars(text: str) -> OwnTokenizer:
    """One id per character, in code-point order, and no control tokens: nanoGPT's char level.

    Fits a stream of text cut into windows (`batches.make_windows`), not chats.
    """
    if not text:
        raise UserError("a character-level tokenizer needs some text")
    vocabulary = {character: i for i, character in enumerate(sorted(set(text)))}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return OwnTokenizer(tokenizer.to_str())


def _control_ids(content: dict) -> dict[str, int]:
    """The control tokens of a parsed tokenizer.json, having checked that no text yields one."""
    model = content["model"]
    vocabulary = model["vocab"]
    if content["added_tokens"]:
        raise UserError("a tokenizer with added tokens would let text produce them; remove them")
    if model["type"] == "WordLevel":
        return {}
    if model["type"] != "BPE" or model.get("ignore_merges"):
        raise UserError("only byte-level BPE and character-level tokenizers are supported")
    if tuple(vocabulary.get(name) for name in CONTROL_TOKENS) != tuple(range(len(CONTROL_TOKENS))):
        raise UserError(f"ids 0 … {len(CONTROL_TOKENS) - 1} must be {' '.join(CONTROL_TOKENS)}")
    for merge in model["merges"]:
        if "".join(merge) in CONTROL_TOKENS:
            raise UserError(f"the merge {merge} would let text produce a control token")
    return {name: i for i, name in enumerate(CONTROL_TOKENS)}
