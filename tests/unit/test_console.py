"""Tables for people: they fit the terminal, and no column is lost."""

import pytest
from rich.cells import cell_len

from edgemed.console import columns_of, fitting, plain_text, table

ROW = {
    "task": "pubmedqa_conclusion",
    "model": "source (float32)",
    "strategy": "self-consistency-5",
    "n": 500,
    "accuracy": "0.7120",
    "95 %": "0.671-0.750",
    "majority": 0.552,
    "cut": 0,
    "s/question": 0.1234,
    "lost": 12,
    "gained": 7,
}


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_a_wide_table_becomes_several(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    rows = [ROW, {**ROW, "model": "onnx-int4"}]
    table(rows)
    lines = capsys.readouterr().out.splitlines()
    assert max(cell_len(line.rstrip()) for line in lines) <= width
    for word in (*ROW, "pubmedqa_conclusion", "source (float32)", "0.671-0.750"):
        assert any(word in line for line in lines), word
    parts = fitting(rows, width)
    assert (len(parts) == 1) == (width == 200)
    assert {name for part in parts for name in part[0]} == set(ROW)
    assert all(list(part[0])[:2] == ["task", "model"] for part in parts)


def test_columns_of_later_rows_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"engine": "a"}, {"engine": "b", "tok/s": 4.0}]
    assert columns_of(rows) == ["engine", "tok/s"]
    table(rows)
    assert "tok/s" in capsys.readouterr().out


def test_brackets_in_names_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    from edgemed.console import say

    say(f"merge: [dim]{plain_text('runs/[red]x[/y]')}[/dim]")
    assert "runs/[red]x[/y]" in capsys.readouterr().err
    table([{"[red]a[/b]": "[c]"}])
    assert "[red]a[/b]" in capsys.readouterr().out
