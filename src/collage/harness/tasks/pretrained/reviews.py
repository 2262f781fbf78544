"""Sentences and whether each praises or blames: movie reviews rated by people, or a file of one's own."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import torch

from collage.harness.tasks.data import read_text
from collage.harness.tasks.examples import Columns, Examples
from collage.harness.tasks.pretrained import minilm

Labelled: TypeAlias = "list[tuple[int, str]]"  # 0 or 1, and the sentence

SDIST = "vaderSentiment-3.3.2.tar.gz"
_INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
_TABLE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
CLEAR = 0.5  # of the raters' mean, from -4 to 4: what is nearer to 0 is neither praise nor blame
HELD_OUT = 5  # one sentence in so many
ACCEPTED = f"{SDIST}, or UTF-8 lines of 0 or 1, a tab and a sentence"


def downloaded() -> Path:
    """Where the source distribution with the reviews is expected. Raises ValueError, with the command, if it is not."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "collage"
    if not (folder / SDIST).is_file():
        raise ValueError(
            f"data: the movie reviews are in the source distribution of vaderSentiment; fetch it with `pip download "
            f"--no-deps --no-binary vaderSentiment --dest {folder} vaderSentiment==3.3.2`, or give --data ({ACCEPTED})"
        )
    return folder / SDIST


def examples(data: Sequence[str], validation: Sequence[str], seq_len: int) -> Examples:
    """Of these files, or of the movie reviews; without `validation` every fifth sentence is held out.

    Raises ValueError for a file that is missing or of another form.
    """
    train = [row for path in data or (downloaded(),) for row in _read(Path(path))]
    held_out = [row for path in validation for row in _read(Path(path))] or train[::HELD_OUT]
    if not validation:
        del train[::HELD_OUT]
    name = Path(data[0]).name if data else "movie reviews"
    return Examples(name, _columns(train, seq_len), _columns(held_out, seq_len))


def _read(path: Path) -> Labelled:
    if not path.is_file():
        raise ValueError(f"data '{path}': no such file; accepted: {ACCEPTED}")
    return _rated(path) if path.name.endswith(".tar.gz") else _lines(path)


def _lines(path: Path) -> Labelled:
    rows: Labelled = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        label, tab, sentence = line.partition("\t")
        if label not in ("0", "1") or not tab:
            raise ValueError(f"data '{path}': line {number} is not 0 or 1, a tab and a sentence; accepted: {ACCEPTED}")
        rows.append((int(label), sentence))
    return rows


def _rated(path: Path) -> Labelled:
    """1 where people liked the film, by the sign of their mean rating."""
    rows = [line.split("\t") for line in _table(path).splitlines()]
    return [(int(float(mean) > 0), sentence) for _, mean, sentence in rows if abs(float(mean)) >= CLEAR]


def _table(path: Path) -> str:
    """number, mean rating, sentence: tabs between. An archive within the archive has it."""
    try:
        with tarfile.open(path) as outer:
            inner = _member(outer, f"{path.name.removesuffix('.tar.gz')}/{_INNER}")
        with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
            return _member(archive, _TABLE).decode("utf-8")
    except (tarfile.TarError, KeyError, OSError) as error:
        raise ValueError(f"data '{path}': cannot be read ({error}); accepted: {ACCEPTED}") from None


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    return file.read() if file else b""


def _columns(rows: Labelled, seq_len: int) -> Columns:
    """Each sentence as `seq_len` word pieces, cut off or padded."""
    tokenizer = minilm.tokenizer()
    tokenizer.enable_truncation(seq_len)
    tokenizer.enable_padding(length=seq_len)
    encoded = tokenizer.encode_batch([sentence for _, sentence in rows])
    return {
        "input_ids": torch.tensor([e.ids for e in encoded]),
        "attention_mask": torch.tensor([e.attention_mask for e in encoded]),
        "labels": torch.tensor([label for label, _ in rows]),
    }
