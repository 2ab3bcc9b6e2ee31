"""Chat templates by name, for models that come without one: `--config.data.chat_template=chatml`.

Jinja as transformers reads it. The first six need their family's control tokens in the vocabulary.
The first three (`WITH_TOOLS`) take tools: "chatml" in Hermes' form, JSON in <tool_call> and results
in turns of their own; "llama3" in Llama 3.1's words, with the date that they give; "qwen", which is
"chatml" without tools, in those of Qwen 2.5 and 3, where results are in a user's turn.
"olmo" and "plain" mark turns by ordinary text, which a message may hold too, and end replies with
the tokenizer's own end of text: for base models such as GPT-2 and Pythia.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rlhf_jax.errors import UserError

MAX_BYTES = 2**20

_CHATML = (
    "{% if tools %}{{ '<|im_start|>system\n' "
    "+ (messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '') + INTRODUCED }}"
    "{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}{{ '\n</tools>\n\n' + CALLED "
    """+ ' within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, """
    """"arguments": <args-json-object>}\n</tool_call><|im_end|>\n' }}"""
    "{% if messages[0]['role'] == 'system' %}{% set messages = messages[1:] %}{% endif %}"
    "{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'tool' %}"
    "{{ ('' if loop.previtem and loop.previtem['role'] == 'tool' else '<|im_start|>TOOL') "
    "+ '\n<tool_response>\n' + message['content'] + '\n</tool_response>' "
    "+ ('' if loop.nextitem and loop.nextitem['role'] == 'tool' else '<|im_end|>\n') }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ ('' if loop.first and not message['content'] else '\n') + '<tool_call>\n' "
    "+ {'name': call['function']['name'], 'arguments': call['function']['arguments']} | tojson "
    "+ '\n</tool_call>' }}{% endfor %}{{ '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_HERMES = {
    "INTRODUCED": "'You may call functions. Their signatures are within <tools></tools> XML tags:"
    "\n<tools>'",
    "CALLED": "'Call each by a JSON object with its name and arguments'",
    "TOOL": "tool",
}
_QWEN = {
    "INTRODUCED": "'# Tools\n\nYou may call one or more functions to assist with the user query."
    "\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>'",
    "CALLED": "'For each function call, return a json object with function name and arguments'",
    "TOOL": "user",
}
_LLAMA3 = (
    "{{ bos_token }}{% if tools %}{{ '<|start_header_id|>system<|end_header_id|>\n\n"
    "Environment: ipython\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim }}"
    "{% set messages = messages[1:] %}{% endif %}{{ '<|eot_id|>' }}{% endif %}"
    "{% for message in messages %}{{ '<|start_header_id|>' "
    "+ ('ipython' if message['role'] == 'tool' else message['role']) + '<|end_header_id|>\n\n' }}"
    "{% if tools and loop.first %}{{ 'Given the following functions, please respond with a JSON "
    "for a function call with its proper arguments that best answers the given prompt.\n\n"
    """Respond in the format {"name": function name, "parameters": dictionary of argument name """
    "and its value}.Do not use variables.\n\n' }}"
    "{% for tool in tools %}{{ tool | tojson(indent=4) + '\n\n' }}{% endfor %}{% endif %}"
    "{% set calls = message['tool_calls'] %}"
    "{% if calls and (message['content'] or calls | length > 1) %}"
    "{{ raise_exception('llama3 knows one tool call a turn, without text beside it') }}"
    "{% elif calls %}{{ {'name': calls[0]['function']['name'], "
    "'parameters': calls[0]['function']['arguments']} | tojson }}"
    "{% elif message['role'] == 'tool' %}{{ message['content'] | tojson }}"
    "{% else %}{{ message['content'] | trim }}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
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


def _filled(template: str, words: Mapping[str, str]) -> str:
    for name, word in words.items():
        template = template.replace(name, word)
    return template


TEMPLATES = {
    "chatml": _filled(_CHATML, _HERMES),  # SmolLM
    "llama3": _LLAMA3,
    "qwen": _filled(_CHATML, _QWEN),
    "llama2": _LLAMA2,
    "mistral": _MISTRAL,
    "gemma": _GEMMA,
    "olmo": _OLMO,
    "plain": _PLAIN,
}
WITH_TOOLS = ("chatml", "llama3", "qwen")


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
