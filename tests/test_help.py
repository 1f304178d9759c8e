"""What a new user reads first: the help of every verb, at once and without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mics.commands import VERBS

ROOT = Path(__file__).parents[1]
OF_VERBS = [[verb.name] for verb in VERBS]
OF_SUBCOMMANDS = [["bench", name] for name in ("collectives", "train", "dilated")]
OF_SUBCOMMANDS += [["lab", name] for name in ("up", "run", "compare", "status", "down")]
HELPS = [*OF_VERBS, *OF_SUBCOMMANDS]

ASK = """
import sys
from mics.__main__ import main
try:
    main(sys.argv[1:])
finally:
    print(*sorted({"torch", "transformers", "numpy"} & set(sys.modules)), file=sys.stderr)
"""


def helped(words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    plain = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS")}
    return subprocess.run(
        [sys.executable, "-c", ASK, *words, "--help"],
        env=plain | {"PYTHONPATH": str(ROOT / "src")} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("words", HELPS, ids=" ".join)
def test_a_help_loads_neither_torch_nor_what_it_brings(words: list[str]) -> None:
    done = helped(words)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == ""
    assert f"usage: mics {' '.join(words)}" in done.stdout
