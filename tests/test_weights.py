"""Models on disk: kinds of layers by name, and files that are none.

What is read from each format is tested with `collage preflight`.
"""

import argparse

import pytest
import torch
from safetensors.torch import save_file

from collage.harness.tasks.weights import kind_of, read


@pytest.mark.parametrize(("name", "kind"), [
    ("transformer.wte.weight", "embedding"), ("wpe.weight", "embedding"),
    ("model.embed_tokens.weight", "embedding"), ("bert.embeddings.word_embeddings.weight", "embedding"),
    ("roberta.embeddings.position_embeddings.weight", "embedding"),
    ("h.3.attn.c_proj.weight", "attention"), ("model.layers.0.self_attn.q_proj.weight", "attention"),
    ("bert.encoder.layer.0.attention.self.query.weight", "attention"),
    ("bert.encoder.layer.0.attention.output.dense.weight", "attention"),
    ("h.3.mlp.c_proj.weight", "mlp"), ("model.layers.0.mlp.gate_proj.weight", "mlp"),
    ("bert.encoder.layer.0.intermediate.dense.weight", "mlp"), ("bert.encoder.layer.0.output.dense.weight", "mlp"),
    ("h.3.ln_2.weight", "norm"), ("transformer.ln_f.weight", "norm"), ("model.norm.weight", "norm"),
    ("model.layers.0.post_attention_layernorm.weight", "norm"), ("bert.embeddings.LayerNorm.weight", "norm"),
    ("bert.encoder.layer.0.output.LayerNorm.gamma", "norm"), ("cls.predictions.transform.LayerNorm.weight", "norm"),
    ("h.3.ln_2.bias", "bias"), ("bert.embeddings.LayerNorm.beta", "bias"), ("lm_head.bias", "bias"),
    ("lm_head.weight", "head"), ("lm_head.dense.weight", "head"), ("cls.predictions.decoder.weight", "head"),
    ("classifier.dense.weight", "head"), ("score.weight", "head"), ("bert.pooler.dense.weight", "head"),
    ("vision.patch.weight", "other"),
])  # fmt: skip
def test_kinds_by_name(name, kind):
    assert kind_of(name) == kind


def test_a_state_dict_from_before_the_zip_format(tmp_path):
    torch.save({"wte.weight": torch.ones(3, 2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert [(e.name, e.numel) for e in read(tmp_path / "old.bin")] == [("wte.weight", 6)]


def test_tied_weights_of_a_state_dict_count_once(tmp_path):
    shared = torch.ones(3, 2)
    torch.save({"wte.weight": shared, "lm_head.weight": shared, "half": shared[:1]}, tmp_path / "m.pt")
    assert [(e.name, e.numel) for e in read(tmp_path / "m.pt")] == [("wte.weight", 6), ("half", 2)]


def test_files_that_are_not_models_are_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors.index.json").write_text('{"weight_map": {"w": "gone.safetensors"}}')
    (tmp_path / "list.index.json").write_text("[]")
    for name in ("text.safetensors", "text.pt", "text.md"):
        (tmp_path / name).write_text("It is a truth universally acknowledged\n" * 9)
    torch.save({"lr": 0.1}, tmp_path / "numbers.pt")
    torch.save(argparse.Namespace(), tmp_path / "object.pt")
    torch.save({"w": torch.ones(99)}, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:-300])
    for name, kind, message in (
        ("gone.safetensors", FileNotFoundError, "gone.safetensors: no such file or folder"),
        ("empty", FileNotFoundError, "no model in this folder; want one of model.safetensors"),
        ("broken", FileNotFoundError, "gone.safetensors: no such file or folder .named by the index"),
        ("list.index.json", ValueError, "not an index of shards"),
        ("text.safetensors", ValueError, "text.safetensors: not a safetensors file, or damaged"),
        ("text.pt", ValueError, "text.pt: damaged, or not a state dict; write one with"),
        ("text.md", ValueError, "text.md: not a model; want a .safetensors file"),
        ("numbers.pt", ValueError, "numbers.pt: not a state dict: it holds no tensors by name"),
        ("object.pt", ValueError, "object.pt: damaged, or not a state dict"),
        ("cut.pt", ValueError, "cut.pt: damaged, or not a state dict"),
    ):  # fmt: skip
        with pytest.raises(kind, match=message) as error:
            list(read(tmp_path / name))
        assert "\n" not in str(error.value)
        assert "weights_only" not in str(error.value)


def test_the_folder_of_a_run(tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "weights.safetensors")
    assert [e.name for e in read(tmp_path)] == ["w"]
