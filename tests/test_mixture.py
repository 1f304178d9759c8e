"""Several sources in one stream: exactly their weights, whatever the layout, from any position."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mics.errors import DataError
from mics.training.batching import Batching
from mics.training.config import DataConfig, SourceConfig
from mics.training.data import Data, prepare_data
from mics.training.data.mixture import Mixture, period_of, whole_weights
from mics.training.data.stream import Stream

WEIGHTS = [
    [1],
    [1, 1],
    [7, 2, 1],
    [1] * 7,
    [50, 30, 15, 4, 1],
    [999, 1],
    [13, 8, 5, 3, 2, 1, 1],
    [97, 89, 83, 79, 73],
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_every_source_is_less_than_one_sequence_from_its_share_at_every_position(
    weights: list[int],
) -> None:
    order = period_of(weights)
    period = sum(weights)
    assert len(order) == period
    counts = np.cumsum(order[:, None] == np.arange(len(weights)), axis=0)
    due = np.arange(1, period + 1)[:, None] * np.array(weights) / period
    assert np.abs(counts - due).max() < 1
    assert counts[-1].tolist() == weights  # so the next period begins as this one did


def test_random_weights_keep_the_same_bound() -> None:
    draw = random.Random(5)
    for _ in range(200):
        weights = [draw.randint(1, 40) for _ in range(draw.randint(2, 9))]
        order = period_of(weights)
        counts = np.cumsum(order[:, None] == np.arange(len(weights)), axis=0)
        due = np.arange(1, len(order) + 1)[:, None] * np.array(weights) / len(order)
        assert np.abs(counts - due).max() < 1, weights


def test_weights_are_exact_fractions_as_they_are_written() -> None:
    assert whole_weights([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert whole_weights([3, 1.5]) == [2, 1]
    assert whole_weights([1e-3, 1]) == [1, 1000]
    assert whole_weights([5.0]) == [1]
    with pytest.raises(DataError, match="no short period") as caught:
        whole_weights([0.1234567, 1])
    assert "Write: weights of fewer digits, such as 110, 890" in str(caught.value)


def stream(source: int, tokens: int, sequence: int = 4) -> Stream:
    """Ids that say where they are from: source x 10,000 + place."""
    ids = np.arange(tokens, dtype=np.uint32) + 10_000 * source
    return Stream(ids, num_bytes=3 * tokens, sequence=sequence, seed=source, masking=None)


def sources_in(inputs: torch.Tensor) -> list[int]:
    return (inputs[:, 0] // 10_000).tolist()


def test_a_mixture_is_its_streams_in_their_own_order() -> None:
    streams = [stream(0, 201), stream(1, 41), stream(2, 81)]
    mixture = Mixture(streams, [7, 2, 1])
    batch = mixture.batch(0, 500)
    taken = np.array(sources_in(batch.inputs))
    for source, one in enumerate(streams):
        (rows,) = np.nonzero(taken == source)
        alone = one.batch(0, len(rows))
        assert torch.equal(batch.inputs[rows], alone.inputs)
        assert torch.equal(batch.labels[rows], alone.labels)
    assert mixture.num_tokens == 323
    # 50, 10 and 20 sequences: the second begins anew behind 50 positions, where it has had 10.
    assert mixture.num_sequences == 50
    assert mixture.bytes_per_token == pytest.approx(3)
    assert mixture.counts(0) == [0, 0, 0]
    assert mixture.counts(1234) == np.bincount(sources_in(mixture.batch(0, 1234).inputs)).tolist()


def test_sequences_are_numbered_through_all_sources() -> None:
    mixture = Mixture([stream(0, 41), stream(1, 41)], [1, 1])
    numbers = mixture.sequences(3, 6)
    inputs = mixture.batch(3, 6).inputs
    for number, row in zip(numbers, inputs, strict=True):
        source, own = divmod(number, 10)
        assert row[0] == 10_000 * source + 4 * own


def test_where_one_source_has_nothing_known_of_its_text_nothing_is_said() -> None:
    unknown = Stream(np.arange(99), num_bytes=None, sequence=4, seed=0, masking=None)
    assert Mixture([stream(0, 99), unknown], [1, 1]).bytes_per_token is None


@pytest.mark.parametrize(
    ("ranks", "micro_batch", "micro_steps"), [(1, 12, 1), (2, 3, 2), (4, 1, 3)]
)
def test_the_counts_after_any_step_are_those_of_the_weights_at_any_layout(
    ranks: int, micro_batch: int, micro_steps: int
) -> None:
    mixture = Mixture([stream(0, 400), stream(1, 100), stream(2, 50)], [7, 2, 1])
    batch = Batching(12, micro_batch, micro_steps, ranks)
    counts = np.zeros(3, int)
    for step in range(40):
        if step == 17:  # another layout goes on, as after a resume
            batch = Batching(12, 2, 1, 6)
        taken = []
        for rank in range(batch.ranks):
            for number in batch.dealt(rank, batch.ranks):
                assert number is not None
                first = step * 12 + number * batch.micro_batch
                taken.append(mixture.batch(first, batch.micro_batch).inputs)
        rows = torch.cat(taken)
        counts += np.bincount(sources_in(rows), minlength=3)
        assert counts.tolist() == mixture.counts(12 * (step + 1))
        due = 12 * (step + 1) * np.array([0.7, 0.2, 0.1])
        assert np.abs(counts - due).max() < 1
        whole = mixture.batch(step * 12, 12).inputs
        assert sorted(rows.tolist()) == sorted(whole.tolist())


# -- options ---------------------------------------------------------------------------------------


def write_texts(folder: Path, word: str) -> str:
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"{word} {number} " * 30)
    return str(folder)


def prepare(folder: Path, *sources: SourceConfig, **more: Any) -> Data:
    config = DataConfig(sources=sources, **{"held_out": 0.2, **more})
    return prepare_data(config, seed=3, sequence=16, masked=False, folder=folder)


def test_sources_of_text_are_mixed_and_both_are_measured(tmp_path: Path) -> None:
    a, b = write_texts(tmp_path / "a", "alpha"), write_texts(tmp_path / "b", "beta")
    data = prepare(tmp_path / "run", SourceConfig(a, 3), SourceConfig(b, 1))
    texts = [data.tokenizer.decode(row) for row in data.train.batch(0, 40).inputs.tolist()]
    assert sum("lpha" in text for text in texts) == 30
    assert sum("beta" in text or "eta " in text for text in texts) == 10
    assert data.held_out.num_sequences > 0
    assert data.sources == (a, b)
    first, second, both = data.lines(400)
    assert first.startswith(f"{a}: 0.75 of the sequences, ")
    assert f"{300 / data.train.parts[0].stream.num_sequences:.2f} epochs" in first  # type: ignore[union-attr]
    assert second.startswith(f"{b}: 0.25 of the sequences, ")
    assert both.startswith("together ")


def test_weights_and_order_are_part_of_what_a_run_goes_on_with(tmp_path: Path) -> None:
    a, b = write_texts(tmp_path / "a", "alpha"), write_texts(tmp_path / "b", "beta")
    one = prepare(tmp_path / "run", SourceConfig(a, 3), SourceConfig(b, 1)).fingerprint
    assert (
        prepare(tmp_path / "run", SourceConfig(a, 0.75), SourceConfig(b, 0.25)).fingerprint == one
    )
    assert prepare(tmp_path / "run", SourceConfig(a, 1), SourceConfig(b, 1)).fingerprint != one
    assert prepare(tmp_path / "run", SourceConfig(b, 1), SourceConfig(a, 3)).fingerprint != one


def test_one_source_in_the_list_is_that_source(tmp_path: Path) -> None:
    a = write_texts(tmp_path / "a", "alpha")
    alone = prepare_data(
        DataConfig(source=a, held_out=0.2), seed=3, sequence=16, masked=False, folder=tmp_path
    )
    assert prepare(tmp_path / "run", SourceConfig(a, 2.5)).fingerprint == alone.fingerprint


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"source": "else"}, "stands beside data.sources"),
        ({"field": "body"}, "stands beside data.sources"),
        ({"tokenizer": "bpe"}, "would be trained on each of data.sources"),
    ],
)
def test_options_that_do_not_go_with_several_sources_are_refused(
    more: dict[str, Any], words: str, tmp_path: Path
) -> None:
    a, b = write_texts(tmp_path / "a", "alpha"), write_texts(tmp_path / "b", "beta")
    with pytest.raises(DataError, match=words):
        prepare(tmp_path / "run", SourceConfig(a), SourceConfig(b), **more)


def test_a_source_too_short_for_a_sequence_is_named(tmp_path: Path) -> None:
    a = write_texts(tmp_path / "a", "alpha")
    (tmp_path / "short.txt").write_text("abc")
    with pytest.raises(DataError, match="shorter than one sequence") as caught:
        prepare(tmp_path / "run", SourceConfig(a), SourceConfig(str(tmp_path / "short.txt")))
    assert "short.txt" in str(caught.value)
