"""A recipe -> its model, with random weights: one function for each family."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from collage.harness.tasks.recipe import Family, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _text_settings(r: Recipe) -> dict[str, Any]:
    """Sequences are cut out of running text: no token begins or ends one."""
    return {"vocab_size": r.vocab, "pad_token_id": r.pad_id, "bos_token_id": None, "eos_token_id": None, **r.others}


def _gpt2_model(r: Recipe) -> PreTrainedModel:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(
            n_embd=r.hidden, n_layer=r.layers, n_head=r.heads, n_inner=r.intermediate, n_positions=r.positions,
            resid_pdrop=r.dropout, embd_pdrop=r.dropout, attn_pdrop=r.dropout,
            initializer_range=r.init_std, use_cache=False, **_text_settings(r),
        )
    )  # fmt: skip
    model.loss_type = "ForCausalLM"  # transformers cannot tell from the class's name, and warns at every loss
    return model


def _llama_model(r: Recipe) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=r.hidden, num_hidden_layers=r.layers, num_attention_heads=r.heads,
            intermediate_size=r.intermediate, max_position_embeddings=r.positions, attention_dropout=r.dropout,
            initializer_range=r.init_std, use_cache=False, **_text_settings(r),
        )
    )  # fmt: skip


def _encoder_settings(r: Recipe) -> dict[str, Any]:
    return {
        "hidden_size": r.hidden, "num_hidden_layers": r.layers, "num_attention_heads": r.heads,
        "intermediate_size": r.intermediate, "hidden_dropout_prob": r.dropout,
        "attention_probs_dropout_prob": r.dropout, "initializer_range": r.init_std, **_text_settings(r),
    }  # fmt: skip


def _bert_model(r: Recipe) -> PreTrainedModel:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(max_position_embeddings=r.positions, **_encoder_settings(r)))


def _bert_classifier(r: Recipe) -> PreTrainedModel:
    """Of two classes, as transformers' configuration has it by default."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(max_position_embeddings=r.positions, **_encoder_settings(r)))


def _roberta_model(r: Recipe) -> PreTrainedModel:
    from transformers import RobertaConfig, RobertaForMaskedLM

    if r.pad_id is None:
        raise ValueError(f"model {r.name!r}: RoBERTa counts positions from its padding token; pass pad_id")
    rows = r.positions + r.pad_id + 1  # the first token's position is pad_id + 1
    return RobertaForMaskedLM(
        RobertaConfig(max_position_embeddings=rows, type_vocab_size=1, layer_norm_eps=1e-5, **_encoder_settings(r))
    )


def _vit_model(r: Recipe) -> PreTrainedModel:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(  # type: ignore[call-arg]
            hidden_size=r.hidden, num_hidden_layers=r.layers, num_attention_heads=r.heads,
            intermediate_size=r.intermediate, hidden_dropout_prob=r.dropout, attention_probs_dropout_prob=r.dropout,
            initializer_range=r.init_std, image_size=r.positions, patch_size=r.positions // 4, num_channels=1,
            num_labels=r.vocab,
        )
    )  # fmt: skip


def _resnet_model(r: Recipe) -> PreTrainedModel:
    """Stages of one pair of convolutions, each twice as wide as the one before."""
    from transformers import ResNetConfig, ResNetForImageClassification

    widths = [r.hidden << k for k in range(r.layers)]
    return ResNetForImageClassification(
        ResNetConfig(  # type: ignore[call-arg]
            num_channels=1, embedding_size=r.hidden // 2, hidden_sizes=widths, depths=[1] * r.layers,
            layer_type="basic", num_labels=r.vocab,
        )
    )  # fmt: skip


def _actor_critic(r: Recipe) -> PreTrainedModel:
    from collage.harness.tasks.policies import ActorCritic

    return ActorCritic(r.positions, r.vocab, r.hidden, r.layers)


FAMILIES: dict[Family, Callable[[Recipe], PreTrainedModel]] = {
    "gpt": _gpt2_model,
    "llama": _llama_model,
    "bert": _bert_model,
    "roberta": _roberta_model,
    "bert-classifier": _bert_classifier,
    "vit": _vit_model,
    "resnet": _resnet_model,
    "actor-critic": _actor_critic,
}
