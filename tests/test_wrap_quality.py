"""A wrapped AdamW loses as little as our own: on the embedded text, at a learning rate that bfloat16 drops."""

import pytest
import torch

import collage
from collage.harness.tasks.data import Corpus, default_corpus, finetune_corpus
from collage.harness.tasks.recipes import build

TUNING = {"lr": 1e-5, "weight_decay": 0.1, "strategy": "collage-plus-sr"}
LENGTH = 64


def batches(text: torch.Tensor, steps: int, size: int, seed: int):
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(text) - LENGTH, (size,), generator=g).tolist()
        yield torch.stack([text[k : k + LENGTH] for k in starts])


def fitted(model: torch.nn.Module, opt: torch.optim.Optimizer, text: torch.Tensor, steps: int, size: int) -> None:
    for x in batches(text, steps, size, seed=7):
        model(input_ids=x, labels=x).loss.backward()
        opt.step()
        opt.zero_grad()


@torch.no_grad()
def loss(model: torch.nn.Module, corpus: Corpus, size: int) -> float:
    losses = [model(input_ids=x, labels=x).loss.item() for x in batches(corpus.validation, 10, size, seed=99)]
    return sum(losses) / len(losses)


def compare(warm: int, steps: int, size: int) -> None:
    start = build("tiny-gpt", seed=0)
    if warm:
        fitted(start, torch.optim.AdamW(start.parameters(), lr=1e-3), default_corpus().train, warm, size)
    corpus, losses = finetune_corpus(), []
    for kind in (collage.AdamW, torch.optim.AdamW):
        model = build("tiny-gpt", seed=0)
        model.load_state_dict(start.state_dict())
        collage.to_bf16(model)
        named = model.named_parameters()
        opt = kind(named, **TUNING) if kind is collage.AdamW else collage.wrap(kind, named, **TUNING)
        monitor = collage.monitor(opt, every=1, shadow=16)
        fitted(model, opt, corpus.train, steps, size)
        total = monitor.report().total
        assert total.edq_ratio >= 0.999, kind
        assert total.edq_shadow >= 0.999, kind
        assert total.v_ratio == pytest.approx(1.0, abs=1e-3), kind
        losses.append(loss(model, corpus, size))
    assert abs(losses[0] - losses[1]) <= 0.005, losses


def test_a_wrapped_adamw_is_as_good_as_our_own():
    compare(warm=0, steps=10, size=2)


@pytest.mark.slow
def test_a_wrapped_adamw_is_as_good_as_our_own_in_fine_tuning():
    """Measured: EDQ ratios 1.000000 both, losses 2.9403 and 2.9402 (4.2347 before)."""
    compare(warm=200, steps=100, size=16)
