"""The pages in Chromium: on a phone and on a desk, without a word on the console."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser, browser
from test_run_page import EVIL, a_begin, written
from test_seeing import a_step

from mics.__main__ import main
from mics.training.page.writing import write_page
from mics.training.record import EndRecord, EvaluationRecord, SaveRecord, SkipRecord

pytestmark = [
    pytest.mark.slow,
    pytest.mark.extra,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium"),
]
SHOWN = (
    "[...document.querySelectorAll('[data-figure]')].map(f => f.querySelectorAll('.trace').length)"
)
TIMELINE = "document.querySelector('.rangeslider-container').closest('[data-figure]')"


def a_page(folder: Path) -> Path:
    """A run with everything that a page may show, and text that wants to run."""
    entries = [a_begin(model=EVIL)]
    for n in range(1, 60):
        more = {"hop_1_exposed": 0.1, "hop_2_exposed": 0.05, "loss": 3 + math.sin(n)}
        entries.append(a_step(n, bits_per_byte=None, taken=n % 20 != 0, **more))
        if n % 20 == 0:
            entries.append(SkipRecord(n, EVIL, None, 1.0, 1, 0, 1, []))
            entries += [EvaluationRecord(n, 3.0, None, 0.5), SaveRecord(n, 0.25)]
    written(folder, *entries, EndRecord(59, None, EVIL, True))
    (folder / "config.toml").write_text(EVIL)
    assert write_page(folder, folder / "run.html")
    return folder / "run.html"


def check(shown: Browser, page: Path) -> None:
    for width in (390, 1280):
        for dark in (False, True):
            shown.open(page, width, dark=dark)
            assert shown.run("document.documentElement.scrollWidth") <= width
            traces = shown.run(SHOWN)
            assert len(traces) >= 5
            assert min(traces) > 0
            assert shown.run("document.body.innerText.includes('undefined')") is False
    assert shown.complaints == []


def test_the_page_of_a_run(tmp_path: Path) -> None:
    page = a_page(tmp_path / "run")
    with browser() as shown:
        check(shown, page)
        assert shown.run("document.querySelectorAll('img').length") == 0
        before = shown.run(f"{TIMELINE}.layout.xaxis.range")
        shown.run(f"{TIMELINE}.scrollIntoView()")
        box = shown.run(f"{TIMELINE}.querySelector('.nsewdrag').getBoundingClientRect().toJSON()")
        shown.drag(box["x"] + 0.25 * box["width"], box["x"] + 0.5 * box["width"], box["y"] + 90)
        after = shown.run(f"{TIMELINE}.layout.xaxis.range")
        quarter = (before[1] - before[0]) / 4
        assert after == pytest.approx([quarter, 2 * quarter], rel=0.02)
        assert shown.complaints == []


def test_a_script_that_got_in_does_not_run(tmp_path: Path) -> None:
    page = a_page(tmp_path / "run")
    text = page.read_text()
    inside = "<script>document.title = 'taken'</script><img src='https://example.invalid/a.png'>"
    page.write_text(text.replace("<h1>", f"{inside}<h1>"))
    with browser() as shown:
        shown.open(page, 1280)
        assert shown.run("document.title") != "taken"
        assert any("Content Security Policy" in one for one in shown.complaints)


def test_the_page_of_a_plan(tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    words = ["plan", "--model", "gpt2-tiny", "--nodes", "2", "--micro-batch", "1", "4"]
    assert main([*words, "--tokens", "1e9", "--html", str(page)]) == 0
    with browser() as shown:
        check(shown, page)
        shown.open(page, 390)
        options = "[...document.querySelector('pre').children].map(o => o.offsetHeight)"
        heights = shown.run(options)
        assert len(heights) > 5
        assert max(heights) == min(heights), "an option is broken over two lines"
