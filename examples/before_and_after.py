"""Two scripts: what differs in their text, and in the bytes that a step of theirs sends.

    python examples/before_and_after.py                     # HSDP of FSDP2, and the same on mics
    python examples/before_and_after.py old.py new.py       # any two training scripts

``mics check`` runs both on processes of this machine that stand for two nodes of two GPUs, and
counts what each collective sends.
"""

import difflib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BEFORE, AFTER = HERE / "hsdp.py", HERE / "hsdp_on_mics.py"


def difference(before: Path, after: Path) -> str:
    """What changes, docstrings left out, without lines around it."""
    old, new = (code_of(file).splitlines(keepends=True) for file in (before, after))
    lines = difflib.unified_diff(old, new, before.name, after.name, n=0)
    return "".join(line for line in lines if line[1:].strip() and not line.startswith("@@"))


def code_of(file: Path) -> str:
    """A script behind its docstring."""
    text = file.read_text()
    return text.split('"""', 2)[2].lstrip() if text.startswith('"""') else text


def checked(script: Path) -> dict[str, Any]:
    """What ``mics check`` finds; it ends with 1 where something is wrong, as it is before."""
    command = [sys.executable, "-m", "mics", "check", "--json", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.stdout:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def sent(found: dict[str, Any]) -> dict[str, tuple[int, int, int]]:
    """Calls of a rank, and bytes of a node, per kind of collective; all of them last."""
    kinds: dict[str, tuple[int, int, int]] = {}
    for row in found["rows"]:
        for what in (row["what"], "all"):
            calls, inside, between = kinds.pop(what, (0, 0, 0))
            inside, between = inside + row["intra_bytes"], between + row["inter_bytes"]
            kinds[what] = calls + row["calls"], inside, between
    return kinds


def main() -> None:
    before, after = map(Path, sys.argv[1:]) if len(sys.argv) == 3 else (BEFORE, AFTER)
    print(difference(before, after))
    found = [checked(script) for script in (before, after)]
    for script, one in zip((before, after), found, strict=True):
        print(f"{script.name}: {one['headline']}")
    old, new = map(sent, found)
    print(f"\n{'a step, before -> after':<34}{'calls':>12}{'inside a node':>24}{'to others':>22}")
    for what in [*(name for name in {**old, **new} if name != "all"), "all"]:
        pairs = zip(old.get(what, (0, 0, 0)), new.get(what, (0, 0, 0)), strict=True)
        calls, inside, between = (f"{one:,} -> {other:,}" for one, other in pairs)
        print(f"{what:<34}{calls:>12}{inside:>24}{between:>22}")


if __name__ == "__main__":
    main()
