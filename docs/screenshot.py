"""Takes README's picture of the report: python docs/screenshot.py runs/quickstart/report.html

It is the quickstart's own report in headless Chromium, so the picture is what a reader gets. It is
not taken anew by `make docs`: speeds differ from run to run, so each picture would be another.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PICTURE = Path(__file__).parent / "images" / "report.png"
SIZE = (1280, 1100)


def main(report: Path) -> None:
    """Write docs/images/report.png from a report.html."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        sys.exit("error: no Chromium. Install one (Debian: apt install chromium)")
    PICTURE.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
            f"--window-size={SIZE[0]},{SIZE[1]}",
            f"--screenshot={PICTURE}",
            report.resolve().as_uri(),
        ]
        subprocess.run(command, check=True, capture_output=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
