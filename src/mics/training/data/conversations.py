"""Chat data as conversations: rows with ``messages``, or with ``prompt`` and ``completion``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mics.errors import DataError
from mics.training.data.corpus import hub_rows, opened
from mics.training.data.finding import HUB, LIBRARY, find_files
from mics.training.data.kinds import kind_of
from mics.training.data.tables import rows_of

MESSAGES = "messages"
"""The column that holds the turns of a conversation, unless another is named."""

_MOST_TURNS = 1000
_WRITE = (
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, '
    'or {"prompt": "...", "completion": "..."}, a row'
)

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """What was said, in order, and which of it is to be learnt.

    Args:
        place: where it stands, for people.
        messages: each has a ``role`` and a ``content``, which a chat template takes as they are.
        prompt: how many of the first ones are never learnt: 0 where the row has ``messages``.
        whole_turns: the row has a ``completion``: the assistant's turns in it are learnt as a
            whole, whatever the template marks.
        tools: what the template is told of functions, or ``None``.
    """

    place: str
    messages: list[Message]
    prompt: int = 0
    whole_turns: bool = False
    tools: list[Any] | None = None

    @property
    def answers(self) -> list[int]:
        """The turns of the assistant that are to be learnt, by their numbers."""
        numbers = range(self.prompt, len(self.messages))
        return [n for n in numbers if self.messages[n]["role"] == "assistant"]


def read_conversations(source: str, field: str | None = None) -> Iterator[Conversation]:
    """Yield the conversations of a source in a fixed order.

    Args:
        source: what ``data.source`` is in the run's options.
        field: the column that holds the messages; ``None`` is "messages", or where a row has none
            "prompt" and "completion".

    Raises:
        DataError: no such source, a file that is no table, or a row that is no conversation.
    """
    for place, row in _rows(source):
        yield _conversation(place, row, field)


def _rows(source: str) -> Iterator[tuple[str, Any]]:
    if source.startswith(HUB):
        yield from hub_rows(source, None)
        return
    if source == LIBRARY:
        raise DataError(
            "data.format is chat, and data.source has no conversations.",
            numbers=f"data.source = {source!r}, which is source code.",
            write="--data.source <a file, folder or hub data set of conversations>",
        )
    for file in find_files(source):
        with opened(file) as stream:
            kind = kind_of(stream, file, MESSAGES)
            if kind is None:
                continue
            if kind == "text":
                raise DataError(
                    f"{file} is text, and no table of conversations.",
                    numbers="data.format = chat.",
                    write=_WRITE,
                )
            yield from rows_of(stream, file, kind, None)


def _conversation(place: str, row: dict[str, Any], field: str | None) -> Conversation:
    tools = _tools(place, row.get("tools"))
    name = field or MESSAGES
    if row.get(name) is not None:
        return Conversation(place, _messages(place, name, row[name]), tools=tools)
    if field is None and row.get("prompt") is not None and row.get("completion") is not None:
        prompt = _messages(place, "prompt", row["prompt"], alone="user")
        answer = _messages(place, "completion", row["completion"], alone="assistant")
        return Conversation(place, prompt + answer, len(prompt), True, tools)
    raise _no_conversation(place, f"Its columns are {', '.join(list(row)[:20])}")


def _tools(place: str, value: Any) -> list[Any] | None:
    """The functions that a row tells of: a list, or the JSON of one."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        found = value
    if found is not None and not isinstance(found, list):
        raise _no_conversation(place, f"tools is {_kind(value)}, no list")
    return found


def _messages(place: str, name: str, value: Any, alone: str | None = None) -> list[Message]:
    """The messages of a column, checked; a text is one message where ``alone`` says whose."""
    if isinstance(value, str) and alone is not None:
        value = [{"role": alone, "content": value}]
    if not isinstance(value, list) or not value:
        raise _no_conversation(place, f"{name} is {_kind(value)}, not a list of messages")
    if len(value) > _MOST_TURNS:
        raise _no_conversation(place, f"{name} has {len(value):,} turns, {_MOST_TURNS:,} at most")
    messages = []
    for number, message in enumerate(value, 1):
        shown = f"message {number} of {name}"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _no_conversation(place, f"{shown} has no role: it is {_kind(message)}")
        # Tables of columns give every message all keys of any: what is null was not there.
        message = {key: part for key, part in message.items() if part is not None}
        if not isinstance(message.get("content", ""), str):
            raise _no_conversation(place, f"the content of {shown} is {_kind(message['content'])}")
        messages.append({"content": "", **message})
    return messages


def _kind(value: Any) -> str:
    if value in ([], {}):
        return "empty"
    return f"of type {type(value).__name__}"


def _no_conversation(place: str, numbers: str) -> DataError:
    return DataError(f"{place} is no conversation.", numbers=f"{numbers}.", write=_WRITE)
