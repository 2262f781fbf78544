"""Text -> tokens: the vocabulary and the corpora."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tokenizers import Tokenizer

PAD, BOS, EOS, MASK = range(4)
FIRST_BYTE = 4  # byte b is token FIRST_BYTE + b
BYTE_VOCAB = 264  # 4 + 256, rounded up to the multiple of 8 that matrix units like
SUFFIXES = (".md", ".py", ".rst", ".txt")
ACCEPTED = f"a UTF-8 text file, or a folder of them ({', '.join('*' + s for s in SUFFIXES)})"


@dataclass(frozen=True, eq=False)
class Tokens:
    """A vocabulary, and the function from text to its ids."""

    name: str
    encode: Callable[[str], torch.Tensor]  # text -> [n] int64
    vocab_size: int  # rows of an embedding; the last few may stand for nothing
    pad_id: int
    mask_id: int | None
    special_ids: tuple[int, ...]
    ordinary_ids: torch.Tensor  # [k] int64: the ids that text is made of

    def require_mask(self) -> int:
        if self.mask_id is None:
            why = "a masked model (bert, roberta) needs a [MASK] or <mask> token and it has none"
            raise ValueError(f"tokenizer {self.name!r}: {why}; add that special token, or train a gpt or llama")
        return self.mask_id


@dataclass(frozen=True, eq=False)
class Corpus:
    """Text to train on and text to be judged by, as tokens."""

    name: str
    tokens: Tokens
    train: torch.Tensor  # [n] int64
    validation: torch.Tensor  # [m] int64
    train_files: tuple[str, ...]
    validation_files: tuple[str, ...]  # empty: the last tenth of the training text

    def checksum(self) -> int:
        """Of the tokens: another text has another, and so has another vocabulary."""
        return zlib.crc32(self.validation.numpy().tobytes(), zlib.crc32(self.train.numpy().tobytes()))


def byte_tokens() -> Tokens:
    """One token per byte of the UTF-8 text: nothing to train, nothing to download, no unknown word."""

    def encode(text: str) -> torch.Tensor:
        raw = bytearray(text, "utf-8")
        raw_ids = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0)  # frombuffer refuses no bytes
        return raw_ids.to(torch.int64) + FIRST_BYTE

    ordinary = torch.arange(FIRST_BYTE, FIRST_BYTE + 256)
    return Tokens("bytes", encode, BYTE_VOCAB, PAD, MASK, (PAD, BOS, EOS, MASK), ordinary)


def tokenizer_tokens(path: Path | str) -> Tokens:
    """The vocabulary of a `tokenizers` JSON file.

    Its post-processor, padding and truncation are not used. Special tokens spelled out in the text are read as text.
    Without a [PAD] or <pad> of its own, padding becomes one more id after the last.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
        max(tokenizer.get_vocab().values())
    except Exception as error:  # the library raises bare Exception; an empty vocabulary has no last id
        raise ValueError(
            f"tokenizer '{path}': cannot be used ({error}); accepted: a JSON file with a vocabulary, as written by "
            "Tokenizer.save of the tokenizers library or found as tokenizer.json beside a model"
        ) from error
    return tokens_of(Path(path).name, tokenizer)


def tokens_of(name: str, tokenizer: Tokenizer, pad: int | None = None) -> Tokens:
    """The vocabulary of a tokenizer of the `tokenizers` library, as `tokenizer_tokens` has it.

    Args:
        name: what it is called.
        tokenizer: is changed: it neither pads nor truncates any more.
        pad: the token that pads; by default the one of that name, or a new one.
    """
    ids: dict[str, int] = tokenizer.get_vocab()
    last = max(ids.values())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True

    def encode(text: str) -> torch.Tensor:
        (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return torch.tensor(encoding.ids, dtype=torch.int64)

    mask = ids.get("[MASK]", ids.get("<mask>"))
    pad = ids.get("[PAD]", ids.get("<pad>", last + 1)) if pad is None else pad
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    special |= {i for i in (pad, mask) if i is not None}
    ordinary = torch.tensor(sorted(set(ids.values()) - special))
    rows = -(-(max(last, pad) + 1) // 8) * 8
    return Tokens(name, encode, rows, pad, mask, tuple(sorted(special)), ordinary)


def default_corpus(tokens: Tokens | None = None) -> Corpus:
    """Two novels by Jane Austen to train on, a third for validation."""
    return _embedded("austen", ("prideprejudice", "northangerabbey"), ("persuasion",), tokens)


def finetune_corpus(tokens: Tokens | None = None) -> Corpus:
    """Python source: modules of CPython's standard library, other modules for validation."""
    return _embedded("python", ("train",), ("validation",), tokens)


def _embedded(name: str, train: tuple[str, ...], validation: tuple[str, ...], tokens: Tokens | None) -> Corpus:
    folder = resources.files("collage") / "data" / name
    tokens = tokens or byte_tokens()
    ids = [torch.cat([tokens.encode((folder / f"{n}.txt").read_text("utf-8")) for n in f]) for f in (train, validation)]
    return Corpus(name, tokens, ids[0], ids[1], train, validation)


def read_corpus(
    paths: Sequence[Path | str], validation: Sequence[Path | str] | None = None, tokens: Tokens | None = None
) -> Corpus:
    """Text files and folders, one after the other; without `validation` the last tenth is kept for it.

    A named file may have any suffix. A folder stands for its *.md, *.py, *.rst and *.txt files at any depth, sorted by
    path; hidden and empty ones are left out.
    """
    tokens = tokens or byte_tokens()
    train_files = _text_files(paths)
    validation_files = _text_files(validation or ())
    shared = {f.resolve() for f in train_files} & {f.resolve() for f in validation_files}
    if shared:
        raise ValueError(f"validation '{min(shared)}': is also trained on; give training and validation separate files")
    if not train_files:
        raise ValueError(f"data: no file given; accepted: {ACCEPTED}")
    train = torch.cat([tokens.encode(read_text(f)) for f in train_files])
    if validation_files:
        held_out = torch.cat([tokens.encode(read_text(f)) for f in validation_files])
    else:
        train, held_out = train.tensor_split([len(train) - len(train) // 10])
    names, held_out_names = (tuple(map(str, files)) for files in (train_files, validation_files))
    return Corpus(names[0], tokens, train, held_out, names, held_out_names)


def _text_files(paths: Sequence[Path | str]) -> list[Path]:
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = [f for f in sorted(path.rglob("*")) if _is_text_of(path, f)]
            if not found:
                raise ValueError(f"data '{path}': this folder holds no text; accepted: {ACCEPTED}")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"data '{path}': no such file or folder; accepted: {ACCEPTED}")
    return files


def _is_text_of(folder: Path, file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.suffix in SUFFIXES and not hidden and file.is_file() and file.stat().st_size > 0


def read_text(path: Path) -> str:
    raw = path.read_bytes()
    if not raw:
        raise ValueError(f"data '{path}': the file is empty; accepted: {ACCEPTED}")
    if b"\0" in raw:
        raise ValueError(f"data '{path}': a binary file (it holds zero bytes); accepted: {ACCEPTED}")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data '{path}': not UTF-8 at byte {error.start}; accepted: {ACCEPTED}") from error
