"""A config.json that is asked for its keys by type, and tells which nobody asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError

Json = dict[str, Any]
Kind = type | dict[str, str]

# Keys that say nothing of what the model computes.
_NEUTRAL = {
    *("architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "pretraining_tp"),
    *("_name_or_path", "hidden_dropout", "classifier_dropout", "resid_pdrop", "embd_pdrop"),
    *("attn_pdrop", "summary_type", "summary_use_proj", "summary_activation"),
    *("task_specific_params", "summary_proj_to_labels", "summary_first_dropout"),
    *("reorder_and_upcast_attn", "id2label", "label2id", "cache_implementation"),
    *("is_decoder", "max_window_layers", "auto_map"),
    *("quantization_config", "problem_type", "n_ctx", "output_hidden_states", "output_attentions"),
    *("return_dict", "is_encoder_decoder", "_attn_implementation_autoset", "num_labels"),
    # For training in transformers; ours has neither the noise nor the balancing loss.
    *("router_jitter_noise", "router_aux_loss_coef", "output_router_logits"),
}  # fmt: skip
# Keys of which we compute these values only, where a family does not ask for them.
_ONLY: Mapping[str, tuple] = {
    "use_bidirectional_attention": (None, False),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "num_experts_per_tok": (None,),
    "mlp_only_layers": (None, []),
    "decoder_sparse_step": (None, 1),
    "no_rope_layers": (None,),
}
_NAMES: Mapping[Any, str] = {int: "a whole number", float: "a number", bool: "true or false"}


class ConfigReader:
    """A parsed config.json, or an object in it."""

    def __init__(self, path: Path, document: Mapping[str, Any], quiet: bool = False):
        self._path, self._document, self._quiet = path, document, quiet
        self._asked = set(_NEUTRAL)
        self._tables: dict[str, ConfigReader] = {}

    def get(self, key: str) -> Any:
        """The value as it stands there; None where there is none."""
        self._asked.add(key)
        return self._document.get(key)

    def typed(self, key: str, kind: Kind) -> Any:
        """The value as an int, float or bool, or what a {theirs: ours} makes of it.

        Raises:
            UserError: it is absent, null or of another type.
        """
        value = self.get(key)
        if isinstance(kind, dict):
            if not isinstance(value, str) or value not in kind:
                raise self._wrong(key, value, f"one of {', '.join(kind)}")
            return kind[value]
        allowed = (int, float) if kind is float else (kind,)
        if not isinstance(value, allowed) or isinstance(value, bool) != (kind is bool):
            raise self._wrong(key, value, _NAMES[kind])
        if kind is not float:
            return value
        try:
            number = float(self._document[key])
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self._wrong(key, value, "a finite number")
        return number

    def table(self, key: str) -> ConfigReader:
        """A nested object, empty where there is none."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        if key not in self._tables:
            path = Path(f"{self._path}: {key}")
            self._tables[key] = ConfigReader(path, value or {}, self._quiet)
        return self._tables[key]

    def changed(self, **values: Any) -> ConfigReader:
        """The same with other values; what is asked of it is asked of this one."""
        other = ConfigReader(self._path, {**self._document, **values}, self._quiet)
        other._asked = self._asked
        return other

    def merged(self, other: ConfigReader) -> Json:
        """The object, in which what `other` says replaces what stands there."""
        return {**self._document, **other._document}

    def say(self, what: str) -> None:
        """Prints a line about this file."""
        if not self._quiet:
            print(f"{self._path}: {what}", flush=True)

    def refused(self, why: str) -> UserError:
        """An error about this file."""
        return UserError(f"{self._path}: {why}")

    def __contains__(self, key: str) -> bool:
        return key in self._document

    def __len__(self) -> int:
        return len(self._document)

    def finish(self, only: Mapping[str, tuple] = _ONLY) -> None:
        """Says which keys nobody asked for.

        Args:
          only: the values of such keys that change nothing.

        Raises:
            UserError: one of them changes what the model computes.
        """
        only = {**_ONLY, **only}
        for key in sorted(only.keys() & self._document.keys() - self._asked):
            if (value := self._document[key]) not in only[key]:
                raise self.refused(f"{key} = {value!r:.80} is not supported")
        unknown = sorted(set(self._document) - self._asked - set(only))
        if unknown:
            self.say(f"not used: {', '.join(unknown)}")

    def _wrong(self, key: str, value: Any, needed: str) -> UserError:
        if value is None:
            return self.refused(f"there is no {key}; it should be {needed}")
        return self.refused(f"{key} = {str(value)[:80]!r} should be {needed}")
