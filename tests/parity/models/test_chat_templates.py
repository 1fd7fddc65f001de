"""Chat templates against transformers' apply_chat_template, and templates that mean harm.

Text and ids are compared in every form that published models have. What a template may not do ends
as one line, within the limits of its process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import EOS, write_tokenizer

from edgemed.errors import EdgemedError
from edgemed.models import chat_template as rendering
from edgemed.models.chat_template import begun_answer_text, chat_templates, chat_text
from edgemed.models.tokenizer import chat_tokens, open_tokenizer

transformers = pytest.importorskip("transformers")

PLAIN = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORMS = {
    "plain": PLAIN,
    "named": [
        {"name": "default", "template": PLAIN},
        {"name": "tool_use", "template": "{{ raise_exception('no') }}"},
    ],
    "generation": "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    "{%- endfor %}",
    "break": "{% for m in messages %}{{ m['content'] }}{% if loop.index == 2 %}{% break %}"
    "{% endif %}{% endfor %}",
    "continue": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{{ m.content }}{% endfor %}",
    "tojson": "{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}"
    "{{ m | tojson(sort_keys=true, separators=[',', ':']) }}{% endfor %}",
    "strftime": "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}1999{% endif %}"
    "{{ messages[0]['content'] }}",
    "namespace": "{% set ns = namespace(found=false, self=1) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.found = m.content %}{% endif %}{% endfor %}{{ ns.found }}",
    "dict": "{{ dict(a=1) }}{{ dict.fromkeys([1, 2], 0) }}",
    "blocks": "  {% if true %}\n    a\n  {% endif %}\n{%- for m in messages %}\n  {{ m.content }}\n"
    "{%- endfor %}\n",
    "tokens": "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token }}|{{ sep_token }}",
    "tools": "{% if tools %}{{ tools }}{% endif %}{{ tools is none }}{{ documents is none }}x",
    "content": "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}"
    "{% endif %}{% endfor %}{% endif %}{% endfor %}",
    "strip": "{% for m in messages %}{{ m.content | trim }}{{ '\\n\\n' }}{% endfor %}"
    "{{ messages[-1].content.split(' ')[0].upper() }}",
    "thinking": "{% for m in messages %}{{ m.reasoning_content or '-' }}{{ m.content }}"
    "{% endfor %}",
}
TURNS = [
    {"role": "user", "content": "Is <b>HbA1c</b> > 6 'high'?  "},
    {"role": "assistant", "content": "Yes.", "thinking": "6 is much"},
    {"role": "user", "content": "And é? 患者 😀\n\n"},
]
CONVERSATIONS = {
    "one turn": TURNS[:1],
    "three turns": TURNS,
    "with system": [{"role": "system", "content": "Be brief.", "name": None}, *TURNS],
    "with an image": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
    ],
}


def written(folder: Path, template: Any = None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_tokenizer(folder)
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", **config}
    if template is not None:
        named["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


def same(folder: Path, messages: list[dict[str, Any]], **named: Any) -> None:
    """Text and ids are transformers'; where it refuses the conversation, a line says so."""
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    try:
        text = theirs.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=False,
            chat_template=named.get("template"),
        )
    except Exception:
        with pytest.raises(EdgemedError):
            chat_text(folder, messages, **named)
        return
    assert chat_text(folder, messages, **named) == text
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert chat_tokens(folder, open_tokenizer(folder, 300), messages, **named) == ids
    closed = theirs.apply_chat_template(
        messages, tokenize=False, chat_template=named.get("template")
    )
    assert chat_text(folder, messages, answered=True, **named) == closed


@pytest.mark.parametrize("form", FORMS)
def test_text_and_ids_are_those_of_transformers(form: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "model", FORMS[form], bos_token="<|endoftext|>")
    for messages in CONVERSATIONS.values():
        same(folder, messages)


def test_files_of_their_own_come_first(tmp_path: Path) -> None:
    folder = written(tmp_path / "model", "from the config")
    (folder / "chat_template.jinja").write_text(PLAIN)
    same(folder, TURNS)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag {{ messages | length }}")
    same(folder, TURNS)
    same(folder, TURNS, template="rag")
    with pytest.raises(EdgemedError, match="no chat template 'rga'.*Did you mean 'rag'"):
        chat_text(folder, TURNS, template="rga")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(EdgemedError, match="several chat templates and no default.*rag"):
        chat_text(folder, TURNS)


def test_the_old_file_of_processors(tmp_path: Path) -> None:
    folder = written(tmp_path / "model", "of the tokenizer")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "of the processor"}))
    assert chat_text(folder, TURNS) == "of the tokenizer"
    (folder / "preprocessor_config.json").write_text("{}")
    assert chat_text(folder, TURNS) == "of the processor"


def test_a_begun_answer(tmp_path: Path) -> None:
    messages = [*TURNS, {"role": "assistant", "content": "It is "}]
    for template in (PLAIN, "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"):
        folder = written(tmp_path / "model", template)
        theirs = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
            messages, tokenize=False, continue_final_message=True
        )
        assert begun_answer_text(folder, messages) == theirs
    written(tmp_path / "model", "nothing")
    with pytest.raises(EdgemedError, match="does not write the last message"):
        begun_answer_text(folder, messages)


def test_an_engine_renders_without_transformers(tmp_path: Path) -> None:
    """Its engine.json names the tokens; an engine of old has tokenizer_config.json."""
    folder = written(tmp_path / "model", PLAIN, bos_token="<|endoftext|>", pad_token=None)
    expected = chat_text(folder, TURNS)
    (folder / "engine.json").write_text(json.dumps({"eos": EOS}))
    assert chat_text(folder, TURNS) == expected
    named = {"bos_token": "<a>", "eos_token": "<b>"}
    (folder / "engine.json").write_text(json.dumps({"special_tokens": named}))
    assert chat_text(folder, TURNS[:1]) == expected.split("<|endoftext|>")[0] + (
        "<a><user>Is <b>HbA1c</b> > 6 'high'?  <b>\n<assistant>"
    )


# What the sandbox hides is an empty text to a template.
HARMLESS = ("", "x", "1")


def outcome(folder: Path) -> tuple[str, str]:
    """(the rendered text, '') or ('', the error)."""
    try:
        return chat_text(folder, TURNS), ""
    except EdgemedError as error:
        return "", str(error)


@pytest.mark.parametrize(
    "template",
    [
        7,
        {"default": PLAIN},
        ["text"],
        [{"name": "default"}],
        [{"name": 1, "template": PLAIN}],
        [{"name": "tool_use", "template": PLAIN}],
        "{% if %}",
        "{{ 'open",
        "{% unheard %}",
        "{% include 'other' %}",
        "{% import 'other' as x %}",
        "{% extends 'other' %}",
        "{{ messages[0].content.nothing.more }}",
        "{{ messages[99].content }}",
        "{{ 1 / 0 }}",
        "{{ raise_exception('only two roles') }}",
        "{{ unheard() }}",
        "{{ 'a' + 1 }}",
        "{{ messages | unheard }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}x",
        "{{ namespace(__class__=1) }}",
        "{{ cycler.__init__.__globals__ }}x",
        "{{ range(10**9) }}",
        "{{ 'x' * 10**9 }}",
        "{{ 'x' * 10**7 }}",
        "{{ ([0] * 10**9) | length }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:1000000000d}'.format(1) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "-" * 20000 + "1 }}",
        "{{ " + "[" * 2000 + "]" * 2000 + " }}",
        "{{ tools[0].name }}",
        "{{ documents | length }}",
    ],
)
def test_faults_of_a_template_are_one_line(template: Any, tmp_path: Path) -> None:
    folder = written(tmp_path / "model", template)
    text, message = outcome(folder)
    assert "\n" not in message
    assert str(folder) in message or text in HARMLESS
    written(folder, PLAIN)
    assert chat_text(folder, TURNS[:1]).startswith("<user>")


def test_tools_and_documents_are_named(tmp_path: Path) -> None:
    folder = written(tmp_path / "model", "{{ tools | length }}{{ documents }}")
    with pytest.raises(EdgemedError, match="asks for tools and documents, which edgemed does not"):
        chat_text(folder, TURNS)


def test_an_endless_template_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "CPU_SECONDS", 0)
    renderer = rendering.TemplateRenderer()
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(EdgemedError, match="takes more than 0 seconds or 512 MB"):
        renderer.render(loop, {}, "here")
    # The next one has a process of its own.
    assert renderer.render("{{ 1 + 1 }}", {}, "here") == "2"
    pid = renderer.process.pid if renderer.process else 0
    renderer.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
PARENT = f"""
import sys, threading, time
from edgemed.models import chat_template as rendering

renderer = rendering.TemplateRenderer()
renderer.render("", {{}}, "here")
threading.Thread(target=renderer.render, args=("{LOOP}", {{}}, "here"), daemon=True).start()
time.sleep(0.2)
print(renderer.process.pid, flush=True)
time.sleep(60)
"""


def test_its_process_ends_with_its_parent() -> None:
    """In the middle of a rendering, without anybody who closes its standard input."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, encoding="ascii"
    ) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        parent.wait()
    end = time.monotonic() + 2
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_thread_that_ends_takes_no_rendering_along() -> None:
    """The kernel kills a child with the thread that started it."""
    renderer = rendering.TemplateRenderer()
    finish = threading.Event()

    def start() -> None:
        renderer.render("", {}, "here")
        finish.wait()

    thread = threading.Thread(target=start)
    thread.start()
    while renderer.process is None or renderer.lock.locked():
        time.sleep(0.01)
    first = renderer.process.pid
    threading.Timer(0.1, finish.set).start()
    slow = "{% for i in range(30) %}{% for j in range(99999) %}{% endfor %}{% endfor %}done"
    assert renderer.render(slow, {}, "here") == "done"
    thread.join()
    assert renderer.process.pid != first
    assert renderer.render("{{ 1 + 1 }}", {}, "here") == "2"
    renderer.stop()


def test_a_process_started_once_renders_fast(tmp_path: Path) -> None:
    folder = written(tmp_path / "model", PLAIN)
    chat_text(folder, TURNS)
    process = rendering._RENDERER.process
    start = time.perf_counter()
    for _ in range(50):
        chat_text(folder, TURNS)
    assert rendering._RENDERER.process is process
    assert (time.perf_counter() - start) / 50 < 0.1


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_companions_that_are_not_utf8(name: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "model")
    (folder / name).write_bytes(b"{{ '\xff\xfe' }}")
    with pytest.raises(EdgemedError, match="cannot be read") as error:
        chat_templates(folder)
    assert "\n" not in str(error.value)


def test_messages_that_are_no_plain_data(tmp_path: Path) -> None:
    folder = written(tmp_path / "model", PLAIN)
    with pytest.raises(EdgemedError, match="not plain data"):
        chat_text(folder, [{"role": "user", "content": object()}])
    with pytest.raises(EdgemedError, match="conversation is empty"):
        chat_text(folder, [])
