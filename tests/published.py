"""Tiny packages that stand for those of published weights, and an archive for the labelled sentences."""

import io
import math
import tarfile
from dataclasses import replace
from fractions import Fraction

import gguf
import numpy as np
import tokenizers
import torch
from safetensors.torch import save_file

from collage.harness.tasks import recipes
from collage.harness.tasks.pretrained import minilm, reviews, smollm2

HEADS, KV_HEADS, WIDTH, HIDDEN, MLP, LAYERS = 4, 2, 8, 32, 64, 2
NEVER_RUN = 'raise AssertionError("a package that is only read was imported")'
TEXT = "Anne hoped 1814 would pass.\n"
ALPHABET = sorted(set(tokenizers.pre_tokenizers.ByteLevel.alphabet()))
VOCABULARY = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *ALPHABET, "Ġh", "18", "and", "of", "to"]
assert len(VOCABULARY) % 8 == 0  # as the real one: its embedding has no spare rows
ROWS = {"attn_q": HEADS * WIDTH, "attn_k": KV_HEADS * WIDTH, "attn_v": KV_HEADS * WIDTH, "ffn_gate": MLP, "ffn_up": MLP}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "a", "not", "##ly"]


def package(folder, what):
    """An installed package that must not run. Returns where its file goes."""
    file = folder / what.module / what.file
    file.parent.mkdir(parents=True)
    (folder / what.module / "__init__.py").write_text(NEVER_RUN)
    return file


def q4_1(bits, shape):
    """Blocks of 32: scale and least in float16, 16 bytes of two four-bit numbers. Returns bytes and exact values."""
    count = math.prod(shape) // 32
    scale = (bits.integers(1, 64, count) / 1024).astype(np.float16)
    least = (bits.integers(-64, 64, count) / 1024).astype(np.float16)
    numbers = bits.integers(0, 16, (count, 32), dtype=np.uint8)
    packed = numbers[:, :16] | numbers[:, 16:] << 4  # the first half in the low bits
    raw = np.concatenate([scale[:, None].view(np.uint8), least[:, None].view(np.uint8), packed], axis=1)
    blocks = zip(scale, least, numbers, strict=True)
    exact = [Fraction(float(s)) * int(n) + Fraction(float(low)) for s, low, row in blocks for n in row]
    return raw.reshape(shape[0], -1), values(exact, shape)


def q8_0(bits, shape):
    """Blocks of 32: a scale in float16, 32 signed bytes."""
    count = math.prod(shape) // 32
    scale = (bits.integers(1, 64, count) / 4096).astype(np.float16)
    numbers = bits.integers(-128, 128, (count, 32), dtype=np.int8)
    raw = np.concatenate([scale[:, None].view(np.uint8), numbers.view(np.uint8)], axis=1)
    exact = [Fraction(float(s)) * int(n) for s, row in zip(scale, numbers, strict=True) for n in row]
    return raw.reshape(shape[0], -1), values(exact, shape)


def values(exact, shape):
    """float32; each must hold the exact number."""
    found = torch.tensor([float(x) for x in exact], dtype=torch.float32)
    assert [Fraction(float(x)) for x in found] == exact
    return found.view(shape)


def tiny_smollm2(folder, monkeypatch):
    """The package and a recipe of its shape. Returns the exact numbers of its tensors, by llama.cpp's names."""
    large = recipes.RECIPES["smollm2-135m"]
    small = replace(
        large, hidden=HIDDEN, layers=LAYERS, heads=HEADS, intermediate=MLP, vocab=len(VOCABULARY),
        others={**large.others, "num_key_value_heads": KV_HEADS},
    )  # fmt: skip
    monkeypatch.setitem(recipes.RECIPES, small.name, small)
    writer = gguf.GGUFWriter(package(folder, smollm2.PACKAGE), "llama")
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] * 3 + [1] * (len(VOCABULARY) - 3))
    writer.add_token_merges(["Ġ h", "1 8"])
    writer.add_pad_token_id(2)
    exact = add_tensors(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.syspath_prepend(folder)
    return exact


def add_tensors(writer):
    """Norms in float32, the embedding in Q8_0, all else in Q4_1, as the real file has them."""
    bits, exact = np.random.default_rng(0), {}
    shapes = {**{name: (rows, HIDDEN) for name, rows in ROWS.items()}, "attn_output": (HIDDEN, HEADS * WIDTH)}
    shapes |= {"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "ffn_down": (HIDDEN, MLP)}
    layers = {f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in shapes.items()}
    for name, shape in {"token_embd": (len(VOCABULARY), HIDDEN), "output_norm": (HIDDEN,), **layers}.items():
        kind = float32 if len(shape) == 1 else q8_0 if name == "token_embd" else q4_1
        raw, exact[f"{name}.weight"] = kind(bits, shape)
        told = None if kind is float32 else gguf.GGMLQuantizationType[kind.__name__.upper()]
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=told)
    return exact


def float32(bits, shape):
    raw = bits.standard_normal(shape, dtype=np.float32)
    return raw, torch.from_numpy(raw)


def tiny_minilm(folder, monkeypatch):
    """The package and a recipe of its shape. Returns the weights of one such model, by the recipe's names."""
    small = replace(
        recipes.RECIPES["minilm"], hidden=16, layers=1, heads=2, intermediate=32, vocab=len(WORDS), positions=8,
        init_std=0.2,
        phases=(replace(recipes.RECIPES["minilm"].phases[0], seq_len=8),),
    )  # fmt: skip
    monkeypatch.setitem(recipes.RECIPES, "minilm", small)
    file = package(folder, minilm.PACKAGE)
    state = recipes.build("minilm", seed=7).state_dict()
    encoder = {name.removeprefix("bert."): w for name, w in state.items() if name.startswith("bert.")}
    save_file({**encoder, "embeddings.position_ids": torch.arange(8)[None]}, file)
    save_word_pieces(file.with_name("tokenizer.json"))
    monkeypatch.syspath_prepend(folder)
    return state


def save_word_pieces(path):
    pieces = tokenizers.Tokenizer(tokenizers.models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    pieces.normalizer = tokenizers.normalizers.BertNormalizer()
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    pieces.post_processor = tokenizers.processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    pieces.enable_truncation(4)  # as the real file does
    pieces.enable_padding(length=4)
    pieces.save(str(path))


RATED = [("1", "2.5", "A good film"), ("2", "-1.5", "a bad film"), ("3", "0.4", "a film"), ("4", "-0.5", "not good")]


def archive(path, rated):
    """The source distribution: an archive within an archive."""

    def packed(name, content):
        with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w:gz") as tar:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        return buffer.getvalue()

    table = "".join("\t".join(row) + "\n" for row in rated)
    inner = packed(reviews._TABLE, table.encode())
    path.write_bytes(packed(f"vaderSentiment-3.3.2/{reviews._INNER}", inner))
