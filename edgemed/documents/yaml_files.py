"""YAML files (recipes, cards, device files) and the values of --set, read with errors in one line.

Only what JSON could say as well is taken: mappings with texts as keys, lists, texts, numbers, true,
false and null. A date stays a text. So whatever was read can be written into a manifest.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemed.documents.limited_files import read_limited
from edgemed.errors import EdgemedError

if TYPE_CHECKING:
    from yaml import Node, SafeLoader

LARGEST = 1 << 20  # bytes; PyYAML reads about 0.3 MB a second
DEEPEST = 40
MOST_NODES = 200_000  # what aliases stand for counted again at every use
DIGITS = 60  # of a whole number
# PyYAML takes seconds for some thousand brackets in a row.
OPENINGS = re.compile(r"(?:[\[{]\s*){100}")
STANDARD = "tag:yaml.org,2002:"
TAGS = {f"{STANDARD}{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}
MERGE = f"{STANDARD}merge"


def read_yaml_mapping(path: Path, fix: str) -> dict[str, Any]:
    """The mapping in a YAML file. fix: what to do where it cannot be read.

    Raises EdgemedError where the file cannot be read, has more than LARGEST bytes or no mapping,
    and as `parse_yaml` does.
    """
    content = read_limited(path, fix, LARGEST)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EdgemedError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start})",
            "Save it as UTF-8",
        ) from None
    value = parse_yaml(text, str(path), fix)
    if not isinstance(value, dict):
        raise EdgemedError(f"{path} is not a mapping", fix)
    return value


def parse_yaml(text: str, where: str, fix: str = "Correct it") -> Any:
    """The one YAML value in a text. where: names it in messages; fix: what to do otherwise.

    Raises EdgemedError for what is not YAML, a key that is not a text or given twice, a tag of
    another type, a number that is not finite or has more than DIGITS digits, a value that holds
    itself, more than DEEPEST levels and more than MOST_NODES values.
    """
    import yaml

    try:
        if OPENINGS.search(text):
            raise RecursionError
        loader = _loader()(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node)
        return loader.construct_document(node)
    except RecursionError:
        raise EdgemedError(f"{where} is nested deeper than {DEEPEST} levels", fix) from None
    except yaml.MarkedYAMLError as error:
        place = error.problem_mark or error.context_mark
        line = f" in line {place.line + 1}" if place else ""
        reason = " ".join(filter(None, (error.context, error.problem)))
        raise EdgemedError(f"{where} is not valid YAML: {reason}{line}", fix) from None
    except KeyError as error:
        # the constructor of !!bool, in front of another word
        raise EdgemedError(
            f"{where} is not valid YAML: {error} is not true or false", fix
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EdgemedError(f"{where} is not valid YAML: {reason}", fix) from None


@functools.cache
def _loader() -> type[SafeLoader]:
    import yaml

    class Loader(yaml.SafeLoader):
        """SafeLoader to whom a date is a text."""

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return Loader


def _check(root: Node) -> None:
    """Raise ValueError or RecursionError for what `parse_yaml` refuses in the tree of nodes."""
    sizes: dict[int, int] = {}
    above: set[int] = set()

    def size_of(node: Node, depth: int) -> int:
        # A node under an alias is the same object; its size is counted at every use.
        if depth > DEEPEST:
            raise RecursionError
        if id(node) in above:
            raise ValueError(f"a value that holds itself in line {node.start_mark.line + 1}")
        if id(node) not in sizes:
            above.add(id(node))
            total = 1 + sum(size_of(child, depth + 1) for child in _children(node))
            above.remove(id(node))
            sizes[id(node)] = total
            if total > MOST_NODES:
                raise ValueError(f"it stands for more than {MOST_NODES} values")
        return sizes[id(node)]

    size_of(root, 0)


def _children(node: Node) -> Iterable[Node]:
    """The values in a node, once its tag, its keys or its number are found to be allowed."""
    import yaml

    line = node.start_mark.line + 1
    if node.tag not in TAGS:
        raise ValueError(f"tag {node.tag.replace(STANDARD, '!!')} in line {line} is not known here")
    if isinstance(node, yaml.MappingNode):
        _check_keys(node, line)
        return [value for _, value in node.value]
    if isinstance(node, yaml.SequenceNode):
        return node.value
    _check_scalar(node, line)
    return ()


def _check_keys(node: Node, line: int) -> None:
    names = set()
    for key, _ in node.value:
        if key.tag not in (f"{STANDARD}str", MERGE):
            text = key.value if isinstance(key.value, str) else "a list or mapping"
            raise ValueError(f"key {text[:80] or 'null'} in line {line} is not a text")
        if key.value in names:
            raise ValueError(f"key '{key.value[:80]}' is given twice, in line {line}")
        _check_characters(key.value, line)
        names.add(key.value)


def _check_scalar(node: Node, line: int) -> None:
    _check_characters(node.value, line)
    if node.tag == f"{STANDARD}int" and len(node.value) > DIGITS:
        raise ValueError(f"a number of {len(node.value)} digits in line {line}")
    if node.tag == f"{STANDARD}float":
        plain = node.value.replace("_", "").lower()
        words = plain.replace(".inf", "inf").replace(".nan", "nan").split(":")
        if not all(math.isfinite(float(word)) for word in words):
            raise ValueError(f"{node.value[:80]} in line {line} is not a finite number")


def _check_characters(text: str, line: int) -> None:
    # The escape "\\ud800" stands for half a character, which no file can hold.
    half = next((sign for sign in text if "\ud800" <= sign <= "\udfff"), None)
    if half:
        raise ValueError(f"half a character (surrogate {half!a}) in line {line}")


def parse_set(text: str) -> tuple[list[str], Any]:
    """'quantize.bits=8' -> (['quantize', 'bits'], 8); values are read as YAML.

    Raises EdgemedError for another form, and as `parse_yaml` does.
    """
    key, separator, value = text.partition("=")
    keys = key.strip().split(".")
    if not separator or not all(keys):
        raise EdgemedError(
            f"--set {text}: not of the form key.key=value", "For example: --set quantize.bits=8"
        )
    return keys, parse_yaml(value, f"--set {text}: the value")
