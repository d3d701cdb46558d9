"""Architectures of Hugging Face transformers, each from a small random config, with inputs.

Configs are made by shrinking the fields that most of them share; what a family needs besides is in the
table. Weights are random and in float64; nothing is downloaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

__all__ = ["FAMILIES", "FAST", "Family", "build_family"]

_SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim", "embedding_size"), 32
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "hidden_dim", "ffn_hidden_size", "n_inner"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions"), 64),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("layerdrop", "encoder_layerdrop", "decoder_layerdrop", "mask_time_prob"), 0.0),
    "max_target_positions": 64,
    "vocab_size": 64,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "rotary_dim": 4,
    "image_size": 32,
    "patch_size": 8,
    "num_channels": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "state_size": 4,
    "type_vocab_size": 2,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "projection_dim": 32,
    "attention_hidden_size": 32,
    "num_mel_bins": 16,
}


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model: class name in transformers.
        kind: what it is: encoder, decoder, encoder-decoder, vision, audio, multimodal, state-space, ...
        inputs: of text, decoder, image, wave, spectrogram: which inputs it takes.
        config: fields beside the shared small ones.
        extra: constant keyword arguments of forward.
        dtype: of the weights, where the model's own code fails in float64.
    """

    model: str
    kind: str
    inputs: tuple[str, ...] = ("text",)
    config: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64


_STEPS = 9
_TINY_STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 32]}
_PICTURE, _PAIR = ("image",), ("text", "image")


def _encoders() -> dict[str, Family]:
    names = (
        "Bert Roberta Albert Electra DistilBert MPNet XLMRoberta DebertaV2 Deberta ConvBert Ernie Esm FNet "
        "MobileBert Nystromformer RoFormer SqueezeBert ModernBert EuroBert XLM XLNet Canine BigBird Funnel Yoso"
    )
    return {name.lower(): Family(f"{name}Model", "encoder") for name in names.split()}


def _decoders() -> dict[str, Family]:
    names = (
        "GPT2 GPTNeo GPTNeoX GPTJ GPTBigCode OPT Bloom Falcon Mpt Llama Mistral Gemma Gemma2 Qwen2 Qwen3 Phi Phi3 "
        "StableLm Starcoder2 Cohere Olmo Olmo2 Granite Helium BioGpt CodeGen CTRL Nemotron Persimmon XGLM Glm "
        "DiffLlama SmolLM3"
    )
    found = {name.lower(): Family(f"{name}Model", "decoder") for name in names.split()}
    found["xglm"] = Family("XGLMModel", "decoder", dtype=torch.float32)
    found["gpt2-lm"] = Family("GPT2LMHeadModel", "decoder")
    found["gptneo"] = Family("GPTNeoModel", "decoder", config={"attention_types": [[["global", "local"], 2]]})
    return found


def _others() -> dict[str, Family]:
    both = ("text", "decoder")
    return {
        "t5": Family("T5ForConditionalGeneration", "encoder-decoder", both),
        "bart": Family("BartModel", "encoder-decoder", both),
        "mbart": Family("MBartModel", "encoder-decoder", both),
        "marian": Family("MarianModel", "encoder-decoder", both),
        "pegasus": Family("PegasusModel", "encoder-decoder", both),
        "m2m100": Family("M2M100Model", "encoder-decoder", both),
        "blenderbot": Family("BlenderbotModel", "encoder-decoder", both),
        "vit": Family("ViTForImageClassification", "vision", _PICTURE),
        "deit": Family("DeiTModel", "vision", _PICTURE),
        "beit": Family("BeitModel", "vision", _PICTURE),
        "dinov2": Family("Dinov2Model", "vision", _PICTURE),
        "vitmae": Family("ViTMAEModel", "vision", _PICTURE),
        "resnet": Family("ResNetModel", "vision", _PICTURE, {**_TINY_STAGES, "embedding_size": 8}),
        "convnext": Family("ConvNextModel", "vision", _PICTURE, {**_TINY_STAGES, "patch_size": 4}),
        "mobilenetv2": Family("MobileNetV2Model", "vision", _PICTURE),
        "segformer": Family("SegformerModel", "vision", _PICTURE, {**_TINY_STAGES, "num_attention_heads": [1, 2, 2, 4]}),  # noqa: E501
        "swin": Family(
            "SwinModel", "vision", _PICTURE,
            {"depths": [2, 2], "num_heads": [2, 4], "embed_dim": 16, "window_size": 2, "patch_size": 4},
        ),
        "poolformer": Family("PoolFormerModel", "vision", _PICTURE, _TINY_STAGES),
        "wav2vec2": Family("Wav2Vec2Model", "audio", ("wave",), {"conv_dim": [8] * 7}),
        "hubert": Family("HubertModel", "audio", ("wave",), {"conv_dim": [8] * 7}),
        "whisper": Family("WhisperModel", "audio", ("spectrogram", "decoder")),
        "clip": Family("CLIPModel", "multimodal", _PAIR),
        "siglip": Family("SiglipModel", "multimodal", _PAIR),
        "blip": Family("BlipModel", "multimodal", _PAIR),
        "mamba": Family("MambaModel", "state-space"),
        "mamba2": Family("Mamba2Model", "state-space", config={"num_heads": 8, "n_groups": 1, "chunk_size": 4}),
        "falconmamba": Family("FalconMambaModel", "state-space"),
        "rwkv": Family("RwkvModel", "recurrent", extra={"use_cache": False}),
        "recurrentgemma": Family("RecurrentGemmaModel", "recurrent"),
        "mixtral": Family("MixtralModel", "experts"),
        "qwen3moe": Family("Qwen3MoeModel", "experts"),
        "olmoe": Family("OlmoeModel", "experts"),
        "granitemoe": Family("GraniteMoeModel", "experts"),
    }  # fmt: skip


FAMILIES: dict[str, Family] = {**_encoders(), **_decoders(), **_others()}
FAST = ("bert", "gpt2-lm", "vit", "resnet", "clip", "mixtral")


def build_family(name: str) -> tuple[nn.Module, Any]:
    """A model, in float64 if it can be, and its inputs by batch size."""
    import transformers

    family = FAMILIES[name]
    cls = getattr(transformers, family.model)
    config = _small(cls.config_class, family.config)
    config._experts_implementation = "batched_mm"  # every expert in one product; the default is float32 only
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(config).to(family.dtype)
    return model, lambda batch: _inputs(family, model.config, batch)


def _small(cls: Any, given: Mapping[str, Any]) -> Any:
    known: set[str] = set()
    for base in cls.__mro__:
        known.update(getattr(base, "__annotations__", {}))
        known.update(inspect.signature(base.__init__).parameters)
    fields = {name: value for name, value in _SIZES.items() if name in known}
    for name, part in (getattr(cls, "sub_configs", None) or {}).items():
        fields[name] = _small(part, {}).to_dict()
    return cls(**{**fields, **given})


def _inputs(family: Family, config: Any, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    generator = torch.Generator().manual_seed(batch)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator, dtype=torch.float64)

    def words(steps: int) -> torch.Tensor:
        return torch.randint(3, 60, (batch, steps), generator=generator)

    given: dict[str, Any] = {}
    if "text" in family.inputs:
        mask = torch.ones(batch, _STEPS, dtype=torch.long)
        mask[0, 7:] = 0
        given.update(input_ids=words(_STEPS), attention_mask=mask)
    if "decoder" in family.inputs:
        given.update(decoder_input_ids=words(6))
    if "image" in family.inputs:
        given.update(pixel_values=noise(3, 32, 32))
    if "wave" in family.inputs:
        given.update(input_values=noise(1600))
    if "spectrogram" in family.inputs:
        given.update(input_features=noise(config.num_mel_bins, 2 * config.max_source_positions))
    return (), {**given, **family.extra}
