"""Chat templates by name, for models that come without one: `--config.data.chat_template=chatml`.

Jinja as transformers reads it. The first five need their family's control tokens in the vocabulary.
"olmo" and "plain" mark turns by ordinary text, which a message may hold too, and end replies with
the tokenizer's own end of text: for base models such as GPT-2 and Pythia.
"""

from __future__ import annotations

from pathlib import Path

from rlhf_jax.errors import UserError

MAX_BYTES = 2**20

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_SYSTEM_IN_FIRST_TURN = (
    "{% set opening = '' %}"
    "{% if messages and messages[0]['role'] == 'system' %}"
    "{% set opening = SYSTEM %}{% set messages = messages[1:] %}{% endif %}"
)
_LLAMA2 = (
    _SYSTEM_IN_FIRST_TURN.replace(
        "SYSTEM", "'<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n'"
    )
    + "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (opening if loop.first else '') + message['content'] | trim "
    "+ ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('llama2 knows system (first), user and assistant') }}{% endif %}"
    "{% endfor %}"
)
_MISTRAL = (
    _SYSTEM_IN_FIRST_TURN.replace("SYSTEM", "messages[0]['content'] + '\n\n'")
    + "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (opening if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('mistral knows system (first), user and assistant') }}{% endif %}"
    "{% endfor %}"
)
_GEMMA = (
    _SYSTEM_IN_FIRST_TURN.replace("SYSTEM", "messages[0]['content'] + '\n\n'")
    + "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (opening if loop.first else '') "
    "+ message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_OLMO = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\n' "
    "+ message['content'] + (eos_token if message['role'] == 'assistant' else '') + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_PLAIN = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] | capitalize + ': ' + message['content'] "
    "+ (eos_token if message['role'] == 'assistant' else '') + '\n\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
TEMPLATES = {
    "chatml": _CHATML,  # Qwen, SmolLM
    "llama3": _LLAMA3,
    "llama2": _LLAMA2,
    "mistral": _MISTRAL,
    "gemma": _GEMMA,
    "olmo": _OLMO,
    "plain": _PLAIN,
}


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
