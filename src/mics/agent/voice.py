"""What an agent says, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mics.ranks.console import write


def name_nodes(nodes: Sequence[int]) -> str:
    """Name nodes by their indices: ``node 2``, ``nodes 2, 3``."""
    return f"node{'s' if len(nodes) > 1 else ''} {', '.join(map(str, sorted(nodes)))}"


class Voice:
    """Says what people should know.

    Args:
        node: the agent's, where there are several.
    """

    def __init__(self, node: int | None) -> None:
        self._name = "mics run" if node is None else f"mics run: node {node}"
        self._said: set[str] = set()

    def say(self, text: str) -> None:
        """Print a line."""
        write(f"{self._name}: {text}", sys.stderr)

    def say_once(self, text: str) -> None:
        """Print a line that was not printed before."""
        if text not in self._said and len(self._said) < 100:
            self._said.add(text)
            self.say(text)

    def quote(self, words: str) -> None:
        """Print what a rank has said as it ended."""
        write(words.rstrip(), sys.stderr)
