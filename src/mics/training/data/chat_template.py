"""A conversation as tokens by the tokenizer's own chat template, and which of them are learnt.

[Note: what an answer is]
A template that marks with ``{% generation %}`` what a model has to write says so itself, and
transformers says which tokens that are. Of another one an answer is what the template writes more
when it is told the answer too: the tokens of the conversation up to it, less those of all before
it with the prompt for an answer (``add_generation_prompt``). That holds only where the shorter ones
begin the longer, token for token; a template that writes old turns otherwise than the last one, as
those that leave out what a model thought, is refused. The end of a turn that the template writes
behind an answer is learnt too, or a model would never stop.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mics.errors import DataError
from mics.training.data.conversations import Conversation, Message
from mics.training.data.tokens import Tokenizer

_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_MOST_TEMPLATE = 1 << 20  # bytes


@dataclass(frozen=True)
class Spoken:
    """A conversation as tokens: ``ids``, and whether each is ``learnt``. Both are [tokens]."""

    ids: NDArray[np.uint32]
    learnt: NDArray[np.bool_]


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: a saved one; from now on it reads special tokens that a text spells as such.

    Raises:
        DataError: it has no chat template.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        template = tokenizer.fast.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if not isinstance(template, str) or not template:
            raise DataError(
                "The tokenizer has no chat template.",
                numbers="data.format = chat, and there is none in its tokenizer_config.json or "
                "chat_template.jinja.",
                write="--data.tokenizer <the tokenizer of a chat model>, or a chat_template.jinja "
                "beside its tokenizer.json",
            )
        if len(template) > _MOST_TEMPLATE:
            raise DataError(
                "The chat template of the tokenizer is too long.",
                numbers=f"It has {len(template):,} characters, {_MOST_TEMPLATE:,} at most.",
                write="--data.tokenizer <one whose template is a template>",
            )
        tokenizer.reads_specials = True
        self._fast: Any = tokenizer.fast
        self.marks_answers = bool(_MARKS.search(template))

    def spoken(self, conversations: Sequence[Conversation]) -> list[Spoken]:
        """The tokens of conversations, and which of them are learnt; all together, which is fast.

        See [Note: what an answer is].

        Raises:
            DataError: the template does not take one, or does not say what an answer is.
        """
        texts = [text for one in conversations if not self._marks(one) for text in self._parts(one)]
        ids = self._ids(texts)
        return [
            self._marked(one) if self._marks(one) else self._continued(one, ids)
            for one in conversations
        ]

    def prompt(self, messages: list[Message]) -> list[int]:
        """The tokens of a conversation whose next turn a model is to write.

        Raises:
            DataError: the template does not take it.
        """
        text = self._text(Conversation("The prompt", messages), len(messages), True)
        return next(self._ids([text]))

    def _marks(self, conversation: Conversation) -> bool:
        """Whether the template says which tokens are learnt."""
        return self.marks_answers and not conversation.whole_turns

    def _parts(self, conversation: Conversation) -> Iterator[str]:
        """The whole, then for each answer what is before it, and up to its end if that is less."""
        turns = len(conversation.messages)
        yield self._text(conversation, turns, False)
        for number in conversation.answers:
            yield self._text(conversation, number, True)
            if number + 1 < turns:
                yield self._text(conversation, number + 1, False)

    def _continued(self, conversation: Conversation, parts: Iterator[list[int]]) -> Spoken:
        """What is learnt by the tokens of ``_parts``."""
        whole = next(parts)
        learnt = np.zeros(len(whole), dtype=np.bool_)
        for number in conversation.answers:
            before = next(parts)
            upto = next(parts) if number + 1 < len(conversation.messages) else whole
            if upto[: len(before)] != before or whole[: len(upto)] != upto:
                raise _not_a_prefix(conversation, number + 1)
            learnt[len(before) : len(upto)] = True
        return Spoken(np.asarray(whole, dtype=np.uint32), learnt)

    def _ids(self, texts: list[str]) -> Iterator[list[int]]:
        found = self._fast.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return (list(encoding.ids) for encoding in found)

    def _marked(self, conversation: Conversation) -> Spoken:
        found = self._rendered(
            conversation,
            len(conversation.messages),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        learnt = np.asarray(found["assistant_masks"], dtype=np.bool_)
        return Spoken(np.asarray(found["input_ids"], dtype=np.uint32), learnt)

    def _text(self, conversation: Conversation, turns: int, asks: bool) -> str:
        return str(self._rendered(conversation, turns, tokenize=False, add_generation_prompt=asks))

    def _rendered(self, conversation: Conversation, turns: int, **keywords: Any) -> Any:
        messages = conversation.messages[:turns]
        if not messages:  # the answer comes first: what the template writes before any turn
            raise DataError(
                f"{conversation.place} begins with an answer.",
                numbers=f"Its first message is of the role {conversation.messages[0]['role']!r}.",
                write="a user's message before it",
            )
        try:
            return self._fast.apply_chat_template(messages, tools=conversation.tools, **keywords)
        except Exception as error:  # whatever a template raises of itself, or jinja of it
            raise DataError(
                f"The chat template does not take {conversation.place}.",
                numbers=f"{type(error).__name__}: {error}".splitlines()[0][:300],
                write="conversations as the template wants them, or another --data.tokenizer",
            ) from None


def _not_a_prefix(conversation: Conversation, end: int) -> DataError:
    return DataError(
        "The chat template does not say what an answer is.",
        numbers=f"{conversation.place}: what it writes up to message {end} does not begin what it "
        "writes of the whole conversation, token for token.",
        write="a template with {% generation %} around answers, or a row for each answer: "
        "prompt and completion",
    )
