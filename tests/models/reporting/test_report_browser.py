"""The report in a real browser: headless Chromium, from a file, with no way to any host."""

import base64
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import tempfile

import numpy as np
import pytest
from PIL import Image
from report_cases import make_report, write_results

from models.reporting.figures import DARK, DARK_GROUND, LIGHT_GROUND
from models.reporting.report import write_report
from models.reporting.systems import Palette

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WIDTHS = (390, 1280)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt-get install chromium)")

# Tells the page around it what a reader at this width gets, first with all folded, then with all open. Sound is waited for: a
# clip that does not decode has no length.
PROBE = """
addEventListener("load", async () => {
  const box = (element) => {
    const r = element.getBoundingClientRect();
    return [r.left + scrollX, r.top + scrollY, r.right + scrollX, r.bottom + scrollY];
  };
  const sound = (audio) => new Promise((done) => {
    const tell = () => done(audio.duration);
    if (audio.error) done(0);
    if (audio.readyState >= 1) tell();
    audio.addEventListener("loadedmetadata", tell);
    audio.addEventListener("error", () => done(0));
  });
  const root = document.documentElement;
  const folded = root.scrollHeight;
  const boxes = [...document.querySelectorAll("#headline li, #headline table, #headline figure")].map(box);
  for (const closed of document.querySelectorAll("details")) closed.open = true;
  const found = {width: innerWidth, needs: root.scrollWidth, height: root.scrollHeight, folded, headline: boxes,
                 tables: [...document.querySelectorAll("table")].map((t) => t.scrollWidth),
                 images: [...document.images].map((i) => i.naturalWidth),
                 sounds: await Promise.all([...document.querySelectorAll("audio")].map(sound)),
                 boxes: Object.fromEntries(["table", "figure img", "audio"].map((s) => [s, document.querySelector(s)])
                                           .filter(([, e]) => e).map(([s, e]) => [s, box(e)]))};
  const header = document.querySelector("#headline table thead th:nth-child(4)");
  if (header) {
    const table = header.closest("table");
    const column = () => [...table.tBodies[0].rows].map((row) => row.cells[3].dataset.value);
    found.orders = [column()];
    for (let n = 0; n < 2; n++) { header.querySelector("button").click(); found.orders.push(column()); }
    found.sorted = header.getAttribute("aria-sort");
  }
  parent.postMessage(JSON.stringify(found), "*");
});
"""


def chromium(page, *options):
    """Show a file; returns (DOM after load, console messages, addresses that pages asked for)."""
    with tempfile.TemporaryDirectory() as folder:
        log = os.path.join(folder, "net.json")
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
            # The browser's own calls home: nowhere to go.
            "--no-proxy-server", "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={os.path.join(folder, 'profile')}", "--enable-logging=stderr", f"--log-net-log={log}",
            "--virtual-time-budget=5000", *options, "--dump-dom", page.as_uri(),
        ]  # fmt: skip
        os.mkdir(os.path.join(folder, "profile"))
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        with open(log, encoding="utf-8") as file:
            events = json.load(file)
    start = events["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    started = [e["params"] for e in events["events"] if e["type"] == start and "url" in e.get("params", {})]
    # What the browser asks for itself has no origin.
    asked = [p["url"] for p in started if p.get("initiator") != "not an origin"]
    return done.stdout, re.findall(r":CONSOLE[:(]\d+\)?\] (.*)", done.stderr), asked


def measure(page):
    """What `PROBE` says at each of WIDTHS. A window is 500 pixels wide at least, so the page is put into frames."""
    text = page.read_text()
    digest = base64.b64encode(hashlib.sha256(PROBE.encode()).digest()).decode()
    text = text.replace("script-src '", f"script-src 'sha256-{digest}' '", 1)
    text = text.replace("</body>", f"<script>{PROBE}</script></body>")
    probed, around = page.with_name("probed.html"), page.with_name("around.html")
    probed.write_text(text)
    frames = "".join(f'<iframe src="{probed.name}" style="width:{w}px;height:900px;border:0"></iframe>' for w in WIDTHS)
    script = 'addEventListener("message", (e) => document.body.append(`PROBED${e.data}DEBORP`))'
    around.write_text(f"<!doctype html><body>{frames}<script>{script}</script></body>")
    dom, _, _ = chromium(around)
    found = [json.loads(html.unescape(m)) for m in re.findall(r"PROBED(\{.*?\})DEBORP", dom)]
    assert sorted(f["width"] for f in found) == sorted(WIDTHS)
    return {f["width"]: f for f in found}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    report = make_report(folder)
    report.results = write_results(folder / "results")
    return write_report(folder / "r.html", report)


@pytest.fixture(scope="module")
def measured(page):
    return measure(page)


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_screen(measured, width):
    assert measured[width]["needs"] <= width


def test_the_headline_is_on_the_first_screens(measured):
    found = measured[1280]
    verdicts, table, figure = found["headline"][:-2], *found["headline"][-2:]
    assert verdicts and table[3] < 1000 and figure[3] < 1000 and found["folded"] < 2000 < found["height"]
    assert measured[390]["folded"] < 4000


def test_no_table_is_wider_than_a_wide_screen(measured):
    assert max(measured[1280]["tables"]) <= 1280


def test_figures_and_clips_decode(measured):
    found = measured[1280]
    assert len(found["images"]) == 10 and all(found["images"])
    assert found["sounds"] == pytest.approx([0.5] * 4, abs=0.01)


def test_a_table_sorts_by_numbers_both_ways(measured):
    before, up, down = ([float(text) for text in order] for order in measured[1280]["orders"])
    assert before != up and up == sorted(before) and down == up[::-1]
    assert measured[1280]["sorted"] == "descending"


def pixels(colour):
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_seen(page, measured, tmp_path, scheme):
    """Table, figure and player are there, in the colours of the reader's scheme; no message, no request."""
    height = measured[1280]["height"]
    shot, opened = tmp_path / "shot.png", tmp_path / "opened.html"
    opened.write_text(page.read_text().replace("<details", "<details open"))
    _, console, asked = chromium(
        opened, f"--screenshot={shot}", f"--window-size=1280,{height}",
        f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
    )  # fmt: skip
    assert console == [] and asked == []
    image = np.asarray(Image.open(shot).convert("RGB"), dtype=np.int16)
    assert image.shape[:2] == (height, 1280)
    ground = pixels(DARK_GROUND if scheme == "dark" else LIGHT_GROUND)
    regions = {}
    for name, (left, top, right, bottom) in measured[1280]["boxes"].items():
        regions[name] = image[round(top) : round(bottom), round(left) : min(1280, round(right))].reshape(-1, 3)
        colours, counts = np.unique(regions[name], axis=0, return_counts=True)
        assert len(colours) > 20, name
        assert counts.max() / counts.sum() < 0.995, name  # something is drawn on the ground
        if name != "audio":
            assert colours[counts.argmax()].tolist() == ground, name
    assert list(regions) == ["table", "figure img", "audio"]
    palette = Palette(["teacher", "before", "kd", "caad2", "always right", "follows hints"])
    drawn = [palette(system).colour for system in ("always right", "follows hints")]
    drawn = [DARK[c] for c in drawn] if scheme == "dark" else drawn
    for colour in drawn:
        assert (np.abs(regions["figure img"] - pixels(colour)).max(axis=1) <= 3).sum() > 30, colour


def test_the_checks_see_what_is_wrong(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        '<!doctype html><body><div style="width:900px">wide</div><img src="http://host.invalid/x.png" alt="">'
        '<audio src="data:audio/flac;base64,AAAA"></audio><script>console.error("a fault")</script></body>'
    )
    found = measure(page)
    assert found[390]["needs"] > 900 and found[1280]["needs"] == 1280
    assert found[1280]["images"] == [0] and found[1280]["sounds"] == [0]
    _, console, asked = chromium(page)
    assert any("a fault" in line for line in console) and asked == ["http://host.invalid/x.png"]
