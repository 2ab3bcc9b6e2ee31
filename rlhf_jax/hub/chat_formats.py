"""Chat templates by name, for models that come without one: `--config.data.chat_template=chatml`.

They are the files of templates/, Jinja as transformers reads it. The first six need their family's
control tokens in the vocabulary. The first three (`WITH_TOOLS`) take tools: "chatml" in Hermes'
form, JSON in <tool_call> and results in turns of their own; "llama3" in Llama 3.1's words, with the
date that they give; "qwen", which is "chatml" without tools, in those of Qwen 2.5 and 3, where
results are in a user's turn.
"olmo" and "plain" mark turns by ordinary text, which a message may hold too, and end replies with
the tokenizer's own end of text: for base models such as GPT-2 and Pythia.
"""

from __future__ import annotations

from pathlib import Path

from rlhf_jax.errors import UserError

MAX_BYTES = 2**20
WITH_TOOLS = ("chatml", "llama3", "qwen")
_FILES = (
    *("templates/chatml.jinja", "templates/llama3.jinja", "templates/qwen.jinja"),
    *("templates/llama2.jinja", "templates/mistral.jinja", "templates/gemma.jinja"),
    *("templates/olmo.jinja", "templates/plain.jinja"),
)
TEMPLATES = {Path(f).stem: (Path(__file__).parent / f).read_text("utf-8").strip() for f in _FILES}
# For a message: what suits every tokenizer comes first.
NAMES = (
    f"plain or olmo, or {', '.join(list(TEMPLATES)[:6])} where their control tokens are in the "
    "vocabulary, or a *.jinja file"
)


def chat_template(name: str) -> str:
    """The text of a built-in template, or of a file that ends in .jinja.

    Raises:
        UserError: neither.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if not name.endswith(".jinja"):
        raise UserError(
            f"data.chat_template = {name!r}: give a *.jinja file or one of {', '.join(TEMPLATES)}"
        )
    try:
        with open(Path(name), encoding="utf-8") as file:
            text = file.read(MAX_BYTES + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.chat_template: cannot read {name}: {error}") from error
    if len(text) > MAX_BYTES:
        raise UserError(f"data.chat_template: {name} has more than {MAX_BYTES} characters")
    return text
