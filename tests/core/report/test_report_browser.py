"""The page in a browser: that it fits its window, and what its script does."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from report_evidence import compare_evidence, hostile_evidence, perplexity, run_evidence, sha256

from germane.core.report.pages import render

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--virtual-time-budget=5000",
)
MEASURE = """
var faults = [];
addEventListener("error", function (event) { faults.push(String(event.message)); });
addEventListener("securitypolicyviolation", function (event) {
  faults.push(event.violatedDirective);
});
function all(selector) { return Array.from(document.querySelectorAll(selector)); }
function shown() { return all("[data-metric]").filter(function (part) { return !part.hidden; }); }
function sortByFirstColumn(table) {
  var button = table.tHead.querySelector("button");
  if (button) { button.click(); }
  return Array.from(table.tBodies[0].rows).map(function (row) { return row.cells[0].textContent; });
}
addEventListener("load", function () {
  var texts = all(".canvas > svg text").filter(function (each) {
    return each.getBoundingClientRect().width > 0;
  });
  parent.postMessage(JSON.stringify({
    width: innerWidth,
    scroll: document.documentElement.scrollWidth,
    left: Math.min(...texts.map(function (each) { return each.getBoundingClientRect().left; })),
    right: Math.max(...texts.map(function (each) { return each.getBoundingClientRect().right; })),
    smallest: Math.min(...texts.map(function (each) {
      return parseFloat(getComputedStyle(each).fontSize);
    })),
    sorted: all("table.rows[data-sortable]").map(sortByFirstColumn),
    shown: shown().length,
    metrics: all("[data-metric]").length,
    faults: faults
  }), "*");
});
"""

# Headless Chromium has no window under 500 pixels, so the page goes into a frame of its width.
FRAME = """<!doctype html>
<iframe src="page.html" style="width:{width}px;height:1000px;border:0"></iframe>
<script>
addEventListener("message", function (event) {{ document.body.dataset.measured = event.data; }});
</script>"""


def measure(page: str, width: int, folder: Path) -> dict[str, Any]:
    """What a browser says about the page at that width, with the page's own policy in force."""
    probed = page.replace("script-src ", f"script-src 'sha256-{sha256(MEASURE)}' ", 1)
    probed = probed.replace("<title>", f"<script>{MEASURE}</script><title>", 1)
    (folder / "page.html").write_text(probed, encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(FRAME.format(width=width), encoding="utf-8")
    assert BROWSER is not None
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [*command, frame.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'data-measured="(.*?)"', done.stdout)
    assert found, done.stdout[:2000]
    measured: dict[str, Any] = json.loads(html.unescape(found[1]))
    return measured


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium found: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("make", [run_evidence, compare_evidence, hostile_evidence])
def test_the_page_fits_its_window(make: Any, width: int, tmp_path: Path) -> None:
    measured = measure(render(make()), width, tmp_path)
    assert measured["width"] == width
    assert measured["scroll"] <= width
    assert measured["left"] >= 0
    assert measured["right"] <= width
    assert measured["smallest"] >= 12
    assert measured["faults"] == []


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium found: apt-get install chromium")
def test_tables_sort_and_the_picker_shows_one_metric(tmp_path: Path) -> None:
    evidence = compare_evidence()
    for each in evidence.rows:
        each.scores += [perplexity("result", each_score.task, 9.0) for each_score in each.scores]
    measured = measure(render(evidence), 1280, tmp_path)
    (labels,) = measured["sorted"]
    assert labels == sorted(labels)
    assert len(labels) == 14
    assert (measured["shown"], measured["metrics"]) == (1, 2)
    still = re.sub(r"<script>.*?</script>", "", render(evidence), flags=re.DOTALL)
    assert measure(still, 1280, tmp_path)["shown"] == 2
