"""The report in a real browser: nothing in its console, nothing fetched, nothing that sticks out,
in light and dark, on a phone and on paper.

Chromium is driven by its command line alone. To look at the pictures: EDGEMED_PICTURES=DIR pytest
tests/end_to_end/test_report_browser.py.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import struct
import subprocess
import threading
import zlib
from pathlib import Path

import pytest
from report_documents import ORIN, TASKS, document, records

from edgemed.reporting.report import page, render
from edgemed.reporting.view_model import Run

CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
        if (found := shutil.which(name))
    ),
    None,
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no Chromium on this machine (Debian: apt install chromium)"
    ),
]
# Asked by the page itself once it is laid out; put into a copy of the page, which has no script of
# its own.
PROBE = """<script>addEventListener("load", () => {
  const out = [], wide = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > wide) out.push("the page is " + document.documentElement.scrollWidth + " wide on a screen of " + wide);
  for (const svg of document.querySelectorAll("svg")) {
    const box = svg.viewBox.baseVal;
    for (const text of svg.querySelectorAll("text")) {
      const t = text.getBBox();
      if (t.x < -2 || t.y < -2 || t.x + t.width > box.width + 2 || t.y + t.height > box.height + 2) out.push("a label leaves its chart: " + text.textContent);
    }
  }
  for (const cell of document.querySelectorAll(".headline div, .answers td, dd"))
    if (cell.scrollWidth > cell.clientWidth + 1) out.push("cut off: " + cell.textContent.trim().slice(0, 60));
  parent.postMessage({wide, out}, "*");
});</script>"""
# A window of Chromium is never narrower than 500 pixels; a frame in it is.
FRAME = """<!doctype html><html><body><script>addEventListener("message", e => { document.documentElement.dataset.probe = JSON.stringify(e.data); });</script>
<iframe src="PAGE" style="width: WIDTHpx; height: 900px; border: 0"></iframe></body></html>"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    run = document()
    small = document(
        tasks=(("medqa", 100, 4, 0.4, ()),),
        strategies=("zero-shot",),
        machine=ORIN,
        model="Other",
        title="On the device",
    )
    bare = document(tasks=(), strategies=("zero-shot",), device=None)
    bare["source"]["random_weights"] = True
    for engine in bare["engines"]:
        engine.update(
            verify=None,
            name=f"{engine['name']}-with-a-name-nobody-would-choose-but-somebody-did",
            records=records(40.0, engine["bytes"], engine["manifest"]["key"]),
        )
    made = {
        "run": render(run),
        "comparison": page([Run(run, "desk"), Run(small, "orin")], "Comparison: desk, orin"),
        "random": render(bare),
    }
    for name, text in made.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
        (folder / f"{name}.probe.html").write_text(
            text.replace("</body>", f"{PROBE}</body>"), encoding="utf-8"
        )
    return folder


def browse(file: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--no-first-run",
        "--hide-scrollbars",
        "--disable-dev-shm-usage",
        f"--user-data-dir={folder / 'profile'}",
        "--enable-logging=stderr",
        *options,
        file.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def console(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def fetched(log: Path) -> set[str]:
    """Every address the browser asked for, of the page or of anything else, by its own network
    log.
    """
    return {
        url
        for url in re.findall(r'"url":"([^"]+)"', log.read_text(errors="replace"))
        if url.startswith(("http:", "https:", "ws:", "ftp:"))
    }


def colours(picture: Path) -> tuple[int, int, tuple[int, int, int], int]:
    """(width, height, colour of the upper left corner, number of distinct rows) of a PNG of 8-bit
    RGB or RGBA.
    """
    data = picture.read_bytes()
    at = 8
    packed = b""
    width, height, depth, kind = struct.unpack(">IIBB", data[16:26])
    assert depth == 8
    assert kind in (2, 6)
    while at < len(data):
        length, name = struct.unpack(">I4s", data[at : at + 8])
        packed += data[at + 8 : at + 8 + length] if name == b"IDAT" else b""
        at += 12 + length
    raw = zlib.decompress(packed)
    step = width * (3 if kind == 2 else 4) + 1
    return (
        width,
        height,
        tuple(raw[1:4]),
        len({raw[y * step : (y + 1) * step] for y in range(height)}),
    )


@pytest.mark.parametrize("name", ["run", "comparison", "random"])
@pytest.mark.parametrize("width", [1280, 800, 390])
def test_nothing_in_the_console_and_nothing_sticks_out(pages, tmp_path, name, width):
    frame = pages / f"{name}-{width}.html"
    frame.write_text(
        FRAME.replace("PAGE", f"{name}.probe.html").replace("WIDTH", str(width)), encoding="utf-8"
    )
    done = browse(
        frame, tmp_path, "--window-size=1400,1000", "--virtual-time-budget=4000", "--dump-dom"
    )
    probe = json.loads(re.search(r'data-probe="([^"]*)"', done.stdout)[1].replace("&quot;", '"'))
    assert not console(done)
    assert probe["wide"] == width
    assert not probe["out"]


@pytest.mark.parametrize("name", ["run", "comparison", "random"])
def test_nothing_is_fetched(pages, tmp_path, name):
    log = tmp_path / "net.json"
    browse(
        pages / f"{name}.html",
        tmp_path,
        f"--log-net-log={log}",
        "--screenshot=" + str(tmp_path / "x.png"),
    )
    # The browser's own dictionary and updates, which it asks for whatever page is open.
    assert not {
        url
        for url in fetched(log)
        if not re.match(r"https?://[\w.]*(google|gvt1|gstatic|googleapis)\.com/", url)
    }


def test_a_page_that_fetches_and_complains_is_caught(pages, tmp_path):
    """The two tests above can fail: here is a page that breaks both rules."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    file = tmp_path / "bad.html"
    log = tmp_path / "net.json"
    address = f"http://127.0.0.1:{server.server_address[1]}/pixel.png"
    file.write_text(
        '<body><p style="width: 3000px">wide</p><script>console.error("bad")</script><img'
        f' src="{address}">{PROBE.replace("parent.postMessage", "document.title = JSON.stringify")}</body>'
    )
    try:
        done = browse(file, tmp_path, f"--log-net-log={log}", "--dump-dom")
    finally:
        server.shutdown()
    assert console(done)
    assert address in fetched(log)
    assert "the page is 3" in done.stdout


@pytest.mark.parametrize(
    ("mode", "option", "paper"), [("light", 1, (0xFB, 0xFA, 0xF7)), ("dark", 0, (0x14, 0x18, 0x1A))]
)
@pytest.mark.parametrize(("screen", "size"), [("desk", "1280,2400"), ("phone", "390,2400")])
def test_pictures(pages, tmp_path, mode, option, paper, screen, size):
    kept = Path(os.environ.get("EDGEMED_PICTURES", tmp_path))
    kept.mkdir(exist_ok=True)
    for name in ("run", "comparison"):
        picture = kept / f"{name}-{screen}-{mode}.png"
        done = browse(
            pages / f"{name}.html",
            tmp_path,
            f"--window-size={size}",
            f"--blink-settings=preferredColorScheme={option}",
            f"--screenshot={picture}",
        )
        width, height, corner, rows = colours(picture)
        assert (width, height) == tuple(map(int, size.split(",")))
        assert corner == paper
        assert rows > 500
        assert not console(done)


def test_paper(pages, tmp_path):
    kept = Path(os.environ.get("EDGEMED_PICTURES", tmp_path))
    kept.mkdir(exist_ok=True)
    file = kept / "run.pdf"
    browse(pages / "run.html", tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={file}")
    data = file.read_bytes()
    sheets = [
        tuple(map(float, box.split()[2:])) for box in re.findall(rb"/MediaBox \[([\d. ]+)\]", data)
    ]
    assert data.startswith(b"%PDF"), "landscape sheets"
    assert 5 < len(sheets) < 40, "landscape sheets"
    assert all(w > h for w, h in sheets), "landscape sheets"


def test_paper_unfolds_the_hashes(tmp_path):
    """What is folded on a screen is written out on paper, where nothing can be clicked."""
    run = document(tasks=TASKS[:1], strategies=("zero-shot",))
    file = tmp_path / "page.html"
    sizes = {}
    for name, text in {
        "folded": render(run).replace('<details class="print">', "<details>"),
        "printed": render(run),
    }.items():
        file.write_text(text, encoding="utf-8")
        browse(file, tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={tmp_path / name}.pdf")
        sizes[name] = (tmp_path / f"{name}.pdf").stat().st_size
    assert sizes["printed"] > 1.02 * sizes["folded"]
