"""The tokenizer of a folder: named, or trained on a sample of its text that is the same for all."""

from __future__ import annotations

from collections.abc import Iterator

from mics.ranks.console import ShowBytes
from mics.training.data.cutting import cut_up
from mics.training.data.tokenizing.plan import Job, Plan
from mics.training.data.tokenizing.spans import passages
from mics.training.data.tokens import Tokenizer, byte_tokenizer, saved_tokenizer, train_bpe

_SAMPLE = 64 << 20  # bytes of text that a BPE is trained on
_SPANS = 64  # that they come from


def tokenizer_of(job: Job, plan: Plan, progress: ShowBytes) -> Tokenizer:
    """The tokenizer that a job names, or one that is trained on a sample of its text.

    Raises:
        DataError: there is no such tokenizer, or the text cannot be read.
    """
    if job.tokenizer == "bytes":
        return byte_tokenizer()
    if job.tokenizer != "bpe":
        return saved_tokenizer(job.tokenizer)
    progress("training the tokenizer", 0, 0)
    return train_bpe(_sample(job, plan), job.vocabulary)


def _sample(job: Job, plan: Plan) -> Iterator[bytes]:
    """Text from all over the source, as many bytes from each place."""
    spans = [span for part in plan.parts for span in part]
    chosen = (
        [spans[len(spans) * n // _SPANS] for n in range(_SPANS)] if len(spans) > _SPANS else spans
    )
    for span in chosen:
        left = _SAMPLE // len(chosen)
        for passage in passages(span, job.field):
            for text, _ in cut_up(passage.pieces):
                yield text[:left] if len(text) > left else text
                left -= len(text)
                if left <= 0:
                    break
            if left <= 0:
                break
