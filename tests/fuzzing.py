"""What the fuzz campaign does to a document, and what must not happen when it is then opened.

A document is taken as a tree of JSON values, as bytes, or as both. One to three changes are made to
it. Whatever comes out, the reader takes it or raises EdgemedError with one line: no other
exception, no hang, no memory beyond a limit and no file left behind. An abort ends the tests.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from edgemed.errors import EdgemedError

SECONDS = 20  # a case that takes longer hangs
MEMORY = 4 << 30  # bytes beyond what the tests have before a case
LONGEST_LINE = 3000  # characters of a message

# Texts that stand for what `json.dumps` does not write.
RAW = {
    '"@deep@"': "[" * 10_000 + "]" * 10_000,
    '"@nested@"': "[" * 200 + "]" * 200,
    '"@objects@"': '{"a": ' * 5_000 + "1" + "}" * 5_000,
    '"@digits@"': "9" * 5_000,
    '"@many digits@"': "1" + "0" * 200_000,
    '"@nan@"': "NaN",
    '"@infinity@"': "-Infinity",
    '"@overflow@"': "1e999",
    '"@half@"': '"\\ud800"',
}
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**63),
    10**30,
    0.5,
    -0.0,
    1e-300,
    1e300,
    "",
    " ",
    "0",
    "x",
    "nan",
    "..",
    "../../x",
    "/etc/passwd",
    "C:\\x",
    "a\x00b",
    "a\nb\x1b[31m",
    "\u202e\u2028",
    "ü" * 300,
    "x" * 5_000,
    "{{ 7 * 7 }}",
    "%s%n",
    [],
    {},
    [None],
    [[]],
    [1, "x", None],
    ["x"] * 2_000,
    {"": None},
    {"a": {"b": [1]}},
    *(text.strip('"') for text in RAW),
)
# What a YAML parser does besides.
YAML = (
    "a: &a [*a]\n",
    "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    + "".join(
        f"{name}: &{name} [{','.join(['*' + before] * 10)}]\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "!!python/object/apply:os.system ['true']\n",
    "a: !!python/name:os.system\n",
    "a: !!binary AAAA\n",
    "a: !!bool perhaps\n",
    "a: !!set {x}\n",
    "? [a, b]\n: c\n",
    "1: a\n",
    "null: a\n",
    "~: a\n",
    "true: a\n",
    "a: 1\na: 2\n",
    "<<: 5\n",
    "a: 2020-13-45\n",
    "a: 1:99:99\n",
    "a: .nan\n",
    "a: 0x" + "f" * 6_000 + "\n",
    "a: " + "9" * 5_000 + "\n",
    'a: "\\ud800"\n',
    "--- 1\n--- 2\n",
    "- a\n- b\n",
    "just a text\n",
    "%YAML 9.9\n---\na: 1\n",
    "a: |\n" + "  x\n" * 10,
    "[" * 10_000,
    "{a: " * 2_000,
    "\t- a\n",
    "",
    "null\n",
)


@dataclass(frozen=True)
class Kind:
    """One kind of document. file: which is changed, below the folder that `make` fills.

    open: reads the folder as a user's command would, once the file was changed; it gets the folder
    and an empty one for what it writes. tree: 'json', 'jsonl' (the tree is the list of its rows),
    'yaml' (changed as JSON, which YAML contains) or '' for bytes only. cases: how many in CI. slow:
    seconds that one case may take instead of SECONDS.
    """

    name: str
    file: str
    make: Callable[[Path], object]
    open: Callable[[Path, Path], object]
    tree: str = ""
    cases: int = 100


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in a tree, its root first."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value[:50]):
            yield from places(inner, (*path, number))


def changed_tree(draw: Callable[..., Any], tree: Any) -> Any:
    """The tree with one value replaced, left out, added, renamed or taken from elsewhere in it."""
    path = draw(st.sampled_from(sorted(places(tree), key=lambda each: (len(each), str(each)))))
    action = draw(
        st.sampled_from(("replace", "replace", "replace", "delete", "add", "rename", "copy"))
    )
    odd = copy.deepcopy(draw(st.sampled_from(ODD)))
    if not path:
        if action == "add" and isinstance(tree, dict):
            return {**tree, draw(st.sampled_from(("extra", "", "..", "schema", "é"))): odd}
        return odd
    tree = copy.deepcopy(tree)
    holder = tree
    for step in path[:-1]:
        holder = holder[step]
    last = path[-1]
    if action == "delete":
        del holder[last]
    elif action == "add" and isinstance(holder[last], dict):
        holder[last]["extra"] = odd
    elif action == "add" and isinstance(holder[last], list):
        holder[last].append(odd)
    elif action == "rename" and isinstance(holder, dict):
        holder[f"{last}x"] = holder.pop(last)
    elif action == "copy":
        other = draw(st.sampled_from(sorted(places(tree), key=lambda each: (len(each), str(each)))))
        value = tree
        for step in other:
            value = value[step]
        holder[last] = copy.deepcopy(value)
    else:
        holder[last] = odd
    return tree


def text_of(tree: Any, form: str) -> str:
    """A tree as the text of a file."""
    if form == "jsonl" and isinstance(tree, list):
        text = "".join(json.dumps(row) + "\n" for row in tree)
    else:
        text = json.dumps(tree, indent=1)
    for sign, raw in RAW.items():
        text = text.replace(sign, raw)
    return text


def changed_bytes(draw: Callable[..., Any], content: bytes) -> bytes:
    """Bytes cut, lengthened, flipped, overwritten or written in another encoding."""
    place = draw(st.integers(0, max(0, len(content) - 1)))
    early = min(place, draw(st.sampled_from((16, 64, 4096, 1 << 30))))
    action = draw(
        st.sampled_from(
            ("cut", "append", "flip", "flip", "overwrite", "overwrite", "remove", "encode")
        )
    )
    if action == "cut":
        return content[:place]
    if action == "append":
        return content + draw(st.sampled_from((b"\x00", b"\n", b" ", b"{}", b"x" * 1000)))
    if action == "flip":
        changed = bytearray(content or b"\x00")
        changed[early % len(changed)] ^= 1 << draw(st.integers(0, 7))
        return bytes(changed)
    if action == "overwrite":
        number = draw(st.sampled_from((0, 1, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1, 2**40)))
        width = draw(st.sampled_from((4, 8)))
        return (
            content[:early]
            + (number % 256**width).to_bytes(width, "little")
            + content[early + width :]
        )
    if action == "remove":
        return content[:early] + content[early + draw(st.sampled_from((1, 4, 64))) :]
    return draw(st.sampled_from(ENCODINGS))(content)


ENCODINGS: tuple[Callable[[bytes], bytes], ...] = (
    lambda content: b"\xef\xbb\xbf" + content,
    lambda content: content.decode("latin-1").encode("utf-16"),
    lambda content: content.decode("latin-1").encode("utf-32"),
    lambda content: content.replace(b"e", b"\xe9", 1),
    lambda content: content.replace(b"\n", b"\r\n"),
    lambda content: content.replace(b"\n", b"\x00"),
    lambda content: b"",
    lambda content: b"\x00" * 100,
    lambda content: b"\xff" * 100,
    lambda content: content * 3,
)


@st.composite
def changed_content(draw: Callable[..., Any], kind: Kind, content: bytes) -> bytes:
    """The content of a file of this kind after one to three changes."""
    if kind.tree == "yaml" and draw(st.integers(0, 4)) == 0:
        return draw(st.sampled_from(YAML)).encode()
    for _ in range(draw(st.integers(1, 3))):
        if kind.tree and draw(st.integers(0, 3)):
            try:
                tree = parsed(content, kind.tree)
            except (ValueError, RecursionError):
                break
            content = text_of(changed_tree(draw, tree), kind.tree).encode("utf-8", "surrogatepass")
        else:
            content = changed_bytes(draw, content)
    return content


def parsed(content: bytes, form: str) -> Any:
    """The tree of a file that was written as JSON."""
    if form == "jsonl":
        return [json.loads(line) for line in content.decode().split("\n") if line]
    return json.loads(content)


@contextmanager
def limited() -> Iterator[None]:
    """Ends what takes too long with TimeoutError, and what takes too much with MemoryError."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"the case takes more than {SECONDS} s")

    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def names(folder: Path) -> list[str]:
    """Everything below a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def check_case(kind: Kind, folder: Path, out: Path, content: bytes) -> str:
    """Write the content in the file's place, open the document, and put everything back; the
    message it was refused with, '' where it was taken. Raises AssertionError for a fault.
    """
    file = folder / kind.file
    before = file.read_bytes()
    there = names(folder)
    refusal = ""
    try:
        file.write_bytes(content)
        with limited():
            kind.open(folder, out)
    except EdgemedError as error:
        refusal = str(error)
        assert refusal.isprintable(), f"not one printable line: {refusal!r}"
        assert len(refusal) <= LONGEST_LINE, f"{len(refusal)} characters: {refusal}"
        left = names(out)
        assert not left, f"left behind after '{refusal}': {left}"
    finally:
        file.write_bytes(before)
        extra = [name for name in names(folder) if name not in there]
        for name in sorted([*extra, *names(out)], reverse=True):
            for place in (folder / name, out / name):
                if place.is_dir():
                    place.rmdir()
                elif place.exists():
                    os.unlink(place)
    assert not extra, f"left beside the document: {extra}"
    return refusal
