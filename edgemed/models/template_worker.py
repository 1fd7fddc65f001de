"""Renders chat templates in a process of its own, with little memory and time.

A chat template is a program that comes with a model. The environment is transformers' own
(utils/chat_template_utils.py of 5.23), and no more than that is offered. The sandbox keeps a
template from files and from Python, but not from loops and from long strings, so
models/chat_template.py starts this file as a script and limits what it may take.

Each line of standard input is one request as JSON, and each line of standard output its answer:
{"text": ...} or {"error": ...}. The process ends with its standard input and with its parent. Its
arguments are the CPU seconds for one request and the megabytes for all.
"""

from __future__ import annotations

import functools
import json
import resource
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

LONGEST = 8 << 20  # characters of a rendered text
WITHHELD = ("tools", "documents")  # what a template may ask for and edgemed does not give


class Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks what the model wrote. The text stays."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_body")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class TemplateDict:
    """`dict` as templates may use it, without the class itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class TemplateNamespace(jinja2.utils.Namespace):
    """`namespace` without attributes that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # As jinja2's own: `self` may be a name in the namespace.
        instance, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(instance, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """What transformers renders chat templates in."""
    result = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    result.filters["tojson"] = _tojson
    result.globals["raise_exception"] = _raise_exception
    result.globals["strftime_now"] = _strftime_now
    result.globals["dict"] = TemplateDict()
    result.globals["namespace"] = TemplateNamespace
    return result


@functools.lru_cache(maxsize=8)
def compiled(template: str) -> jinja2.Template:
    """A template ready to be rendered. Raises jinja2's TemplateSyntaxError."""
    return environment().from_string(template)


def render(template: str, values: dict[str, Any]) -> str:
    """The text of a template. Raises what jinja2 raises, and OverflowError beyond LONGEST."""
    pieces = []
    length = 0
    for piece in compiled(template).generate(**values):
        pieces.append(piece)
        length += len(piece)
        if length > LONGEST:
            raise OverflowError(f"its text is longer than {LONGEST} characters")
    return "".join(pieces)


class TemplateFault(Exception):
    """What is wrong with a template, in one line."""


def rendered(template: str, values: dict[str, Any]) -> str:
    """The text of a template. Raises TemplateFault for whatever is wrong with it."""
    try:
        return render(template, values)
    except MemoryError:
        raise TemplateFault("it takes more memory than a template may") from None
    except RecursionError:
        raise TemplateFault("it is nested too deeply") from None
    except jinja2.TemplateSyntaxError as error:
        raise TemplateFault(f"line {error.lineno}: {error.message}") from None
    except Exception as error:  # a template can make Python raise anything
        message = " ".join(str(error).split())[:300] or type(error).__name__
        raise TemplateFault(message + _withheld(template)) from None


def _withheld(template: str) -> str:
    """What a template asks for that it was not given, as the end of a message."""
    names = jinja2.meta.find_undeclared_variables(environment().parse(template))
    missing = [name for name in WITHHELD if name in names]
    return f" (it asks for {' and '.join(missing)}, which edgemed does not give)" if missing else ""


def limit_cpu(seconds: int) -> None:
    """Let this process run so many seconds more; then the kernel ends it."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit(resource.RLIMIT_CPU, int(usage.ru_utime + usage.ru_stime) + seconds + 1)


def limit(kind: int, value: int) -> None:
    """Set a limit, as far as the limit of whoever started this process allows."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def main(cpu_seconds: int, megabytes: int) -> None:
    """Answer requests until standard input ends."""
    limit(resource.RLIMIT_AS, megabytes << 20)
    limit(resource.RLIMIT_CORE, 0)
    for line in sys.stdin:
        limit_cpu(cpu_seconds)
        request = json.loads(line)
        try:
            answer = {"text": rendered(request["template"], request["values"])}
        except TemplateFault as fault:
            answer = {"error": str(fault)}
        # ASCII, so that no locale stands between the two processes.
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    # A script finds no package of a source tree that is not installed.
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    from edgemed.hardware.child_process import die_with_the_parent

    die_with_the_parent()
    main(int(sys.argv[1]), int(sys.argv[2]))
