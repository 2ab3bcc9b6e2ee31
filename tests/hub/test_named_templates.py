"""A model with several chat templates by name: which one renders, and that all are written back."""

from __future__ import annotations

import json

import pytest

from rlhf_jax.data.conversation import render_continuation, render_prompt
from rlhf_jax.data.records import Message
from rlhf_jax.errors import UserError
from rlhf_jax.hub.chat_formats import TEMPLATES
from rlhf_jax.hub.hub_tokenizer import HubTokenizer
from rlhf_jax.training.saved_model import fingerprint
from tests.hub.test_hub_tokenizer import CONVERSATION, calling, write

TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
DEFAULT = "{% for m in messages %}" + TURN + "{% endfor %}"
OPENED = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
# As such templates are written: they are only ever used where there are tools.
TOOL_USE = (
    "{{ '<|im_start|>system\nTools:' }}{% for tool in tools %}{{ '\n' + tool | tojson }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'tool' %}{{ '<tool_response>' + m.content + '</tool_response>' }}"
    "{% else %}{{ m.content }}{% endif %}{% for call in m.tool_calls or [] %}"
    "{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
)
SOURCES = {"default": DEFAULT + OPENED, "rag": "{{ 'Sources:' }}", "tool_use": TOOL_USE + OPENED}
SCHEMA = {"type": "function", "function": {"name": "look", "parameters": {}}}
TOOLS = json.dumps({"tools": [SCHEMA]})
CALLING = [
    Message("user", "What is it?", TOOLS),
    Message("assistant", "", calling("look", {"where": "here"})),
    Message("tool", "a fox"),
    Message("assistant", "A fox."),
]


def layouts(directory, sources):
    """Writes the templates in each of the ways that transformers reads; yields their names."""
    path = directory / "tokenizer_config.json"
    settings = {k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}
    listed = [{"name": name, "template": source} for name, source in sources.items()]
    path.write_text(json.dumps(settings | {"chat_template": listed}))
    yield "a list"
    path.write_text(json.dumps(settings | {"chat_template": "{{ 'an older one' }}"}))
    (directory / "additional_chat_templates").mkdir()
    for name, source in sources.items():
        file = f"additional_chat_templates/{name}.jinja"
        (directory / ("chat_template.jinja" if name == "default" else file)).write_text(source)
    yield "files"


def check_as_transformers(directory, ours, conversations):
    transformers = pytest.importorskip("transformers", reason="needs requirements-parity.txt")
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    for messages in conversations:
        turns = [message.to_json() for message in messages]
        tools = turns[0].pop("tools", None)
        wanted = theirs.apply_chat_template(turns, tools=tools, return_dict=False)
        tokens, _ = ours.conversation(messages)
        assert tokens == wanted[: len(tokens)] and len(wanted) - len(tokens) < 3
        wanted = theirs.apply_chat_template(
            turns[:1], tools=tools, add_generation_prompt=True, return_dict=False
        )
        assert ours.prompt(messages[:1]) == wanted
    return theirs.chat_template


def test_tools_choose_the_template_as_in_transformers_and_all_are_written_back(tmp_path):
    read = tmp_path / "read"
    read.mkdir()
    write(read, "chatml")
    for layout in layouts(read, SOURCES):
        ours, out = HubTokenizer.load(read), tmp_path / layout
        out.mkdir()
        ours.export(out)
        for directory in (read, out):
            again = HubTokenizer.load(directory)
            assert again.hash == ours.hash
            assert check_as_transformers(directory, again, [CONVERSATION, CALLING]) == SOURCES


def test_one_for_tools_alone_is_no_template_of_other_conversations(tmp_path):
    write(tmp_path, "chatml")
    for _ in layouts(tmp_path, {"tool_use": SOURCES["tool_use"]}):
        ours = HubTokenizer.load(tmp_path)
        assert ours.has_template and "<|im_start|>" in ours.marks
        with pytest.raises(UserError, match=r"'tool_use', for .* has none; to use another: --conf"):
            ours.conversation(CONVERSATION)
        check_as_transformers(tmp_path, ours, [CALLING])


def test_what_answers_a_call_is_rendered_by_the_template_of_its_prompt(tmp_path):
    write(tmp_path, "chatml")
    next(layouts(tmp_path, SOURCES))
    ours = HubTokenizer.load(tmp_path)
    call = Message("assistant", "<tool_call>{}</tool_call>")
    for asked, for_tools in ((CALLING[0], True), (Message("user", "What is it?"), False)):
        whole, _ = ours.conversation([asked, call, *CALLING[2:]])
        prompt = render_prompt([asked], ours)
        _, (first, second) = ours.replies([asked], [call.content, "A fox."])
        told = render_continuation([CALLING[2]], ours, for_tools=for_tools)
        assert [*prompt, *first, *told, *second] == whole
        assert ("<tool_response>" in ours.decode(told)) == for_tools


def test_a_template_for_tools_that_fails_or_ignores_them_is_told_only_where_it_is_used(tmp_path):
    write(tmp_path, "chatml")
    for source, message in (
        ("{{ raise_exception('not today') }}", "fails: _Refused: not today"),
        (SOURCES["default"], "ignores tools"),
    ):
        next(layouts(tmp_path, SOURCES | {"tool_use": source}))
        ours = HubTokenizer.load(tmp_path)
        assert ours.has_template and "<|im_start|>" in ours.marks
        assert len(ours.conversation(CONVERSATION)[1]) == 2
        with pytest.raises(UserError, match=message):
            ours.conversation(CALLING[:1] + CONVERSATION[1:2])


def test_a_named_template_takes_the_place_of_all(tmp_path):
    write(tmp_path, "chatml")
    next(layouts(tmp_path, SOURCES))
    ours = HubTokenizer.load(tmp_path).with_template(TEMPLATES["chatml"])
    assert ours.settings.templates == {"default": TEMPLATES["chatml"]}
    assert "You may call functions" in ours.decode(ours.conversation(CALLING)[0])


def test_a_template_in_the_folder_is_of_the_model_s_fingerprint_and_the_tokenizer_s(tmp_path):
    write(tmp_path, "chatml")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    [*layouts(tmp_path, SOURCES)]
    before = fingerprint(tmp_path), HubTokenizer.load(tmp_path).hash
    path = tmp_path / "additional_chat_templates/tool_use.jinja"
    path.write_text(path.read_text() + "{# changed #}")
    after = fingerprint(tmp_path), HubTokenizer.load(tmp_path).hash
    assert before[0] != after[0] and before[1] != after[1]
