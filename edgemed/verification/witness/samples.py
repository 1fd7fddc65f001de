"""What both libraries are asked: texts, conversations and images, the same for every checkpoint.

They are what users reported others to have read wrongly: digits, code, blank lines, other scripts,
special tokens inside of a text, photographs that lie on their side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

# kind -> texts
TEXTS: Mapping[str, tuple[str, ...]] = {
    "plain text": (
        "The patient has a fever.",
        "A 54-year-old man comes to the emergency department because of chest pain.",
        "Question: Does aspirin reduce the risk of stroke? Answer:",
        "don't isn't we'll I'm they've",
    ),
    "blanks at the ends": (" fever", "fever ", "  two  blanks  ", ""),
    "digits": (
        "0123456789",
        "3.14159 1,000,000 1/2 12.5 mg/kg q8h 120/80 mmHg 2026-11-29",
        "HbA1c 48mmol/mol, CD4 350",
    ),
    "code": (
        "def bmi(kg, m):\n    return kg / m**2\n",
        'if (x != 0) {\n\t\tprintf("%d\\n", x);\n}',
        "https://example.org/a?b=c&d=%20",
    ),
    "blank lines": ("one\n\ntwo\n\n\nthree", "\n", "\r\nCRLF\r\n", "a \n b\t\n\t\tc"),
    "emoji": ("🙂👍🏽👩‍⚕️ 🇪🇺", "pain 😖 7/10"),
    "Cyrillic": ("Пациент жалуется на боль в груди.",),
    "Arabic": ("يعاني المريض من ألم في الصدر.",),
    "Devanagari": ("रोगी को सीने में दर्द है।",),
    "Han": ("患者有胸痛。血压为120/80。",),
    "accents": ("Größe: 1,80 m, für Ärzte", "cafe\u0301 and caf\u00e9", "ﬁ ½ µg ①"),
}
# Special tokens of the tokenizer that are put into a text, at most.
SPECIAL_TOKENS = 12
# kind -> messages
CONVERSATIONS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "one turn": (("user", "What is the dose of aspirin?"),),
    "three turns": (
        ("user", "What is hypertension?"),
        ("assistant", "High blood pressure."),
        ("user", "How is it treated?\n\nName <two> drugs."),
    ),
    "a system message": (
        ("system", "You are a careful doctor."),
        ("user", "Is 38.5 °C a fever?"),
    ),
}
QUESTION = "What does the image show?"
# The tag of an orientation, and the one of a camera that was turned to the left.
ORIENTATION = 0x0112
TURNED = 6


def special_texts(tokens: Sequence[str]) -> list[str]:
    """Texts that hold special tokens: each between words, behind a blank, and two in a row."""
    texts = []
    for token in tokens[:SPECIAL_TOKENS]:
        texts += [f"before{token}after", f"before {token} after"]
    if tokens:
        texts += [tokens[0], f"{tokens[0]}{tokens[-1]}\n{tokens[0]}"]
    return texts


def write_images(folder: Path) -> dict[str, Path]:
    """Image files as people have them, written into a folder: kind -> file."""
    colours = picture(90, 140)
    files = {
        "a plain image": folder / "plain.png",
        "a small image": folder / "small.png",
        "a rotated photograph (EXIF)": folder / "rotated.jpg",
        "a palette image": folder / "palette.png",
        "a grey image": folder / "grey.png",
    }
    Image.fromarray(colours).save(files["a plain image"])
    Image.fromarray(picture(30, 24)).save(files["a small image"])
    exif = Image.Exif()
    exif[ORIENTATION] = TURNED
    Image.fromarray(colours).save(
        files["a rotated photograph (EXIF)"],
        exif=exif,
        quality=90,
    )
    Image.fromarray(colours).quantize(32).save(files["a palette image"])
    Image.fromarray(colours[..., 1]).save(files["a grey image"])
    return files


def write_deep_image(folder: Path) -> Path:
    """A grey image of 16 bits, as scanners write them, into a folder."""
    file = folder / "deep.png"
    levels = picture(64, 80)[..., 0].astype(np.uint16) * 16
    Image.fromarray(levels).save(file)
    return file


def picture(height: int, width: int) -> np.ndarray:
    """RGB uint8 [height, width, 3]: slopes and edges, so that a turn, a flip, a crop or another
    order of colours changes it.
    """
    rows, columns = np.mgrid[0:height, 0:width]
    colours = np.stack(
        [
            rows * 255 // max(height - 1, 1),
            columns * 255 // max(width - 1, 1),
            ((rows // 7 + columns // 11) % 2) * 200 + 20,
        ],
        axis=-1,
    )
    return colours.astype(np.uint8)


def token_sequence(vocabulary: int, length: int, unusable: frozenset[int]) -> list[int]:
    """Token ids spread over the vocabulary, its last included. unusable: ids that mean something
    else than text, such as the place of an image.
    """
    ids = [
        0,
        vocabulary - 1,
        *((7 + 1009 * n * n + 31 * n) % vocabulary for n in range(8 * length)),
    ]
    usable = [token for token in ids if token not in unusable]
    return usable[:length]


def spread_positions(length: int, farthest: int) -> list[int]:
    """Growing positions from 0 to `farthest`, first one by one, then farther and farther apart:
    rotary positions show in distances alone.
    """
    steps = np.geomspace(1, farthest + 1, length) - 1
    positions: list[int] = []
    for number, step in enumerate(steps):
        positions.append(max(int(step), number))
    return positions
