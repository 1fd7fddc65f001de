"""Calibration cards: made from a user's own text, refused where they look like data of patients,
and held against every evaluation.
"""

import hashlib
import json

import pytest
import yaml
from typer.testing import CliRunner

from edgemed import plugins
from edgemed.cli.main import app
from edgemed.data.calibration_cards import Source, make_card, traces_of, words
from edgemed.data.text_sets import calibration_sequences, card_names, read_card, texts
from edgemed.errors import EdgemedError
from edgemed.evaluation.contamination import GRAM, check_contamination, every_task, grams, overlap
from edgemed.evaluation.task import questions
from edgemed.models.tokenizer import open_tokenizer

MODEL = plugins.shared("recipes") / "quickstart" / "model"
NOTES = [
    f"The wound of case {i} was cleaned and closed with {i % 7 + 2} stitches, and it healed within"
    f" {i % 11 + 4} days without any fever."
    for i in range(40)
]
SOURCE = Source("notes", "made up for this test", "CC0-1.0")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_card_from_own_text(tmp_path):
    file = write(tmp_path / "own.jsonl", [{"text": text} for text in [*NOTES, NOTES[0].upper()]])
    card = make_card(file, tmp_path / "card", SOURCE, 0.25, tokenizer=open_tokenizer(MODEL, 4096))
    split = {name: texts(str(tmp_path / "card"), name) for name in ("calibration", "heldout")}
    assert len(split["calibration"]) + len(split["heldout"]) == 40
    assert not set(split["calibration"]) & set(split["heldout"])
    assert 4 <= len(split["heldout"]) <= 17
    assert card["made_from"]["repeated"] == 1
    tokenizer = open_tokenizer(MODEL, 4096)
    for name, found in split.items():
        facts = card["files"][name]
        assert (
            facts["sha256"]
            == hashlib.sha256((tmp_path / "card" / facts["file"]).read_bytes()).hexdigest()
        )
        assert facts["n"] == len(found)
        assert facts["tokens"] == sum(len(tokenizer.encode(text).ids) for text in found)
    assert yaml.safe_load((tmp_path / "card" / "card.yaml").read_text()) == card
    assert read_card(str(tmp_path / "card")).digest("heldout")
    # More texts do not move those that were there before.
    more = make_card(
        write(
            tmp_path / "more.jsonl",
            [{"text": text} for text in [*NOTES, *(n.replace("wound", "cut") for n in NOTES)]],
        ),
        tmp_path / "more",
        SOURCE,
        0.25,
    )
    assert more["files"]["heldout"]["n"] > len(split["heldout"])
    assert set(split["heldout"]) <= set(texts(str(tmp_path / "more"), "heldout"))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Write to jane.doe@clinic.example.org for the results.", "e-mail address"),
        ("Her daughter can be reached at (415) 555-0134 after six.", "phone number"),
        ("Call +34 91 555 01 34 in the morning.", "phone number"),
        ("SSN 123-45-6789 on file.", "social security number"),
        ("MRN: 00482913, admitted for observation.", "record number"),
        ("Patient ID AB-1029384 was scanned twice.", "record number"),
        ("DOB 03/14/1956, lives alone.", "date of birth"),
        ("Mrs. Alvarez was seen on 12 March 2021 with a cough.", "name and date"),
        ("Patient Maria Keller returned on 2021-03-12.", "name and date"),
        ("(0010,0010) PN [DOE^JANE]", "DICOM tag"),
    ],
)
def test_traces_of_patients_are_refused(tmp_path, text, kind):
    assert (41, kind) in list(traces_of([*NOTES, text]))
    file = write(tmp_path / "own.jsonl", [{"text": t} for t in [*NOTES, text]])
    with pytest.raises(EdgemedError, match=f"text 41: {kind}.*--allow-traces"):
        make_card(file, tmp_path / "card", SOURCE)
    assert not (tmp_path / "card").exists()
    assert (
        "--allow-traces"
        in make_card(file, tmp_path / "card", SOURCE, allow_traces=True)["contains_phi"]
    )


@pytest.mark.parametrize(
    "text",
    [
        "Between 1990-2000 the dose was 10-20 mg (p = 0.001; 95% CI 1.2-3.4).",
        "Type 2 diabetes (ICD-10 E11.9) in 123 of 456 patients.",
        "The trial ran from May 2001 to June 2004.",
        "Dr. Kumar sees her yearly.",
        "Patient Health Questionnaire scores fell.",
        "Grant 2004-123-4567-89 paid for it.",
    ],
)
def test_ordinary_medical_text_is_not(text):
    assert not list(traces_of([text]))


def test_bad_input(tmp_path):
    def refused(match, file, **options):
        with pytest.raises(EdgemedError, match=match):
            make_card(file, tmp_path / "card", SOURCE, **options)

    refused("does not exist", tmp_path / "none.jsonl")
    (tmp_path / "image.txt").write_bytes(bytes(128) + b"DICM" + bytes(64))
    refused("is a DICOM file", tmp_path / "image.txt")
    refused(
        "holds DICOM fields .PatientName.",
        write(tmp_path / "tags.jsonl", [{"text": NOTES[0], "PatientName": "x"}]),
    )
    refused("has no 'text'", write(tmp_path / "rows.jsonl", [{"words": "x"}]))
    refused("too few for a validation split", write(tmp_path / "one.jsonl", [{"text": NOTES[0]}]))
    refused(
        "not a share between",
        write(tmp_path / "own.jsonl", [{"text": text} for text in NOTES]),
        heldout=1.0,
    )
    (tmp_path / "card").mkdir()
    refused("card exists", tmp_path / "own.jsonl")
    chinese = write(tmp_path / "zh.jsonl", [{"text": "患者因发热和咳嗽三天来诊。" * 20}])
    with pytest.raises(EdgemedError, match="does not cover the language"):
        calibration_sequences(str(chinese), open_tokenizer(MODEL, 4096), 2, 16)
    # Four of its five languages would hide the fifth in a mean over all.
    with pytest.raises(EdgemedError, match="bytes of 'ja', so it does not cover the language"):
        calibration_sequences("human-rights", open_tokenizer(MODEL, 4096), 2, 16)


def test_conversations_stay_conversations(tmp_path):
    talk = [
        {
            "messages": [
                {"role": "user", "content": text},
                {"role": "assistant", "content": "Yes."},
            ],
            "language": "en",
        }
        for text in NOTES
    ]
    make_card(write(tmp_path / "talk.jsonl", talk), tmp_path / "card", SOURCE)
    rows = [
        json.loads(line)
        for split in ("calibration", "heldout")
        for line in (tmp_path / "card" / f"{split}.jsonl").read_text().splitlines()
    ]
    assert sorted((row["messages"][0]["content"], row["language"]) for row in rows) == sorted(
        (text, "en") for text in set(NOTES)
    )
    assert not any("text" in row for row in rows)
    with pytest.raises(EdgemedError, match="phone number"):
        make_card(
            write(
                tmp_path / "traces.jsonl",
                [{"messages": [{"role": "user", "content": "Call +44 20 7946 0958"}]}, *talk],
            ),
            tmp_path / "other",
            SOURCE,
        )


def test_the_rule_of_overlap():
    assert GRAM == 13
    assert words("L'été, 3.5 mg!") == ["l", "été", "3", "5", "mg"]
    assert words("患者 A") == ["患", "者", "a"]
    text = " ".join(f"w{i}" for i in range(14))
    assert grams(text) == {
        " ".join(f"w{i}" for i in range(13)),
        " ".join(f"w{i}" for i in range(1, 14)),
    }
    assert grams("one two three four five six seven")
    assert not grams("one two three four five six")


def test_overlap_is_found(tmp_path):
    question = questions("medqa").examples[3]
    beginning = " ".join(question.question.split()[: GRAM + 2])
    card = read_card(
        str(
            write(
                tmp_path / "leak.jsonl", [{"text": f"As they say: {beginning.upper()} and so on"}]
            )
        )
    )
    found = overlap(card, ["calibration"], ["medqa", "medmcqa"])
    assert [(row["task"], row["overlapping"]) for row in found] == [
        ("medqa", 1),
        ("medmcqa", 0),
    ]
    assert found[0]["first"] == [question.id]
    shorter = " ".join(question.question.split()[: GRAM - 3])
    card = read_card(
        str(write(tmp_path / "short.jsonl", [{"text": f"As they say: {shorter} and so on"}]))
    )
    assert not overlap(card, ["calibration"], ["medqa"])[0]["overlapping"]


@pytest.mark.parametrize("name", card_names())
def test_no_shipped_card_calibrates_on_an_evaluation(name):
    """The rule: no question, option or reference answer of any shipped sample shares 13 words in a
    row with calibration text.
    """
    found = overlap(read_card(name), ["calibration"], every_task())
    assert {row["task"].split("/")[0] for row in found} == set(plugins.names("tasks"))
    assert not [row for row in found if row["overlapping"]]


def test_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "own.jsonl", [{"text": text} for text in NOTES])
    command = [
        "calibrate",
        "make",
        "--from",
        "own.jsonl",
        "--name",
        "notes",
        "--source",
        "us",
        "--licence",
        "internal",
    ]
    made = CliRunner().invoke(app, command)
    assert made.exit_code == 0
    assert (tmp_path / "calibration" / "notes" / "card.yaml").is_file()
    clean = CliRunner().invoke(
        app, ["calibrate", "check", "calibration/notes", "--task", "medqa", "--json"]
    )
    assert clean.exit_code == 0
    assert json.loads(clean.stdout)["overlap"][0]["overlapping"] == 0
    row = questions("pubmedqa").examples[0].question
    write(tmp_path / "leak.jsonl", [{"text": row}])
    leaking = CliRunner().invoke(app, ["calibrate", "check", "leak.jsonl", "--task", "pubmedqa"])
    assert leaking.exit_code == 1
    assert check_contamination("leak.jsonl", ["pubmedqa"])["overlap"][0]["overlapping"] == 1
