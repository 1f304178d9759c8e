"""The documentation site: what is drawn and generated is the code's, and every link leads on."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from browser import CHROMIUM, browser

import mics

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs" / "site"))

import figures  # noqa: E402
import messages  # noqa: E402

PASSED_ON = {
    "checkpoint/peers.py": "another rank's error",
    "checkpoint/restoration.py": "the same error, with what was changed",
    "commands/numbers.py": "words of quantities.Within",
    "commands/plan.py": "words of the system",
    "commands/simulate.py": "words of the system",
    "communication/step_facts.py": "the same error, with the ranks",
    "ranks/joining.py": "what another rank has found",
    "training/data/tokenizing/pool.py": "what another process has found",
}
"""Files that raise an error in the words of another one, and whose those are."""


# -- what is drawn and generated -----------------------------------------------------------------


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_is_what_is_drawn_of_the_topology(name: str) -> None:
    assert (figures.FOLDER / f"{name}.svg").read_text() == figures.FIGURES[name]()


def test_every_figure_is_on_a_page_and_every_picture_of_a_page_is_a_figure() -> None:
    text = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    shown = set(re.findall(r"\(figures/([\w-]+)\.svg\)", text))
    assert shown == figures.FIGURES.keys() == {f.stem for f in figures.FOLDER.iterdir()}


def test_a_message_shows_names_where_the_code_puts_values(tmp_path: Path) -> None:
    (tmp_path / "errors.py").write_text('class MicsError(Exception):\n    """Base."""\n')
    (tmp_path / "one.py").write_text(
        "def f(p, names):\n"
        '    why = "is odd" if p else "is even"\n'
        "    raise MicsError(\n"
        '        f"p = {p!r} {why}.",\n'
        "        numbers=f\"{len(names)} of {', '.join(names)}.\",\n"
        '        write="p=" + str(p),\n'
        "    )\n"
        "def g(error):\n"
        "    raise MicsError(error.what)\n"
    )
    (found,) = messages.messages(tmp_path)
    assert found.what == "p = <p> is odd/is even."
    assert found.numbers == "<number of names> of <names>."
    assert found.write == "p=<p>"
    assert found.place == "one.py:3"


def test_every_error_that_is_raised_is_among_the_messages() -> None:
    calls = [place for place, *_ in messages.calls()]
    shown = {message.place for message in messages.messages()}
    left_out = {place.partition(":")[0] for place in calls if place not in shown}
    assert left_out == PASSED_ON.keys()
    assert len(shown) > 500


def test_the_most_frequent_errors_are_words_of_the_code() -> None:
    text = (ROOT / "docs" / "errors.md").read_text().split("### Errors of others")[0]
    quoted = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    whats = [message.what for message in messages.messages()]
    assert [words for words in quoted if not any(words in what for what in whats)] == []
    assert len(quoted) > 25


def test_the_reference_names_what_is_public() -> None:
    named = re.findall(r"^::: mics\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(mics.__all__)


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    listed = re.findall(r": ([\w-]+\.md)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_every_result_is_on_the_page_of_results() -> None:
    text = (ROOT / "docs" / "results.md").read_text()
    pages = [file.name for file in (ROOT / "benchmarks" / "results").glob("*.md")]
    assert [name for name in pages if f"results/{name})" not in text] == []


# -- the answer for some clusters ----------------------------------------------------------------


@pytest.mark.extra
def test_the_clusters_answers_are_those_of_the_commands(tmp_path: Path) -> None:
    after = (ROOT / "docs" / "worth-it.md").read_text().split("## The answer for some clusters")[1]
    rows = [line.strip("| ").split(" | ")[1:] for line in after.splitlines() if "| 1.00 |" in line]
    commands = after.split("```sh\n")[1].split("```")[0].replace("\\\n", "").splitlines()
    file = tmp_path / "answer.json"
    for row, command in zip(rows, commands, strict=True):
        words = [sys.executable, "-m", *shlex.split(command), "--json", str(file)]
        subprocess.run(words, capture_output=True, text=True, check=True)
        answer = json.loads(file.read_text())
        speeds = {e: points[0][1] for e, points in answer["tokens_per_second_by_gpus"].items()}
        engines = ("hsdp every micro-step", "hsdp deferred", "fsdp2")
        times = [f"{speeds['mics'] / speeds[engine]:.2f}" for engine in engines]
        assert [str(answer["partition"]), *times] == row, command


# -- the site itself -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a warning, of a link or a docstring, is an error."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


class Links(HTMLParser):
    """What a page points to, what it loads, and what in it can be pointed to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("id"):
            self.anchors.add(given["id"] or "")
        target = given.get("href") or given.get("src")
        if target and given.get("rel") != "canonical":
            (self.targets if tag == "a" else self.loaded).append(target)


def broken(site: Path) -> Iterator[str]:
    """Every link of a page that leads nowhere, or loads what is not in the site."""
    pages = {page: Links(page) for page in site.rglob("*.html") if page.name != "404.html"}
    for page, links in pages.items():
        for target in links.targets + links.loaded:
            path, anchor = urldefrag(unquote(target))
            if "://" in path:
                if target in links.loaded:
                    yield f"{page.name} loads {target}"
                continue
            file = (page.parent / path).resolve() if path else page
            file = file / "index.html" if file.is_dir() else file
            if not file.is_file() or (
                anchor and file in pages and anchor not in pages[file].anchors
            ):
                yield f"{page.relative_to(site)}: {target}"


@pytest.mark.extra
def test_the_site_is_built_and_no_link_in_it_is_broken(site: Path) -> None:
    assert len(list(site.rglob("*.html"))) > 40
    assert list(broken(site)) == []
    (site / "wrong.html").write_text('<a href="start.html#nowhere">x</a><img src="https://a/b">')
    assert list(broken(site)) == [
        "wrong.html: start.html#nowhere",
        "wrong.html loads https://a/b",
    ]
    (site / "wrong.html").unlink()


@pytest.mark.extra
def test_generated_texts_and_tables_are_on_their_pages(site: Path) -> None:
    errors = (site / "errors.html").read_text()
    assert errors.count('class="message"') == len(messages.messages())
    assert "replication group" in (site / "glossary.html").read_text()
    assert (site / "results" / "soak.html").is_file()
    for page in site.rglob("*.html"):
        assert "<!-- messages" not in page.read_text()
        assert not re.search(r"<p>\|[^<]*\|\n\|--", page.read_text()), page.name


@pytest.mark.extra
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_pages_fit_a_phone_and_a_desk_and_ask_for_nothing(site: Path) -> None:
    names = ("index", "start", "concepts", "worth-it", "errors", "api", "results/parity_table")
    with browser() as shown:
        for name in names:
            for width in (390, 1280):
                shown.open(site / f"{name}.html", width)
                assert shown.run("document.documentElement.scrollWidth") <= width, name
        search = "document.querySelector('.md-search__input')"
        shown.run(f"{search}.focus(); {search}.value = 'hierarchical'")
        shown.run(f"{search}.dispatchEvent(new KeyboardEvent('keyup', {{bubbles: true}}))")
        found = "document.querySelector('.md-search-result__meta').innerText"
        waits = f"setInterval(() => /\\d+ match/.test({found}) && done(), 100)"
        shown.run(f"new Promise(done => {waits})")
        assert shown.complaints == []
