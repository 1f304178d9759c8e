"""The page of a run: what it says, what it leaves out, that nothing in it can run."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from test_seeing import a_step

from mics.__main__ import main
from mics.planning.pages.document import Figure, Section, document
from mics.training.page.entries import read_history, thinned
from mics.training.page.timeline import merged, timeline
from mics.training.page.writing import write_page
from mics.training.record import (
    BeginRecord,
    EndRecord,
    EvaluationRecord,
    RollbackRecord,
    SaveRecord,
    SkipRecord,
)

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
NO_TEXT = ("br", "meta", "link")


class Page(HTMLParser):
    """Tags, the text between them, and figures by their order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        found = re.findall(r'<script type="application/json" id="[^"]*">(.*?)</script>', text)
        self.figures: list[Any] = [json.loads(one) for one in found]
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in NO_TEXT:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.words)

    def trace(self, name: str) -> dict[str, Any]:
        return next(t for figure in self.figures for t in figure["data"] if t["name"] == name)


def a_begin(step: int = 0, **more: Any) -> BeginRecord:
    numbers: dict[str, Any] = {field.name: 4 for field in dataclasses.fields(BeginRecord)}
    given = {"step": step, "steps": 9, "model": "gpt2-tiny", "device": "cuda", "partition": 2}
    given |= {"full_sharding_between_nodes": 20 << 20, "mics": "0.1", "torch": "2.13"}
    return BeginRecord(**numbers | given | more)


def written(folder: Path, *entries: Any) -> Path:
    """A run's folder with these entries, each a second after the one before it."""
    folder.mkdir(exist_ok=True)
    lines = []
    for second, entry in enumerate(entries):
        wall, record = entry if isinstance(entry, tuple) else (second, entry)
        lines.append(json.dumps(json.loads(record.as_json()) | {"time": 1.8e9 + wall}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def page_of(folder: Path) -> Page:
    assert write_page(folder, folder / "run.html")
    return Page((folder / "run.html").read_text())


def test_a_page_says_what_was_measured_and_what_full_sharding_would_have_sent(
    tmp_path: Path,
) -> None:
    steps = [a_step(n, loss=3.0 - n / 10) for n in (1, 2, 3)]
    end = EndRecord(3, None, "def f():", True)
    folder = written(tmp_path / "one", a_begin(), *steps, EvaluationRecord(3, 2.9, 1.5, 0.5), end)
    (folder / "config.toml").write_text("[run]\nsteps = 9\n")
    page = page_of(folder)
    for words in (
        "one: gpt2-tiny",
        "Step 3 of 9, stopped before its end. Loss 2.7000 (1.250 bits per byte), held out 2.9000",
        "Full sharding would have sent 4.00 times as much between nodes: 20.00 MiB a step instead "
        "of 5.00 MiB.",
        "2027-01-15 08:00",
        "in 3 of 3 steps",
        "def f():",
        "steps = 9",
    ):
        assert words in page.text
    assert page.trace("training")["y"] == [1.25, 1.25, 1.25]
    assert page.trace("held out")["x"] == [3]
    assert page.trace("between nodes")["x"] == [20, 4 / (1 << 20), 5]


def test_every_set_that_is_measured_is_on_the_page(tmp_path: Path) -> None:
    steps = [a_step(n, loss=3.0 - n / 10) for n in (1, 2, 3)]
    sets = [
        EvaluationRecord(2, 2.0, 1.1, 0.5, "prose"),
        EvaluationRecord(3, 1.9, 1.0, 0.5, "prose"),
        EvaluationRecord(3, 2.8, None, 0.5, "tokens"),  # of how many bytes is not known
        EvaluationRecord(3, 2.9, 1.5, 0.5),
    ]
    page = page_of(written(tmp_path / "one", a_begin(), *steps, *sets))
    assert "held out 2.9000 (1.500 bits per byte), prose 1.9000 (1.000 bits per" in page.text
    assert "tokens 2.8000." in page.text
    prose = page.trace("prose")
    assert (prose["x"], prose["y"]) == ([2, 3], [1.1, 1.0])
    assert page.trace("held out")["x"] == [3]
    colours = {page.trace(name)["line"]["color"] for name in ("prose", "held out", "training")}
    assert len(colours) == 3
    names = {t["name"] for figure in page.figures for t in figure["data"]}
    assert "tokens" not in names
    back = [a_begin(1), a_step(2)]
    gone_back = page_of(written(tmp_path / "two", a_begin(), *steps, *sets, *back))
    assert "prose" not in gone_back.text


def test_nothing_that_somebody_wrote_becomes_part_of_the_page(tmp_path: Path) -> None:
    skip = SkipRecord(2, EVIL, None, 1.0, 1, 0, 1, [])
    entries = [a_begin(model=EVIL, torch=EVIL), a_step(1), a_step(2, taken=False, skipped=EVIL)]
    entries.append(EvaluationRecord(2, 2.0, 1.0, 0.5, EVIL))
    folder = written(tmp_path / "<b>", *entries, skip, EndRecord(2, EVIL, EVIL, True))
    (folder / "config.toml").write_text(f"# {EVIL}")
    page = page_of(folder)
    assert "img" not in page.tags
    assert page.tags.count("script") == len(page.figures) + 2  # plotly's, and what calls it
    assert page.text.count(EVIL) == 6  # title twice, set, sample, settings, version
    names = [t["name"] for f in page.figures for t in f["data"]]
    assert any("&lt;script&gt;" in name for name in names) and EVIL not in names
    marks = [t for f in page.figures for t in f["data"] if t["name"] == "skipped step"]
    assert "&lt;script&gt;" in marks[-1]["hovertext"][0]
    text = (folder / "run.html").read_text()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; ")
    assert policy[1].count("'sha256-") == 2
    assert "'unsafe-inline'" not in policy[1].partition("script-src")[2]


def test_a_figure_cannot_end_its_script() -> None:
    page = Page(document(EVIL, "", [Section(EVIL, Figure([{"name": EVIL, "line": {}}]))]))
    assert page.trace(EVIL) == {"name": EVIL, "line": {}}
    assert "img" not in page.tags


def test_what_was_not_measured_is_not_available(tmp_path: Path) -> None:
    """A file of an earlier version: steps alone, without the time of the day."""
    folder = tmp_path / "old"
    folder.mkdir()
    unknown = a_step(1, mfu=None, memory_bytes=None, loss=None, bits_per_byte=None)
    (folder / "metrics.jsonl").write_text(unknown.as_json() + "\n")
    page = page_of(folder)
    assert "What full sharding would have sent: n/a." in page.text
    assert "Loss n/a" in page.text
    assert page.text.count("n/a") >= 14
    assert page.trace("training")["y"] == [None]
    assert page.trace("step, parts n/a")["width"] == [0.5]  # hop 1 exposed is None in a_step


def test_steps_that_were_left_behind_do_not_count(tmp_path: Path) -> None:
    back = RollbackRecord(4, 2, 9, "step-2")
    entries = [a_begin(), *[a_step(n) for n in (1, 2, 3, 4)], back]
    entries += [a_step(3, loss=1.0), a_begin(step=2), a_step(3, loss=0.5)]
    history = read_history(written(tmp_path / "run", *entries) / "metrics.jsonl")
    assert [entry["step"] for entry in history.steps] == [1, 2, 3]
    assert history.steps[-1]["loss"] == 0.5
    assert history.again == 3
    assert history.end == {}


def test_a_timeline_fills_all_the_time_in_which_the_run_ran(tmp_path: Path) -> None:
    step = a_step(1, seconds=2.0, hop_1_exposed=0.5, hop_2_exposed=0.25)
    entries = [(0, a_begin()), (3, step), (4, SaveRecord(1, 0.75)), (1000, a_begin(step=1))]
    again = dataclasses.replace(step, step=2)
    entries += [(1002, again), (1002, SkipRecord(2, "loss nan", None, 1.0, 1, 0, 1, []))]
    history = read_history(written(tmp_path / "run", *entries) / "metrics.jsonl")
    found = timeline(history.entries)
    assert [(s.start, s.end, s.words) for s in found.stretches] == [
        (0, 3, "step 1"),
        (3, 4, "save 1"),
        (4, 6, "step 2"),
    ]
    assert found.stretches[0].parts == {
        "computation": 1.25,
        "waits for hop 1": 0.5,
        "waits for hop 2": 0.25,
        "not measured": 1.0,
    }
    assert found.stretches[1].parts == {"checkpoint": 0.75, "not measured": 0.25}
    assert [(m.at, m.kind, m.words) for m in found.marks] == [
        (4, "restart", "goes on from step 1; did not run for 16:36"),
        (6, "skipped step", "step 2: loss nan"),
    ]


def test_a_long_run_is_thinned_and_the_page_says_how(tmp_path: Path) -> None:
    steps = [a_step(n, loss=float(n % 7), bits_per_byte=None) for n in range(1, 2501)]
    page = page_of(written(tmp_path / "long", a_begin(), *steps))
    assert "2,500 steps: a point is the median of 3 of them" in page.text
    assert "A bar is 5 entries together" in page.text
    assert len(page.trace("training")["x"]) == 834
    assert max(page.trace("least to most")["y"]) == 6
    history = read_history(tmp_path / "long" / "metrics.jsonl")
    points = thinned(history.steps, "loss", most=1250)
    assert (points.at[0], points.middle[0], points.low[0], points.high[0]) == (2, 1.5, 1, 2)
    stretches = timeline(history.entries).stretches
    bars, each = merged(stretches)
    assert (len(bars), each) == (500, 5)
    spent = [sum(sum(one.parts.values()) for one in some) for some in (stretches, bars)]
    assert spent[0] == pytest.approx(spent[1])


def test_the_verb_writes_the_page_and_refuses_what_is_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["page", str(tmp_path)]) == 1
    assert "is no folder of a run" in capsys.readouterr().err
    folder = written(tmp_path / "run", a_begin())
    assert main(["page", str(folder)]) == 1
    assert "has no step to show" in capsys.readouterr().err
    assert not (folder / "run.html").exists()
    written(folder, a_begin(), a_step(1))
    assert main(["page", str(folder), "--out", str(tmp_path / "a.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.html'}\n"
    assert main(["page", str(folder), "--out", str(tmp_path / "nowhere" / "a.html")]) == 1
    assert "cannot be written" in capsys.readouterr().err
