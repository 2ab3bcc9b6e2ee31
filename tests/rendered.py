"""A conversation as a row of a batch shows it."""

from __future__ import annotations

from rlhf_jax.data.conversation import mark, render_turns


def render_conversation(messages, tokenizer, *, last_turn_only=False):
    """Tokens of a whole conversation, and for each of them 1 if it is trained, else 0."""
    tokens, turns = render_turns(messages, tokenizer, last_turn_only=last_turn_only)
    return tokens, mark(tokens, turns.values())
