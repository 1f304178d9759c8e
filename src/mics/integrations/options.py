"""Keywords of ``mics.shard`` as a tool is given them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Mapping
from typing import Any

from mics.errors import ConfigError
from mics.sharding.shard import shard


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of ``mics.shard``, checked by name.

    Raises:
        ConfigError: it has no such keyword.
    """
    known = [name for name in inspect.signature(shard).parameters if name != "model"]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"mics.shard has no keyword {name!r}.",
                numbers=f"It has {', '.join(known)}.",
                write=f"{near[0]}=..." if near else "",
            )
    return dict(options)


def split_options(
    options: Mapping[str, Any], others: Collection[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keywords of ``mics.shard``, checked by name, and those of something else.

    Args:
        options: both.
        others: names of the latter.

    Raises:
        ConfigError: it is none of either.
    """
    theirs = {name: value for name, value in options.items() if name in others}
    ours = {name: value for name, value in options.items() if name not in others}
    return checked_options(ours), theirs
