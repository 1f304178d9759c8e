"""What the site shows beside the pages of docs/: other texts, and what is generated.

MkDocs calls the functions whose names begin with ``on_``. The pages of docs/ are read where they
are; links between them and to other files of the repository are those of the repository, and are
turned into links of the site here. A line ``<!-- NAME -->`` of a page is replaced by what
``GENERATED`` makes.
"""

from __future__ import annotations

import html
import posixpath
import re
from collections.abc import Callable
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import messages
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
TEXTS = {
    "README.md": "project/readme.md",
    "ARCHITECTURE.md": "project/architecture.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
}
RESULTS = "benchmarks/results"
LINK = re.compile(r"(\]\()([^()\s]+)(\))")
FENCE = re.compile(r"^(```|~~~)", re.MULTILINE)


# -- which pages there are -----------------------------------------------------------------------


@cache
def places() -> dict[str, str]:
    """Return the place on the site of every file of the repository that has one."""
    of = {f"docs/{page.name}": page.name for page in (ROOT / "docs").glob("*.md")}
    of |= TEXTS
    for file in sorted((ROOT / RESULTS).iterdir()):
        of[f"{RESULTS}/{file.name}"] = f"results/{file.name}"
    linked = {path for source in list(of) if source.endswith(".md") for path in _linked(source)}
    for path in sorted(linked - of.keys()):
        if (ROOT / path).is_file() and not path.startswith("docs/"):
            of[path] = f"source/{path}.md"
    of[RESULTS] = "results.md"
    return of


def _linked(source: str) -> set[str]:
    """Return the files of the repository to which a text links."""
    text = (ROOT / source).read_text(encoding="utf-8")
    targets = [target.partition("#")[0] for _, target, _ in LINK.findall(text)]
    return {_resolved(source, target) for target in targets if target and "://" not in target}


def _resolved(source: str, target: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def results() -> list[str]:
    """Return the measured results that are pages, by their files in the repository."""
    return [f"{RESULTS}/{file.name}" for file in sorted((ROOT / RESULTS).glob("*.md"))]


def on_config(config: Any) -> Any:
    """Put the measured results into the navigation."""
    (evidence,) = (section["Evidence"] for section in config["nav"] if "Evidence" in section)
    evidence.append({"Result files": [{_title(file): places()[file]} for file in results()]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the texts of the repository that are not in docs/, as pages or as they are."""
    for source, place in places().items():
        if source.startswith("docs/") or source == RESULTS:
            continue
        path = ROOT / source
        if not place.endswith(".md"):
            files.append(File.generated(config, place, abs_src_path=str(path)))
            continue
        text = path.read_text(encoding="utf-8")
        if not source.endswith(".md"):
            language = {".py": "python", ".toml": "toml"}.get(path.suffix, "text")
            text = f"# {source}\n\n```{language}\n{text.rstrip()}\n```\n"
        elif not text.startswith("# "):
            text = f"# {_title(source)}\n\n{text}"
        files.append(File.generated(config, place, content=text))
    return files


def _title(source: str) -> str:
    """Return the first heading of a text, or its name in words."""
    first = (ROOT / source).read_text(encoding="utf-8").partition("\n")[0]
    return first[2:] if first.startswith("# ") else Path(source).stem.replace("_", " ").capitalize()


# -- what stands on them -------------------------------------------------------------------------


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the repository's links into the site's, and put in what is generated."""
    of = places()
    source = next((path for path, place in of.items() if place == page.file.src_uri), None)
    if source is None or not source.endswith(".md"):
        return markdown
    for name, make in GENERATED.items():
        if f"<!-- {name} -->" in markdown:
            markdown = markdown.replace(f"<!-- {name} -->", make())
    parts = FENCE.split(markdown)
    for number in range(0, len(parts), 4):  # text, ```, code, ```
        parts[number] = _lists_apart(_links(parts[number], source, page.file.src_uri, of))
    return "".join(parts)


def _links(text: str, source: str, here: str, of: dict[str, str]) -> str:
    """Rewrite the links of a text that stands at ``source`` and is shown at ``here``."""

    def link(match: re.Match[str]) -> str:
        path, mark, anchor = match[2].partition("#")
        place = of.get(_resolved(source, path)) if path and "://" not in path else None
        if place is None:
            return match[0]
        shown = posixpath.relpath(place, posixpath.dirname(here) or ".")
        return f"{match[1]}{shown}{mark}{anchor}{match[3]}"

    return LINK.sub(link, text)


def _lists_apart(text: str) -> str:
    """Put an empty line before a list that follows its sentence, which GitHub does not ask for."""
    return re.sub(r"^((?![-*|\s#>]|\d+\. ).+)\n(?=[-*] |1\. )", r"\1\n\n", text, flags=re.MULTILINE)


# -- what is generated ---------------------------------------------------------------------------


def words() -> str:
    """Return the table of words of ARCHITECTURE.md."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    return text.split("## Words\n", 1)[1].split("\n## ", 1)[0].strip()


def all_messages() -> str:
    """Return every message of the code, by kind, as HTML."""
    about = messages.kinds()
    by_kind = sorted(messages.messages(), key=lambda one: list(about).index(one.kind))
    parts = []
    for kind, group in groupby(by_kind, key=lambda one: one.kind):
        parts += [f"### {kind}\n", f"{about[kind]}\n", *map(_message, group)]
    return "\n".join(parts)


def _message(one: messages.Message) -> str:
    rows = [("what", one.what), ("numbers", one.numbers), ("write", one.write)]
    shown = [f'<p class="{name}">{_shown(text)}</p>' for name, text in rows if text]
    return f'<div class="message">{"".join(shown)}<p class="place">{one.place}</p></div>\n'


def _shown(text: str) -> str:
    """Escape a message; what is filled in at run time stands in <var>."""
    text = re.sub(r"&lt;([\w .]+)&gt;", r"<var>\1</var>", html.escape(text))
    return text.replace("\n", "<br>")


GENERATED: dict[str, Callable[[], str]] = {"words": words, "messages": all_messages}
