"""Published weights, vocabularies and labelled sentences, out of packages.

Tiny packages stand for the real ones, but for the slow tests at the end.
"""

import math
import sys
from importlib.util import find_spec

import pytest
import torch
from helpers import assert_same_bits
from published import (
    HEADS,
    HIDDEN,
    KV_HEADS,
    RATED,
    TEXT,
    VOCABULARY,
    WIDTH,
    WORDS,
    archive,
    package,
    tiny_minilm,
    tiny_smollm2,
)

from collage.harness.tasks import recipes
from collage.harness.tasks.pretrained import PUBLISHED, minilm, packages, reviews, smollm2
from collage.harness.train import training
from collage.harness.train.config import RunConfig


@pytest.fixture
def smol(tmp_path, monkeypatch):
    return tiny_smollm2(tmp_path, monkeypatch)


@pytest.fixture
def mini(tmp_path, monkeypatch):
    return tiny_minilm(tmp_path, monkeypatch)


# --- SmolLM2: a GGUF file ---


def together(weight, heads):
    """The other way round than `smollm2.halves`, written out: row i of a half goes to 2i or 2i + 1."""
    rows = []
    for head in weight.view(heads, -1, weight.shape[1]):
        half = len(head) // 2
        rows += [head[i // 2 + half * (i % 2)] for i in range(len(head))]
    return torch.stack(rows)


def test_every_block_of_a_gguf_file_is_the_number_it_stands_for(smol):
    found = smollm2.weights()
    assert len(found) == len(smol)
    assert_same_bits("model.embed_tokens.weight", found["model.embed_tokens.weight"], smol["token_embd.weight"])
    assert_same_bits("model.norm.weight", found["model.norm.weight"], smol["output_norm.weight"])
    for layer in range(2):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        for name, other in smollm2._IN_LAYER.items():
            got, want = found[f"{ours}{other}.weight"], smol[f"{theirs}{name}.weight"]
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name)
            assert_same_bits(other, together(got, heads) if heads else got, want)


def test_weights_are_those_of_the_recipe(smol):
    model = recipes.build("smollm2-135m")
    lacking = model.load_state_dict(smollm2.weights(), strict=False)
    assert (lacking.missing_keys, lacking.unexpected_keys) == (["lm_head.weight"], [])  # tied


def test_positions_turn_what_they_turned(smol):
    """Scores of attention: llama.cpp turns neighbours of its rows, transformers the halves of ours, by one angle."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x = torch.randn(2, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    angles = torch.tensor([[3.0], [17.0]], dtype=torch.float64) * 10.0 ** -torch.arange(WIDTH // 2)  # [2, width / 2]
    theirs, ours = [], []
    for kind, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS)):
        rows = (x @ smol[f"blk.0.{kind}.weight"].double().T).view(2, heads, WIDTH // 2, 2)
        turned = torch.view_as_complex(rows) * torch.polar(torch.ones_like(angles), angles)[:, None]
        theirs.append(torch.view_as_real(turned).flatten(2))
        other = smollm2.weights()[f"model.layers.0.{smollm2._IN_LAYER[kind]}.weight"]
        ours.append((x @ other.double().T).view(1, 2, heads, WIDTH).transpose(1, 2))
    both = torch.cat([angles, angles], -1)[None]
    ours = [t[0].transpose(0, 1) for t in apply_rotary_pos_emb(*ours, both.cos(), both.sin())]
    scores = [torch.einsum("ihd,jhd->hij", q[:, ::2], k) for q, k in (theirs, ours)]
    # The same products, added in another order: in float64 far below what the wrong rows would differ by.
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-12)


def test_tokens_are_those_of_the_file(smol):
    tokens = smollm2.tokens()
    ids = tokens.encode(TEXT + "<|im_end|>")
    assert tokens.vocab_size == len(VOCABULARY)
    assert (tokens.pad_id, tokens.special_ids) == (2, (0, 1, 2))
    said = [VOCABULARY[i] for i in ids]
    assert "Ġh" in said
    assert "18" not in said, "digits stand by themselves"
    assert "<|im_end|>" not in said, "what is spelled out in a text is text"
    assert smollm2.tokenizer().decode(ids.tolist(), skip_special_tokens=False) == TEXT + "<|im_end|>"


# --- MiniLM: a safetensors file and a tokenizer ---


def test_the_encoder_is_published_and_the_head_the_seeds(mini):
    found = minilm.weights(0)
    for name, value in mini.items():
        if name.startswith("bert."):
            assert_same_bits(name, found.pop(name), value)
    shapes = {name: tuple(w.shape) for name, w in found.items()}
    assert shapes == {"classifier.weight": (2, 16), "classifier.bias": (2,)}
    assert_same_bits("classifier.weight", found["classifier.weight"], minilm.weights(0)["classifier.weight"])
    assert not torch.equal(found["classifier.weight"], minilm.weights(1)["classifier.weight"])


# --- The sentences ---


def test_reviews_are_labelled_by_the_sign_of_a_clear_rating(mini, tmp_path, monkeypatch):
    folder = tmp_path / "collage"
    folder.mkdir()
    archive(folder / reviews.SDIST, RATED * 5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = RunConfig.of("minilm", tmp_path / "out").corpus()
    assert found.name == "movie reviews"
    assert (len(found.train["labels"]), len(found.validation["labels"])) == (12, 3)  # of 15 that are clear
    assert found.validation["labels"].tolist() == [1, 0, 0]
    ids, mask = found.validation["input_ids"][0], found.validation["attention_mask"][0]
    assert [WORDS[i] for i in ids] == ["[CLS]", "a", "good", "film", "[SEP]", "[PAD]", "[PAD]", "[PAD]"]
    assert mask.tolist() == [1, 1, 1, 1, 1, 0, 0, 0]


def test_own_sentences(mini, tmp_path):
    lines = ["1\ta good film", "0\tbad\tfilm", "1\t" + "good " * 20]
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n")
    (tmp_path / "judged.tsv").write_text("0\tbad")
    found = reviews.examples((str(tmp_path / "train.tsv"),), (str(tmp_path / "judged.tsv"),), 8)
    assert (found.train["labels"].tolist(), found.validation["labels"].tolist()) == ([1, 0, 1], [0])
    assert [WORDS[i] for i in found.train["input_ids"][1, :4]] == ["[CLS]", "bad", "film", "[SEP]"]
    assert found.train["attention_mask"][2].tolist() == [1] * 8  # cut off
    assert found.train["input_ids"].shape == (3, 8)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.tsv", None, "no such file"),
        ("text.tsv", b"1\tgood\nfine film\n", "line 2 is not 0 or 1, a tab and a sentence"),
        ("three.tsv", b"2\tgood", "line 1 is not 0 or 1"),
        ("raw.tsv", b"\0", "binary"),
        ("other.tar.gz", b"no archive", "cannot be read"),
    ],
)
def test_sentences_of_another_form_are_refused(mini, tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"data '.*{name}': .*{says}"):
        reviews.examples((str(tmp_path / name),), (), 8)


def test_an_archive_without_the_reviews_is_refused(mini, tmp_path):
    path = tmp_path / "vaderSentiment-3.3.2.tar.gz"
    archive(path, RATED)
    path.rename(other := tmp_path / "another-1.0.tar.gz")
    with pytest.raises(ValueError, match=r"another-1\.0\.tar\.gz': cannot be read .*accepted: vaderSentiment"):
        reviews.examples((str(other),), (), 8)


# --- What is missing ---


@pytest.mark.parametrize("module", [minilm, smollm2])
def test_a_missing_package_is_a_sentence_with_the_command(module, monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    what = module.PACKAGE
    command = f"pip install --no-deps {what.distribution}=={what.version}"
    says = f"^package '{what.distribution}' is not installed; install it with `{command}`$"
    with pytest.raises(ValueError, match=says):
        module.weights(0)
    with pytest.raises(ValueError, match=command):
        module.tokenizer()


def test_a_package_without_its_file_says_so(tmp_path, monkeypatch):
    package(tmp_path, minilm.PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"has no model/model\.safetensors in this version; install it with"):
        minilm.weights(0)


def test_a_missing_reader_is_a_sentence_with_the_command(smol, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"^package 'gguf' is not installed; install it with `pip install gguf`$"):
        smollm2.weights()


def test_missing_reviews_are_a_sentence_with_the_command(mini, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    says = rf"`pip download --no-deps --no-binary vaderSentiment --dest {tmp_path}/empty/collage vaderSentiment==3.3.2`"
    with pytest.raises(ValueError, match=says):
        RunConfig.of("minilm", tmp_path / "out").corpus()


@pytest.mark.parametrize(
    ("model", "settings", "says"),
    [
        ("minilm", {"tokenizer": "t.json"}, "tokenizer: 'minilm' has a vocabulary of its own; leave it out"),
        ("smollm2-135m", {"tokenizer": "t.json"}, "tokenizer: 'smollm2-135m' has a vocabulary of its own"),
        ("minilm", {"finetune": True}, "finetune: 'minilm' tells sentences apart"),
    ],
)
def test_settings_of_another_task_are_refused(model, settings, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        RunConfig.of(model, tmp_path, **settings)


# --- Runs ---


def test_a_classifier_is_trained_from_the_published_weights(mini, tmp_path):
    rows = [("1", "a good film"), ("0", "a bad film"), ("1", "good"), ("0", "not a film")] * 24
    (tmp_path / "rows.tsv").write_text("\n".join(map("\t".join, rows)))
    settings = {"data": (str(tmp_path / "rows.tsv"),), "steps": 40, "lr": 1e-2, "shadow": 0, "eval_sequences": 16}
    config = RunConfig.of("minilm", tmp_path / "out", **settings)
    result = training.run(config)
    assert result.initial_loss == pytest.approx(math.log(2), abs=0.1)  # of two classes, and a head that knows nothing
    assert result.score == 1.0
    assert result.val_loss < 0.5 * result.initial_loss
    spared = training.building.optimizer_of(config, recipes.build("minilm").bfloat16()).param_groups[1]
    assert spared["weight_decay"] == 0.0
    assert all(p.dim() == 1 for p in spared["params"])


def test_a_language_model_goes_on_from_the_published_weights(smol, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 400)
    config = RunConfig.of(
        "smollm2-135m", tmp_path / "out", data=(str(tmp_path / "text.txt"),), steps=3, seq_len=32, shadow=0,
        eval_sequences=4, strategy="fp32",
    )  # fmt: skip
    result = training.run(config)
    ids = config.corpus().validation
    model = recipes.build("smollm2-135m", len(VOCABULARY))
    model.load_state_dict({name: w.bfloat16().float() for name, w in smollm2.weights().items()}, strict=False)
    count = len(ids) // 32
    windows = ids[: count * 32].view(count, 32)[[i * count // 4 for i in range(4)]]
    with torch.no_grad():
        losses = [model(input_ids=pair, labels=pair).loss for pair in windows.split(2)]
    # The evaluation of these very weights: the same numbers, but for how Trainer adds two batches up.
    assert result.initial_loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert result.val_loss != result.initial_loss


# --- The real ones ---


def installed(what):
    found = find_spec(what.module) is not None
    return pytest.mark.skipif(not found, reason=f"needs {what.distribution}: `{what.command}`")


@pytest.mark.slow
@installed(minilm.PACKAGE)
@torch.no_grad()
def test_the_real_minilm_knows_what_is_alike():
    from transformers import BertForSequenceClassification

    model = recipes.build("minilm")
    assert isinstance(model, BertForSequenceClassification)
    model.load_state_dict(minilm.weights(0), strict=True)

    def meaning(sentence):
        ids = torch.tensor([minilm.tokenizer().encode(sentence).ids])
        return model.eval().bert(input_ids=ids).last_hidden_state.mean(1)

    said, like, other = map(meaning, ("A man is eating food.", "Someone has his dinner.", "Shares fell on Monday."))
    cosine = torch.nn.functional.cosine_similarity
    assert float(cosine(said, like)) > 0.4 > 0.2 > float(cosine(said, other))


@pytest.mark.slow
@installed(smollm2.PACKAGE)
@pytest.mark.parametrize(("finetune", "loss"), [(False, 4.0), (True, 3.0)])
def test_the_real_smollm2_reads_english_and_python(finetune, loss, tmp_path):
    """Nats per token: about 3.7 on a novel of 1817, and 2.7 on source. Guessing is 10.8."""
    model = recipes.build("smollm2-135m")
    model.load_state_dict(smollm2.weights(), strict=False)
    ids = RunConfig.of("smollm2-135m", tmp_path, finetune=finetune).corpus().validation[: 8 * 256].view(8, 256)
    with torch.no_grad():
        found = float(model.eval()(input_ids=ids, labels=ids).loss)
    assert loss - 1 < found < loss


def test_every_published_model_has_a_recipe():
    assert PUBLISHED.keys() <= recipes.RECIPES.keys()
