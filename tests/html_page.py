"""What a reader sees of a page of the report, and what a browser would do with it."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Balanced(HTMLParser):
    """Checks nesting, collects text and everything a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.open = []
        self.fetched = []
        self.text = []
        self.svgs = []
        self.targets = set()
        self.ids = set()

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.take(tag, attrs)

    def handle_startendtag(self, tag, attrs):
        self.take(tag, attrs)

    def take(self, tag, attrs):
        self.fetched += [
            v
            for k, v in attrs
            if k in ("src", "srcset", "data", "poster", "action", "xlink:href")
            or (k == "href" and not v.startswith("#"))
        ]
        assert tag not in (
            "script",
            "link",
            "iframe",
            "object",
            "img",
            "use",
            "foreignobject",
        ), f"<{tag}> in a page that must be self-contained"
        assert not [k for k, _ in attrs if k.startswith("on")]
        self.targets |= {v[1:] for k, v in attrs if k == "href"}
        self.ids |= {v for k, v in attrs if k == "id"}
        if tag == "svg" and ("aria-hidden", "true") not in attrs:
            self.svgs.append([])
        elif self.svgs and tag in ("title", "desc"):
            self.svgs[-1].append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes {self.open[-3:]}"
        assert self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open[-1:] != ["style"] and "svg" not in self.open:
            self.text.append(data)


def read(page):
    """The visible text of a page, charts left out, after checking that it is well formed and asks
    for nothing from anywhere.
    """
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert not parser.open
    assert not parser.fetched
    assert not re.search(r"url\(|@import|https?://", page)
    assert parser.targets <= parser.ids, "a link leads nowhere"
    # What a screen reader says of each chart: a name and what it shows.
    assert all(found[:2] == ["title", "desc"] for found in parser.svgs)
    return re.sub(r"\s+", " ", " ".join(parser.text))
