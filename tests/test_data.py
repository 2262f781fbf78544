"""Vocabularies and corpora."""

import pytest
import torch

from collage.harness.tasks import data
from collage.harness.tasks.data import (
    byte_tokens,
    default_corpus,
    finetune_corpus,
    read_corpus,
    tokenizer_tokens,
)
from collage.harness.tasks.masks import CausalBlocks, MaskedBlocks

TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune – ☃\n"


def save_bpe(path, special_tokens):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special_tokens,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 50, trainer)
    tokenizer.enable_truncation(8)  # as MiniLM's file does: it must not shorten a corpus
    tokenizer.enable_padding(length=4096)
    tokenizer.save(str(path))
    return tokenizer


def test_bytes_are_the_text():
    tokens = byte_tokens()
    ids = tokens.encode(TEXT)
    assert ids.dtype == torch.int64
    assert bytes((ids - data.FIRST_BYTE).tolist()).decode() == TEXT
    assert tokens.encode("").shape == (0,)
    assert tokens.encode("").dtype == torch.int64


def test_byte_ids_and_special_ids_are_apart():
    tokens = byte_tokens()
    assert len(tokens.ordinary_ids) == 256
    assert not set(tokens.ordinary_ids.tolist()) & set(tokens.special_ids)
    assert {tokens.pad_id, tokens.mask_id} <= set(tokens.special_ids)
    assert max(tokens.ordinary_ids.tolist()) < tokens.vocab_size == 264


def test_tokenizer_file_round_trip(tmp_path):
    original = save_bpe(tmp_path / "bpe.json", ["<pad>", "<mask>", "<s>"])
    tokens = tokenizer_tokens(tmp_path / "bpe.json")
    ids = tokens.encode(TEXT * 20)
    assert original.decode(ids.tolist()) == TEXT * 20
    assert len(ids) < len((TEXT * 20).encode())
    assert (tokens.pad_id, tokens.mask_id, tokens.special_ids) == (0, 1, (0, 1, 2))
    assert ids.max() < tokens.vocab_size
    assert tokens.vocab_size % 8 == 0
    assert set(ids.tolist()) <= set(tokens.ordinary_ids.tolist())


def test_special_tokens_in_the_text_are_text(tmp_path):
    original = save_bpe(tmp_path / "bpe.json", ["<mask>"])
    ids = tokenizer_tokens(tmp_path / "bpe.json").encode("a <mask> b")
    assert original.decode(ids.tolist()) == "a <mask> b"
    assert 0 not in ids


def test_tokenizer_without_padding_gets_an_id_for_it(tmp_path):
    original = save_bpe(tmp_path / "bpe.json", ["[MASK]"])
    tokens = tokenizer_tokens(tmp_path / "bpe.json")
    assert tokens.pad_id == original.get_vocab_size() < tokens.vocab_size
    assert tokens.pad_id not in tokens.ordinary_ids


def test_tokenizer_without_mask_serves_causal_models_only(tmp_path):
    save_bpe(tmp_path / "bpe.json", ["<pad>"])
    tokens = tokenizer_tokens(tmp_path / "bpe.json")
    ids = tokens.encode(TEXT * 10)
    assert len(CausalBlocks(ids, 16)) > 0
    with pytest.raises(ValueError, match=r"'bpe\.json': a masked model .* needs a \[MASK\] or <mask> token"):
        MaskedBlocks(ids, 16, tokens)


@pytest.mark.parametrize("content", [None, "not json", "{}", '{"version": "1.0", "model": {"type": "None"}}'])
def test_unusable_tokenizer_file(tmp_path, content):
    pytest.importorskip("tokenizers")
    if content is not None:
        (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer '.*t\.json': cannot be used .*Tokenizer\.save"):
        tokenizer_tokens(tmp_path / "t.json")


def test_tokenizer_with_an_empty_vocabulary(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "t.json"))
    with pytest.raises(ValueError, match="a JSON file with a vocabulary"):
        tokenizer_tokens(tmp_path / "t.json")


@pytest.mark.parametrize(
    ("corpus", "train", "validation"), [(default_corpus, 1.11e6, 4.6e5), (finetune_corpus, 4.7e5, 8e4)]
)
def test_embedded_corpora(corpus, train, validation):
    c = corpus()
    assert len(c.train) == pytest.approx(train, rel=0.05)
    assert len(c.validation) == pytest.approx(validation, rel=0.05)
    train_text, validation_text = (bytes((ids - data.FIRST_BYTE).tolist()) for ids in (c.train, c.validation))
    for start in range(0, len(validation_text) - 200, 1000):
        assert validation_text[start : start + 200] not in train_text, "validation text is trained on"


def test_last_tenth_is_held_out(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(32, 127)) * 11)  # 1,045 bytes
    c = read_corpus([tmp_path / "a.txt"])
    assert (len(c.train), len(c.validation)) == (941, 104)
    whole = byte_tokens().encode((tmp_path / "a.txt").read_text())
    assert torch.equal(torch.cat([c.train, c.validation]), whole)
    assert c.validation_files == ()
    again = read_corpus([str(tmp_path / "a.txt")])
    assert torch.equal(again.train, c.train)


def test_folders_are_read_in_sorted_order(tmp_path):
    for name, text in {"b/z.py": "3", "a.txt": "1", "b.md": "2", "b/y.rst": "4", "b/.git/x.txt": "?"}.items():
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_text(text)
    (tmp_path / "d" / "__init__.py").touch()
    (tmp_path / "d" / "picture.png").write_bytes(b"\0\1")
    (tmp_path / "v.log").write_text("held out")  # a named file may have any suffix
    c = read_corpus([tmp_path / "d"], [tmp_path / "v.log"])
    assert bytes((c.train - data.FIRST_BYTE).tolist()).decode() == "1432"
    assert bytes((c.validation - data.FIRST_BYTE).tolist()).decode() == "held out"
    assert [f.rsplit("/", 1)[1] for f in c.train_files] == ["a.txt", "y.rst", "z.py", "b.md"]
    assert c.validation_files == (str(tmp_path / "v.log"),)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "no such file or folder"),
        (b"", "the file is empty"),
        (b"PK\3\4\0\0", "a binary file"),
        ("Café".encode("latin-1"), "not UTF-8 at byte 3"),
        ("wide".encode("utf-16"), "a binary file"),
    ],
)
def test_unreadable_file_is_named(tmp_path, content, why):
    path = tmp_path / "f.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"data '.*f\.txt': {why}.*accepted: a UTF-8 text file, or a folder"):
        read_corpus([path])


def test_other_refusals(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty': this folder holds no text; accepted: .*\*\.md"):
        read_corpus([tmp_path / "empty"])
    with pytest.raises(ValueError, match="no file given"):
        read_corpus([])
    with pytest.raises(ValueError, match=r"a\.txt': is also trained on"):
        read_corpus([tmp_path], [tmp_path / "a.txt"])
