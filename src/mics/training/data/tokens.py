"""Text to ids and back: bytes, a BPE trained on the corpus, or a saved tokenizer.

All three are transformers' fast tokenizers, so that what is saved with a model loads anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from mics.errors import DataError
from mics.training.data.cutting import broken

_WORD = 256  # bytes without a blank that a BPE is trained on: a word costs their square
_MOST_IDS = 2**20  # that may be missing below the largest id of a tokenizer
_MOST_BYTES = 1 << 30  # of a file of a tokenizer
_FILES = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.json")

SEPARATOR, MASK, PAD = "<|endoftext|>", "<|mask|>", "<|pad|>"

OWN_SPECIALS = (SEPARATOR, MASK, PAD)

Ids = NDArray[np.uint32]


class Tokenizer:
    """A tokenizer as training needs it: no special ids are added, and unless asked none is read.

    Args:
        fast: what does the work, and what ``save`` writes.
        is_bytes: ids below 256 are bytes, so that encoding is a copy.

    Raises:
        DataError: it has no token that can stand between documents.
    """

    def __init__(self, fast: PreTrainedTokenizerFast, *, is_bytes: bool = False) -> None:
        separator = fast.eos_token_id if fast.eos_token_id is not None else fast.sep_token_id
        if separator is None:
            raise DataError(
                "The tokenizer has no token to put between documents.",
                numbers=f"Its special tokens are {fast.all_special_tokens}.",
                write="a tokenizer with an eos_token or sep_token",
            )
        self._fast = fast
        # Whatever its file says: a document is all of its text, and nothing more.
        fast.backend_tokenizer.no_truncation()
        fast.backend_tokenizer.no_padding()
        self.is_bytes = is_bytes
        self.reads_specials = False
        # Ids may have gaps, so that the largest says more than their number.
        self.size = 1 + max(fast.get_vocab().values())
        self.dtype = "<u2" if self.size <= 2**16 else "<u4"  # of its ids in files
        self.separator = int(separator)
        self.mask: int | None = fast.mask_token_id
        added = fast.added_tokens_decoder.values()
        self.specials = sorted({str(token) for token in added if token.special})

    @property
    def fast(self) -> PreTrainedTokenizerFast:
        """What does the work; it has the chat template."""
        return self._fast

    @property
    def reads_specials(self) -> bool:
        """Whether text that spells a special token is that token, and not letters."""
        return not self._fast.backend_tokenizer.encode_special_tokens

    @reads_specials.setter
    def reads_specials(self, value: bool) -> None:
        self._fast.backend_tokenizer.encode_special_tokens = not value

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of special tokens."""
        added = self._fast.added_tokens_decoder.items()
        return frozenset(int(number) for number, token in added if token.special)

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return [int(token) for token in next(self.encode_all([text.encode()]))]

    def encode_all(self, documents: Sequence[bytes]) -> Iterator[Ids]:
        """The ids of many documents, in parallel where the tokenizer can."""
        if self.is_bytes and not self.reads_specials:
            for document in documents:
                yield np.frombuffer(document, dtype=np.uint8).astype(np.uint32)
            return
        texts = [document.decode("utf-8", "replace") for document in documents]
        for encoding in self._fast.backend_tokenizer.encode_batch_fast(
            texts, add_special_tokens=False
        ):
            yield np.asarray(encoding.ids, dtype=np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special ones spelled out."""
        return str(self._fast.decode(list(ids), skip_special_tokens=False))

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json`` for ``AutoTokenizer``."""
        before, self.reads_specials = self.reads_specials, True
        self._fast.save_pretrained(str(folder))
        self.reads_specials = before


def byte_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are bytes; the separator, the mask and padding follow."""
    vocabulary = {letter: value for value, letter in enumerate(_letters_of_bytes())}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    return Tokenizer(_fast(_byte_level(backend)), is_bytes=True)


def train_bpe(documents: Iterable[bytes], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of ``vocabulary`` ids (fewer, where the text has fewer pairs)."""
    backend = _byte_level(Backend(models.BPE()), split_words=True)
    trainer: Any = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SEPARATOR, PAD, MASK],  # 1 is what RoBERTa calls padding
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    parts = (part for document in documents for part in broken(document, _WORD))
    backend.train_from_iterator((part.decode("utf-8", "replace") for part in parts), trainer)
    return Tokenizer(_fast(backend))


def saved_tokenizer(name: str) -> Tokenizer:
    """A folder or ``tokenizer.json`` that transformers can read, or a hub name.

    Raises:
        DataError: there is none, it has no fast form, or ids that a table would be too long for.
    """
    path = Path(name).expanduser()
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = [path / file for file in _FILES if (path / file).exists()]
    else:
        files = _of_hub(name)
    for file in files:
        _check_ids(name, file)
    return known_tokenizer(name)


def known_tokenizer(name: str) -> Tokenizer:
    """A tokenizer whose files have been checked before; see ``saved_tokenizer``."""
    path = Path(name).expanduser()
    try:
        if path.is_file():
            loaded: Any = PreTrainedTokenizerFast(tokenizer_file=str(path))  # type: ignore[no-untyped-call]
            _name_specials(loaded)
        elif path.is_dir() or name.count("/") == 1:
            where = str(path) if path.is_dir() else name
            loaded = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        else:
            raise OSError("no file or folder of that name")
    except Exception as error:  # the libraries raise plain Exceptions for files they cannot read
        raise _no_tokenizer(name, error) from None
    if not isinstance(loaded, PreTrainedTokenizerFast):
        raise DataError(
            f"The tokenizer {name!r} has no fast form (tokenizer.json).",
            numbers=f"It is a {type(loaded).__name__}.",
            write="a tokenizer that was saved with its tokenizer.json",
        )
    return Tokenizer(loaded)


def _of_hub(name: str) -> list[Path]:
    """The files of a tokenizer of the hub that have ids in them, those that there are."""
    found: list[Path] = []
    for file in _FILES if name.count("/") == 1 else ():
        try:
            path = cached_file(name, file)
        except Exception:  # said where the tokenizer is loaded, which has the same cause
            if not found:  # no network, or no fast form: asking for more takes long
                break
        else:
            found += [] if path is None else [Path(path)]
    return found


def _check_ids(name: str, file: Path) -> None:
    """Check the ids in a file before a library makes a table as long as the largest.

    Raises:
        DataError: the file is no JSON, too large, or has an id far above their number.
    """
    try:
        if not file.is_file():
            raise OSError("it is no file")
        with file.open("rb") as stream:
            data = stream.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise OSError(f"it has more than {_MOST_BYTES:,} bytes")
        ids = _ids_in(json.loads(data), file.name)
    except (OSError, ValueError, RecursionError) as error:
        raise _no_tokenizer(name, error) from None
    if ids and max(ids) > len(ids) + _MOST_IDS:
        raise DataError(
            f"The tokenizer {name!r} has an id far above the number of its ids.",
            numbers=f"{file.name} has {len(ids):,} ids and {max(ids):,} as the largest; a model "
            "would have a row for each of them.",
            write="--data.tokenizer <one whose ids have at most 2^20 gaps>",
        )


def _ids_in(told: Any, name: str) -> list[int]:
    """Every id that a file of a tokenizer gives, whichever of them it is."""
    if not isinstance(told, dict):
        return []
    model, added, decoder = (told.get(k) for k in ("model", "added_tokens", "added_tokens_decoder"))
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if name in ("vocab.json", "added_tokens.json"):
        vocabulary = told
    ids: list[Any] = []
    if isinstance(vocabulary, dict):
        ids += vocabulary.values()
    if isinstance(vocabulary, list):
        ids += range(len(vocabulary))
    if isinstance(added, list):
        ids += [entry.get("id") for entry in added if isinstance(entry, dict)]
    if isinstance(decoder, dict):
        ids += [int(key) for key in decoder if key.isdecimal()]
    return [value for value in ids if isinstance(value, int)]


def _no_tokenizer(name: str, error: Exception) -> DataError:
    return DataError(
        f"There is no tokenizer {name!r}.",
        numbers=f"{type(error).__name__}: {error}".splitlines()[0],
        write="--data.tokenizer bytes, bpe, or <folder, tokenizer.json, hub name>",
    )


def _byte_level(backend: Backend, *, split_words: bool = False) -> Backend:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    backend.decoder = decoders.ByteLevel()
    return backend


def _fast(backend: Backend) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        mask_token=MASK,
        pad_token=PAD,
    )


def _name_specials(fast: PreTrainedTokenizerFast) -> None:
    """A bare ``tokenizer.json`` lists special tokens without saying which is which."""
    usual = {
        "eos_token": (SEPARATOR, "</s>", "<|end_of_text|>", "<eos>"),
        "sep_token": ("[SEP]",),
        "mask_token": (MASK, "[MASK]", "<mask>"),
    }
    known = fast.get_vocab()
    for role, names in usual.items():
        found = next((name for name in names if name in known), None)
        if found is not None and getattr(fast, role) is None:
            setattr(fast, role, found)


def _letters_of_bytes() -> list[str]:
    """The letter that byte-level tokenizers write for each byte, by byte.

    Printable Latin-1 stands for itself, the others for the letters from U+0100 on (GPT-2's map).
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(value if value in printable else next(others)) for value in range(256)]
