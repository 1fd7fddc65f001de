"""Lists at the end of a run why tests were skipped, each reason once with how many it took.

A suite that skips a third of its tests looks as green as one that runs them all. Workers of
pytest-xdist tell nobody of a file that is skipped as a whole, so they hand it over here.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest


def reason_of(report: Any) -> str:
    """The words after 'Skipped: '."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


class SkippedFiles:
    """Files skipped as a whole: {file: reason}."""

    def __init__(self, config: pytest.Config):
        self.config = config
        self.reasons: dict[str, str] = {}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.reasons[report.nodeid] = reason_of(report)

    def pytest_sessionfinish(self) -> None:
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["skipped_files"] = self.reasons

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.reasons |= getattr(node, "workeroutput", {}).get("skipped_files", {})

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        tests = Counter(
            reason_of(report)
            for report in terminalreporter.stats.get("skipped", ())
            if report.nodeid not in self.reasons
        )
        files = Counter(self.reasons.values())
        if not tests and not files:
            return
        terminalreporter.section("skipped, by reason")
        for counts, noun in ((files, "file"), (tests, "test")):
            for reason, count in counts.most_common():
                plural = "" if count == 1 else "s"
                terminalreporter.write_line(f"{count:5} {noun}{plural}: {reason}")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SkippedFiles(config), "skipped_files")
