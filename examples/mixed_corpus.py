"""Make a corpus of JSON lines, Parquet and text out of the source of Python's standard library.

    python examples/mixed_corpus.py FOLDER MEGABYTES

Writes FOLDER/rows.jsonl, FOLDER/table.parquet and FOLDER/texts/*.txt, a third of the text each. A
document is a few thousand letters of one module, from where a class or function begins.
"""

import json
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

ROWS = 2000  # of a group of the Parquet file
LETTERS = 500, 10_000  # of a document
BEGINS = re.compile(r"^(?:class|def|import|from) ", re.MULTILINE)


def documents(num_bytes: float, draw: random.Random) -> Iterator[str]:
    library = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(library.rglob("*.py")) if "site-packages" not in path.parts]
    modules = [path.read_text(errors="ignore") for path in paths]
    begins = [(m, begin.start()) for m in modules for begin in BEGINS.finditer(m)]
    while num_bytes > 0:
        module, start = draw.choice(begins)
        document = module[start : start + draw.randint(*LETTERS)]
        num_bytes -= len(document.encode())
        yield document


def main(folder: Path, num_bytes: float) -> None:
    (folder / "texts").mkdir(parents=True)
    draw = random.Random(0)
    with (folder / "rows.jsonl").open("w") as rows:
        for document in documents(num_bytes / 3, draw):
            rows.write(json.dumps({"text": document}) + "\n")
    schema = pyarrow.schema([("text", pyarrow.string())])
    with pyarrow.parquet.ParquetWriter(folder / "table.parquet", schema) as table:
        column = list(documents(num_bytes / 3, draw))
        for first in range(0, len(column), ROWS):
            table.write_table(pyarrow.table({"text": column[first : first + ROWS]}, schema))
    for number, document in enumerate(documents(num_bytes / 3, draw)):
        (folder / "texts" / f"{number:06}.txt").write_text(document)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]) * 1e6)
