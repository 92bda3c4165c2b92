"""UMT5's tokenizer, from tokenizer.json or spiece.model, with Wan's text cleaning.

Both files go through one engine (the `tokenizers` library, as upstream's AutoTokenizer does), so that they agree in odd
cases too: sentencepiece itself normalises '½' + U+0301 differently and reads '</s>' in a prompt as text.
"""

import html
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from fps_jax.files import MAX_JSON, check_regular, read_json

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
_UNIGRAM = 1  # TrainerSpec.ModelType
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # SentencePiece.Type


def clean(text: str) -> str:
    """Wan's cleaning of a prompt: mojibake mended, HTML entities resolved (twice), whitespace collapsed and stripped.

    Source: wan/modules/tokenizers.py (basic_clean, whitespace_clean); diffusers' prompt_clean is the same.
    """
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def vocabulary(folder: str | Path) -> int:
    """The number that all ids of a tokenizer's folder are below, of its files alone: no tokenizer is built.

    Raises: ValueError for a file that can't be read; FileNotFoundError.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        content = read_json(folder / "tokenizer.json")
        try:
            words = content["model"]["vocab"]
            added = [token["id"] for token in content.get("added_tokens") or ()]
            return max(len(words), *(number + 1 for number in added), 0)
        except (KeyError, TypeError):
            raise ValueError(f"{folder / 'tokenizer.json'} holds no vocabulary; download it again") from None
    check_regular(folder / "spiece.model", MAX_JSON)
    try:
        return sum(number == 1 for number, _ in _fields((folder / "spiece.model").read_bytes()))
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"{folder / 'spiece.model'} can't be read as a sentencepiece model ({error}); download it again"
        ) from None


def check_vocabulary(folder: str | Path, words: int, rows: int) -> None:
    """Raises ValueError for a tokenizer with more words than the text encoder's table has rows: it is another model's."""
    if words > rows:
        raise ValueError(
            f"{folder} is another model's tokenizer: {words} words, and the text encoder's table has {rows} rows; give the folder "
            "of UMT5's (--tokenizer DIR of fps-convert)"
        )


class Tokenizer:
    """Prompts to padded token ids. Make one with `Tokenizer.from_directory`."""

    def __init__(self, engine: Any, source: Path):
        self._engine, self.source = engine, source
        engine.no_padding()
        engine.no_truncation()
        ids = {token: engine.token_to_id(token) for token in (PAD, EOS, UNK)}
        missing = [token for token, number in ids.items() if number is None]
        if missing:
            raise ValueError(f"{source} has no token {missing[0]!r}, so it isn't UMT5's tokenizer; download it again")
        self.pad_id, self.eos_id, self.unk_id = ids[PAD], ids[EOS], ids[UNK]

    @classmethod
    def from_directory(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer of a directory: its tokenizer.json, else its spiece.model.

        Raises: FileNotFoundError if neither is there; ValueError if the file can't be read as what its name says.
        """
        directory = Path(path)
        for name, read in (("tokenizer.json", _read_json), ("spiece.model", _read_sentencepiece)):
            if (directory / name).is_file():
                check_regular(directory / name, MAX_JSON)
                return cls(read(directory / name), directory / name)
        raise FileNotFoundError(
            f"{directory} holds neither tokenizer.json nor spiece.model; copy them there from google/umt5-xxl"
        )

    @property
    def vocab_size(self) -> int:
        """Ids are below this (256300 for umt5-xxl; the text encoder's table is padded beyond it)."""
        return self._engine.get_vocab_size()

    def ids(self, text: str) -> list[int]:
        """Ids of a text as it is: not cleaned, nothing appended."""
        return self._engine.encode(text, add_special_tokens=False).ids

    def count(self, text: str) -> int:
        """Tokens of a prompt that isn't cut, the end token included."""
        return len(self.ids(clean(text))) + 1

    def __call__(
        self, prompts: Sequence[str], max_length: int = 512
    ) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
        """Cleaned, tokenized, cut to `max_length` with the end token kept, padded to it.

        Args:
          prompts: strings; an empty one is the end token alone.
          max_length: T, at least 1.
        Returns: (ids, mask), int32; mask is 1 for tokens (the end token included), 0 for padding.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"prompts={prompts!r} must be a list of strings")
        if max_length < 1:
            raise ValueError(f"max_length={max_length} leaves no room for the end token; use at least 1")
        ids = np.full((len(prompts), max_length), self.pad_id, np.int32)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            tokens = [*self.ids(clean(prompt))[: max_length - 1], self.eos_id]
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return ids, mask


def _read_json(path: Path) -> Any:
    import tokenizers

    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} can't be read as a tokenizer ({str(error)[:200]}); download it again") from error


def _read_sentencepiece(path: Path) -> Any:
    """The `tokenizers` engine with a sentencepiece model's vocabulary and normaliser, as a tokenizer.json has them."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    try:
        model = _message(path.read_bytes())
        pieces = [_message(piece) for piece in model[1]]
        vocab = [(piece[1][0].decode(), _float(piece.get(2))) for piece in pieces]
        kinds = [piece.get(3, [1])[0] for piece in pieces]
        trainer, normalizer = _message(model[2][0]), _message(model[3][0])
        charsmap = normalizer.get(2, [b""])[0]
        if trainer.get(3, [_UNIGRAM])[0] != _UNIGRAM:
            raise NotImplementedError(f"{path} isn't a unigram model, which is what UMT5's tokenizer is")
        steps = [normalizers.Precompiled(charsmap)] if charsmap else []
        byte_fallback = bool(trainer.get(35, [0])[0])
        engine = Tokenizer(models.Unigram(vocab, kinds.index(_UNKNOWN), byte_fallback))
    except NotImplementedError:
        raise
    except Exception as error:  # whatever a damaged file leads to
        raise ValueError(f"{path} can't be read as a sentencepiece model ({error}); download it again") from error
    steps += [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), " ")]
    engine.normalizer = normalizers.Sequence(steps)
    engine.pre_tokenizer = pre_tokenizers.Metaspace()
    special = [
        name for (name, _), kind in zip(vocab, kinds, strict=True) if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    engine.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    return engine


def _float(values: list[Any] | None) -> float:
    return struct.unpack("<f", values[0])[0] if values else 0.0


def _message(data: bytes) -> dict[int, list[Any]]:
    """Fields of a protobuf message by number: ints for varints, bytes for the rest."""
    fields: dict[int, list[Any]] = {}
    for number, value in _fields(data):
        fields.setdefault(number, []).append(value)
    return fields


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    while at < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"wire type {wire}")
        size = {1: 8, 5: 4}.get(wire) or varint()
        if at + size > len(data):
            raise ValueError("cut short")
        yield number, data[at : at + size]
        at += size
