"""A conversation as the text that a model was trained on, written by the model's own chat template.

Which template stands where, what it is given and what it may do follow transformers' tokenizers
(tokenization_utils_base.py and utils/chat_template_utils.py of 5.23), so that text and ids are
those of `apply_chat_template`. A template is a foreign program: it runs in a child process
(models/template_worker.py) that has limits on time and memory.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgemed.artifacts.json_files import read_json_object
from edgemed.errors import EdgemedError, nearest
from edgemed.hardware.child_process import PARENT
from edgemed.models.special_tokens import special_tokens

# What a turn of each role begins with where a model has no chat template.
NAMES = {"user": "Question", "assistant": "Answer", "system": "Context"}
FILE = "chat_template.jinja"
OLD_FILE = "chat_template.json"
FOLDER = "additional_chat_templates"
DEFAULT = "default"
# Files that only models with a processor (images, sound) have.
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
# A message's reasoning under the names that templates read it by; the first is today's.
REASONING = ("reasoning_content", "thinking", "reasoning")
COPY_AGAIN = "Copy it again from the model it belongs to"
TURNS = "Turns must be as the model was trained: usually user and assistant by turns"
# What one rendering may take. A conversation takes milliseconds and a few megabytes.
CPU_SECONDS = 5
MEGABYTES = 512

# Stands for where a begun answer goes on.
CONTINUED = "CONTINUE_FINAL_MESSAGE_TAG "

Message = Mapping[str, Any]


def chat_text(
    path: Path | None,
    messages: Sequence[Message],
    eos: str = "",
    answered: bool = False,
    template: str | None = None,
) -> str:
    """Messages as one prompt: in the chat template of an engine or checkpoint where it has one,
    else in plain turns.

    messages: [{'role': 'user', 'content': ...}, ...]. eos: the token that ends a text, where the
    directory does not say it. answered: the conversation ends with an answer, so no answer is to
    follow. template: name of one of several, None for the default.

    Raises EdgemedError where the template is broken, refuses the conversation or takes too much.
    """
    templates = chat_templates(Path(path)) if path else {}
    if not templates:
        turns = [f"{NAMES[message['role']]}: {message['content']}" for message in messages]
        if not answered:
            turns.append("Answer:")
        return "\n".join(turns)
    if not messages:
        raise EdgemedError("the conversation is empty", "Give at least one message")
    assert path is not None
    source = pick_template(templates, template, str(path))
    try:
        text = rendered_messages(Path(path), source, messages, eos, answered)
    except EdgemedError as refusal:
        listed = _listed_text(Path(path), source, messages, eos, answered)
        if listed is None:
            raise refusal from None
        return listed
    if has_question(text, messages):
        return text
    return _listed_text(Path(path), source, messages, eos, answered) or text


def _listed_text(
    path: Path, source: str, messages: Sequence[Message], eos: str, answered: bool
) -> str | None:
    """The rendering of lists of contents, for templates of models with images that read nothing
    else: they refuse a text, or pass it over. None where that does not help.
    """
    try:
        text = rendered_messages(path, source, listed_contents(messages), eos, answered)
    except EdgemedError:
        return None
    # Templates for texts alone print the list.
    printed = "'type': 'text'" in text or '"type": "text"' in text
    return text if has_question(text, messages) and not printed else None


def has_question(prompt: str, messages: Sequence[Message]) -> bool:
    """Whether a rendering holds the last text of the user; True where there is none."""
    questions = [message.get("content") for message in messages if message.get("role") == "user"]
    question = questions[-1] if questions else ""
    return not isinstance(question, str) or question.strip() in prompt


def listed_contents(messages: Sequence[Message]) -> list[Message]:
    """The same messages, each text as a list of contents."""
    listed = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            message = {**message, "content": [{"type": "text", "text": content}]}
        listed.append(message)
    return listed


def rendered_messages(
    path: Path, source: str, messages: Sequence[Message], eos: str = "", answered: bool = False
) -> str:
    """Messages in one template of a directory. source: its text; the rest as chat_text."""
    tokens = special_tokens(path)
    if eos:
        tokens.setdefault("eos_token", eos)
    values = {
        **tokens,
        "messages": [template_message(message) for message in messages],
        "tools": None,
        "documents": None,
        "add_generation_prompt": not answered,
    }
    return _RENDERER.render(source, values, str(path))


def begun_answer_text(path: Path, messages: Sequence[Message]) -> str:
    """Messages of which the last is the beginning of the model's own answer, up to where it goes
    on: transformers' continue_final_message.

    Raises EdgemedError as chat_text, and where the template does not write that message as it is.
    """
    beginning = messages[-1]["content"] if messages else None
    if not isinstance(beginning, str):
        raise EdgemedError("the last message has no text to go on with", "Give its content")
    marked = [*messages[:-1], {**messages[-1], "content": beginning + CONTINUED}]
    text = chat_text(path, marked, answered=True)
    place = text.rfind(CONTINUED.strip())
    if place < 0 or beginning.strip() not in text:
        raise EdgemedError(
            f"the chat template of {path} does not write the last message as it is",
            "Leave the begun answer out",
        )
    if text[place : place + len(CONTINUED)] == CONTINUED:
        return text[:place]
    # The template trims its messages.
    return text[:place].rstrip()


def template_message(message: Message) -> dict[str, Any]:
    """A message as templates see it: without keys that hold nothing, its reasoning under every
    name in use.
    """
    filled = {key: value for key, value in message.items() if value is not None}
    reasoning = next((filled[key] for key in REASONING if key in filled), None)
    if reasoning is None:
        return filled
    return {"thinking": reasoning, **filled, "reasoning_content": reasoning}


def has_chat_template(path: Path) -> bool:
    """Whether a model or engine directory has a chat template."""
    return bool(chat_templates(path))


def chat_template(path: Path, template: str | None = None) -> str:
    """The jinja template of a model or engine directory, '' where it has none."""
    templates = chat_templates(path)
    return pick_template(templates, template, str(path)) if templates else ""


def image_template(path: Path) -> str | None:
    """The jinja template that transformers' processor takes for turns with images, None where
    there is none: chat_template.json, the old file of processors, comes first there.
    """
    old = path / OLD_FILE
    if old.is_file():
        entry = read_json_object(old, COPY_AGAIN).get("chat_template")
        if entry is not None:
            return _named(entry, str(old)).get(DEFAULT)
    return chat_templates(path).get(DEFAULT)


def pick_template(templates: Mapping[str, str], name: str | None, where: str) -> str:
    """One of several templates by its name, the default for None. Raises EdgemedError where there
    is none of that name, or no default.
    """
    if name is None and DEFAULT not in templates:
        raise EdgemedError(
            f"{where} has several chat templates and no default",
            f"Name one of them: {', '.join(sorted(templates))}",
        )
    if (name or DEFAULT) not in templates:
        raise EdgemedError(
            f"{where} has no chat template '{name}'", nearest(str(name), sorted(templates))
        )
    return templates[name or DEFAULT]


def chat_templates(path: Path) -> dict[str, str]:
    """name -> jinja template of a model or engine directory; {} where it has none.

    Files of their own come before an entry of tokenizer_config.json. chat_template.json is the old
    file of models with a processor. Raises EdgemedError where one cannot be read.
    """
    templates = {}
    if (path / FILE).is_file():
        templates[DEFAULT] = _text(path / FILE)
    for file in sorted((path / FOLDER).glob("*.jinja")):
        templates[file.stem] = _text(file)
    if templates:
        return templates
    names = ["tokenizer_config.json", OLD_FILE]
    if any((path / name).is_file() for name in PROCESSORS):
        names.reverse()
    for name in names:
        if (path / name).is_file():
            entry = read_json_object(path / name, COPY_AGAIN).get("chat_template")
            if entry is not None:
                return _named(entry, f"{path / name}")
    return {}


def template_files(path: Path) -> list[Path]:
    """The files of a directory that hold nothing but chat templates."""
    return [path / FILE, path / OLD_FILE, *sorted((path / FOLDER).glob("*.jinja"))]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EdgemedError(f"{file} cannot be read: {error}", COPY_AGAIN) from None


def _named(entry: Any, where: str) -> dict[str, str]:
    """The templates of a 'chat_template' entry: a text, or a list of {'name', 'template'}."""
    if isinstance(entry, str):
        return {DEFAULT: entry}
    templates = {}
    rows = entry if isinstance(entry, list) else [None]
    for row in rows:
        name = row.get("name") if isinstance(row, dict) else None
        template = row.get("template") if isinstance(row, dict) else None
        if not isinstance(name, str) or not isinstance(template, str):
            raise EdgemedError(
                f"{where}: 'chat_template' is neither a text nor a list of"
                ' {"name": ..., "template": ...}',
                COPY_AGAIN,
            )
        templates[name] = template
    return templates


class TemplateRenderer:
    """Starts the child process at the first template and keeps it: starting it takes a tenth of a
    second, a rendering less than a millisecond. It ends with this process, and a template that
    takes too much ends it; the next one starts another.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.owner = 0
        self.lock = threading.Lock()

    def render(self, template: str, values: Mapping[str, Any], where: str) -> str:
        """The text of a template. Raises EdgemedError, in one line, for every fault it has."""
        try:
            request = json.dumps({"template": template, "values": values})
        except (TypeError, ValueError, RecursionError) as error:
            raise EdgemedError(
                f"a message is not plain data: {error}", "Give texts, numbers, lists and mappings"
            ) from None
        with self.lock:
            line = self._ask(request)
        if not line:
            raise EdgemedError(
                f"the chat template of {where} takes more than {CPU_SECONDS} seconds or"
                f" {MEGABYTES} MB",
                COPY_AGAIN,
            )
        answer: dict[str, str] = json.loads(line)
        if "error" in answer:
            raise EdgemedError(
                f"the chat template of {where} refuses this conversation: {answer['error']}",
                TURNS,
            )
        return answer["text"]

    def _ask(self, request: str) -> str:
        """One line from the child process, '' where it ended instead.

        The kernel kills it with the thread that started it, so another is asked then.
        """
        for _ in range(2):
            process = self._started()
            line = _exchange(process, request)
            if line.endswith("\n"):
                return line
            was_killed = _was_killed(process)
            self.stop()
            if not was_killed:
                break
        return ""

    def _started(self) -> subprocess.Popen[str]:
        # After a fork the pipes belong to both processes.
        if self.owner != os.getpid() or self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                # -P: this package's folder is no place to import from.
                [
                    *(sys.executable, "-P", str(Path(__file__).with_name("template_worker.py"))),
                    *(str(CPU_SECONDS), str(MEGABYTES)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="ascii",
                env=os.environ | {PARENT: str(os.getpid())},
            )
            self.owner = os.getpid()
        return self.process

    def stop(self) -> None:
        """End the child process, if there is one."""
        process = self.process
        self.process = None
        if process is None or self.owner != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def _exchange(process: subprocess.Popen[str], request: str) -> str:
    """Send a line and read one; what it does not end with a line break is no answer."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(request + "\n")
        process.stdin.flush()
        return process.stdout.readline()
    except OSError:
        return ""


def _was_killed(process: subprocess.Popen[str]) -> bool:
    """Whether a process that answers no more was killed. One that takes too much ends otherwise."""
    try:
        return process.wait(1) == -signal.SIGKILL
    except subprocess.TimeoutExpired:
        return False


_RENDERER = TemplateRenderer()
atexit.register(_RENDERER.stop)
