"""The files beside a tokenizer.json: which tokens begin and end a text, and the chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.hub.template import DEFAULT
from rlhf_jax.hub.vocabulary import FLAGS, Vocabulary

FILE, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
MORE_TEMPLATES, ADDED = "additional_chat_templates", "added_tokens.json"
SPECIAL_MAP, GENERATION, CONFIG = (
    f"{name}.json" for name in ("special_tokens_map", "generation_config", "config")
)
# Settings that are written anew, or say where and how files were loaded.
_ANEW = (
    *("chat_template", "auto_map", "name_or_path", "tokenizer_file", "special_tokens_map_file"),
    *("is_local", "local_files_only"),
)
# Their classes in transformers have a bos_token though no file names it, as "<|endoftext|>". Other
# models begin no text then, whatever id their config.json gives: Qwen's gives one.
_BOS_BY_CLASS = ("gpt2", "gpt_neox", "gptneox", "gemma")
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_MORE = "additional_special_tokens"
# Beside those that begin and end a text, transformers gives templates these.
_NAMED = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class TokenizerSettings:
    """The contents of the files beside a vocabulary, of which most is written again.

    Attributes:
      eos, bos: the tokens that end and begin a text, or their ids; None where none is named.
      pad: the token that fills batches, where one is named.
      templates: the chat templates in Jinja by name: "default", or several.
      ends: ids that end a reply.
      added: entries of added tokens, as tokenizer.json has them, that other files state, by text;
        where they `prevail`, their flags do over those of tokenizer.json.
      stated: what tokenizer_config.json and special_tokens_map.json said.
      generation: what generation_config.json said. config: the ids of special tokens that
        config.json gave.
      size: how many ids the model has, where config.json says it.
    """

    eos: str | int | None
    bos: str | int | None = None
    pad: str | None = None
    templates: Mapping[str, str] = field(default_factory=dict)
    ends: tuple[int, ...] = ()
    added: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    stated: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    size: int | None = None

    def special_ids(self, vocabulary: Vocabulary, ends: tuple[int, ...]) -> dict[str, Any]:
        """bos_token_id, eos_token_id and pad_token_id for a config.json."""
        bos = None if vocabulary.bos is None else vocabulary.id_of(vocabulary.bos)
        pad, text = self.config.get("pad_token_id"), self._pad(vocabulary)
        if pad is None and text is not None:
            pad = vocabulary.whole.token_to_id(text)
        return {
            "bos_token_id": self.config.get("bos_token_id", bos),
            "eos_token_id": _keep_form(self.config.get("eos_token_id"), ends),
            "pad_token_id": pad,
        }

    @property
    def named(self) -> dict[str, str]:
        """The special tokens that a template may name, beside those that begin and end a text."""
        tokens = {name: _read_token(self.stated, name) for name in _NAMED}
        return {name: token for name, token in tokens.items() if token is not None}

    @property
    def prevail(self) -> bool:
        """Whether `added` is of added_tokens_decoder, which transformers believes."""
        return "added_tokens_decoder" in self.stated

    def uses(self, token: str) -> bool:
        """Whether one of the files names a token as special, or the template may write it."""
        named = (self.bos, self.eos, *self.named.values())
        return token in named or any(token in source for source in self.templates.values())

    def write(self, directory: Path, vocabulary: Vocabulary, ends: tuple[int, ...]) -> None:
        """Writes what transformers reads, all but config.json: settings as they came."""
        settings: dict[str, Any] = {
            "clean_up_tokenization_spaces": False,
            # Without it transformers 4 gives models token_type_ids, which they refuse.
            "model_input_names": ["input_ids", "attention_mask"],
        }
        settings |= {name: value for name, value in self.stated.items() if name not in _ANEW}
        settings |= {
            # One that reads tokenizer.json as it is: others make parts of it anew.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": vocabulary.bos,
            "eos_token": vocabulary.eos,
        }
        if decoder := settings.get("added_tokens_decoder"):  # which may have what was left out
            own = {k: v for k, v in decoder.items() if v["content"] in vocabulary.added}
            settings["added_tokens_decoder"] = own
        if (pad := self._pad(vocabulary)) is not None:
            settings["pad_token"] = pad
        if isinstance(settings.get("extra_special_tokens"), list):  # read by transformers 5 only
            settings[_MORE] = settings.pop("extra_special_tokens")
        (directory / FILE).write_text(json.dumps(vocabulary.content, ensure_ascii=False), "utf-8")
        if self.templates.keys() == {DEFAULT}:
            (directory / TEMPLATE).write_text(self.templates[DEFAULT], "utf-8")
        elif self.templates:  # as every reader of several knows them
            listed = [{"name": k, "template": v} for k, v in self.templates.items()]
            settings["chat_template"] = listed
        (directory / SETTINGS).write_text(json.dumps(settings, indent=2), "utf-8")
        generation = dict(self.generation) or self.special_ids(vocabulary, ends)
        generation["eos_token_id"] = _keep_form(generation.get("eos_token_id"), ends)
        (directory / GENERATION).write_text(json.dumps(generation, indent=2), "utf-8")

    def _pad(self, vocabulary: Vocabulary) -> str | None:
        """The token that fills batches, by its name, or by the id in one of the configs."""
        if self.pad is not None:
            return self.pad
        for config in (self.config, self.generation):
            number = config.get("pad_token_id")
            if isinstance(number, int) and 0 <= number < vocabulary.size:
                return vocabulary.whole.id_to_token(number)
        return None


def read_settings(directory: Path) -> TokenizerSettings:
    """The settings of a directory's tokenizer.

    Raises:
        UserError: a file is damaged.
    """
    settings = _read_object(directory / SETTINGS)
    config, generation = (_read_object(directory / name) for name in (CONFIG, GENERATION))
    ids = config | generation
    ends = _read_ids(directory, ids, "eos_token_id")
    names = settings
    if "added_tokens_decoder" not in settings:  # with it, transformers reads no other file
        names = settings | _read_object(directory / SPECIAL_MAP)
    bos: str | int | None = _read_token(names, "bos_token")
    eos: str | int | None = _read_token(names, "eos_token")
    eos = next(iter(ends), None) if eos is None else eos
    kind = str(settings.get("tokenizer_class") or config.get("model_type")).lower()
    if "bos_token" not in names and kind.startswith(_BOS_BY_CLASS):
        bos = next(iter(_read_ids(directory, ids, "bos_token_id")), None)
    return TokenizerSettings(
        eos,
        bos,
        _read_token(names, "pad_token"),
        templates=_read_templates(directory, settings),
        ends=tuple(ends),
        added=_read_added(directory, names),
        stated=names,
        generation=generation,
        config={name: config[name] for name in _SPECIAL_IDS if name in config},
        size=size if isinstance(size := config.get("vocab_size"), int) else None,
    )


def _keep_form(given: Any, ends: tuple[int, ...]) -> Any:
    """`ends` as an eos_token_id: in the form that was given if it has them all."""
    listed = given if isinstance(given, list) else [given]
    same = all(isinstance(each, int) for each in listed) and set(listed) == set(ends)
    return given if same else list(ends)


def _read_object(path: Path) -> dict[str, Any]:
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


def _read_ids(directory: Path, settings: Mapping[str, Any], name: str) -> list[int]:
    """The ids that a model's configuration gives: one, several or none."""
    value = settings.get(name)
    listed = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in listed):
        raise UserError(f"{directory}: {name} = {value!r} should be ids")
    return listed


def _read_token(settings: Mapping[str, Any], name: str) -> str | None:
    value = settings.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise UserError(f"{SETTINGS} or {SPECIAL_MAP}: {name} = {str(value)[:60]!r} is no token")
    return value


def _read_added(directory: Path, names: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The added tokens of added_tokens_decoder, or else of added_tokens.json, by text."""
    if "added_tokens_decoder" not in names:
        ids = _read_object(directory / ADDED)
        if not all(type(number) is int for number in ids.values()):
            raise UserError(f"{directory / ADDED} should be an object of ids")
        more = names.get(_MORE)
        tokens = [*map(names.get, ("bos_token", "eos_token", *_NAMED))]
        tokens += more if isinstance(more, list) else []
        texts = [each.get("content") if isinstance(each, dict) else each for each in tokens]
        return {
            text: {"id": i, "content": text, "special": text in texts}
            | FLAGS
            | {"normalized": text not in texts}  # as transformers has it
            for text, i in ids.items()
        }
    decoder, added = names["added_tokens_decoder"], {}
    named = {_read_token(names, name) for name in ("bos_token", "eos_token", *_NAMED)}
    if not isinstance(decoder, dict):
        raise UserError(f"{directory / SETTINGS}: added_tokens_decoder is no object")
    for number, token in decoder.items():
        content = token.get("content") if isinstance(token, dict) else None
        if not isinstance(content, str) or not number.isdecimal():
            raise UserError(f"{directory / SETTINGS}: added_tokens_decoder is wrong at {number!r}")
        # As transformers has it, to which the tokens that have a name are special in any case.
        special = bool(token.get("special")) or content in named
        flags = FLAGS | {"normalized": not special}
        flags |= {name: token[name] for name in FLAGS if name in token}
        added[content] = {"id": int(number), "content": content, "special": special} | flags
    return added


def _read_templates(directory: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates by name: of files, or without these those in tokenizer_config.json."""
    files = {path.stem: path for path in sorted((directory / MORE_TEMPLATES).glob("*.jinja"))}
    if (directory / TEMPLATE).is_file():
        files[DEFAULT] = directory / TEMPLATE
    try:
        if files:
            return {name: path.read_text("utf-8") for name, path in files.items()}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{directory}: {error}") from error
    given = settings.get("chat_template")
    if isinstance(given, list):
        given = {t.get("name"): t.get("template") for t in given if isinstance(t, dict)}
    named = given if isinstance(given, dict) else {DEFAULT: given}
    return {k: v for k, v in named.items() if isinstance(k, str) and isinstance(v, str)}
