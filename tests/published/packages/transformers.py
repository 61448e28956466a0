"""The Flax models of Hugging Face's transformers, from small configurations."""

from __future__ import annotations

import inspect
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers

from ..adapters import DROPOUT
from ..models import Made, below, model, numbers


def clip(x: Any, *limits: Any, a_max: Any = None) -> Any:
    """What ``jnp.clip`` was when T5 was published."""
    return jnp.clip(x, *limits) if limits else jnp.clip(x, max=a_max)


def published(name: str) -> Any:
    """A class whose module runs with this jax, and in double precision all through."""
    found = getattr(transformers, name)
    changed = {"float32": jnp.float64, "clip": clip}
    sys.modules[found.__module__].jnp = types.SimpleNamespace(**{**vars(jnp), **changed})
    return found


LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
TEXT = {**LAYERS, "vocab_size": 60, "intermediate_size": 64, "max_position_embeddings": 32}
TRANSLATION = {
    "vocab_size": 60, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "max_position_embeddings": 32, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
IMAGE = {**LAYERS, "intermediate_size": 64, "image_size": 16, "patch_size": 4, "num_labels": 5}
STAGES = {
    "embedding_size": 8, "hidden_sizes": [8, 16, 24], "depths": [1, 2, 1], "num_labels": 5,
}  # fmt: skip
TOKENS = (below(60, 4, 16),)
PAIRS = (below(60, 4, 16), below(60, 4, 12, seed=1))
IMAGES = (numbers(4, 3, 16, 16),)


def add(
    name: str,
    of: str,
    config: str,
    inputs: tuple[Any, ...],
    names: tuple[str, ...] = (),
    **sizes: Any,
) -> None:
    """Adds a model.

    Args:
      name: what it is called.
      of: its class in transformers.
      config: the class of its configuration.
      inputs: what it is called with.
      names: names of the inputs behind the first.
      **sizes: of the configuration.
    """

    @model(name, trains=True)
    def make(dtype: Any, train: bool) -> Made:
        built = getattr(transformers, config)(**sizes)
        made = published(of)(built, dtype=dtype, _do_init=False)
        has_state = hasattr(built, "hidden_sizes")
        key = jax.random.PRNGKey(DROPOUT)
        asked = {"train": train, "deterministic": not train, "dropout_rng": key, "indices_rng": key}
        taken = inspect.signature(made.__call__).parameters
        options = {name: value for name, value in asked.items() if name in taken}

        def init() -> tuple[Any, Any]:
            shape = (1, 16, 16, 3) if has_state else made.input_shape
            state = dict(jax.jit(lambda: made.init_weights(jax.random.PRNGKey(0), shape))())
            return (state.pop("params"), state) if has_state else (state, {})

        def apply(params: Any, state: Any, first: Any, *others: Any) -> Any:
            variables = {"params": params, **state} if has_state else params
            named = dict(zip(names, others, strict=True))
            return made(first, params=variables, **options, **named)

        return Made(apply, init, inputs)


# --- encoders of text ---

add("BERT", "FlaxBertForPreTraining", "BertConfig", TOKENS, **TEXT)
add("ALBERT", "FlaxAlbertForMaskedLM", "AlbertConfig", TOKENS, embedding_size=8, **TEXT)
add("ELECTRA", "FlaxElectraForPreTraining", "ElectraConfig", TOKENS, embedding_size=8, **TEXT)
add(
    "RoBERTa-PreLayerNorm", "FlaxRobertaPreLayerNormForMaskedLM", "RobertaPreLayerNormConfig",
    TOKENS, **TEXT,
)  # fmt: skip
add("RoFormer", "FlaxRoFormerForMaskedLM", "RoFormerConfig", TOKENS, embedding_size=32, **TEXT)
add(
    "DistilBERT", "FlaxDistilBertForMaskedLM", "DistilBertConfig", TOKENS,
    vocab_size=60, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=32,
)  # fmt: skip
add(
    "BigBird", "FlaxBigBirdForMaskedLM", "BigBirdConfig", (below(60, 2, 48),),
    **{**TEXT, "max_position_embeddings": 64}, block_size=4, num_random_blocks=2,
)  # fmt: skip

# --- decoders of text ---

add("GPT-2", "FlaxGPT2LMHeadModel", "GPT2Config", TOKENS, vocab_size=60, n_embd=32, n_layer=2,
    n_head=4, n_positions=32)  # fmt: skip
add("GPT-Neo", "FlaxGPTNeoForCausalLM", "GPTNeoConfig", TOKENS, vocab_size=60, hidden_size=32,
    num_layers=2, num_heads=4, max_position_embeddings=32, window_size=4,
    attention_types=[[["global", "local"], 1]])  # fmt: skip
add("GPT-J", "FlaxGPTJForCausalLM", "GPTJConfig", TOKENS, vocab_size=60, n_embd=32, n_layer=2,
    n_head=4, n_positions=32, rotary_dim=4)  # fmt: skip
add("Llama", "FlaxLlamaForCausalLM", "LlamaConfig", TOKENS, num_key_value_heads=2, **TEXT)
add("Mistral", "FlaxMistralForCausalLM", "MistralConfig", TOKENS, num_key_value_heads=2,
    sliding_window=6, **TEXT)  # fmt: skip
add("Gemma", "FlaxGemmaForCausalLM", "GemmaConfig", TOKENS, num_key_value_heads=1, head_dim=16,
    **TEXT)  # fmt: skip
add("OPT", "FlaxOPTForCausalLM", "OPTConfig", TOKENS, ffn_dim=64, word_embed_proj_dim=16,
    **{k: v for k, v in TEXT.items() if k != "intermediate_size"})  # fmt: skip
add("BLOOM", "FlaxBloomForCausalLM", "BloomConfig", TOKENS, vocab_size=60, hidden_size=32,
    n_layer=2, n_head=4)  # fmt: skip
add("XGLM", "FlaxXGLMForCausalLM", "XGLMConfig", TOKENS, vocab_size=60, d_model=32, ffn_dim=64,
    num_layers=2, attention_heads=4, max_position_embeddings=32)  # fmt: skip

# --- from text to text ---

DECODER = ("decoder_input_ids",)
T5 = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
add("T5", "FlaxT5ForConditionalGeneration", "T5Config", PAIRS, DECODER, **T5)
add("T5 v1.1", "FlaxT5ForConditionalGeneration", "T5Config", PAIRS, DECODER, **T5,
    feed_forward_proj="gated-gelu", tie_word_embeddings=False)  # fmt: skip
add("LongT5", "FlaxLongT5ForConditionalGeneration", "LongT5Config", PAIRS, DECODER, **T5,
    local_radius=3, encoder_attention_type="transient-global", global_block_size=4)  # fmt: skip
add("BART", "FlaxBartForConditionalGeneration", "BartConfig", PAIRS, DECODER, **TRANSLATION)
add("mBART", "FlaxMBartForConditionalGeneration", "MBartConfig", PAIRS, DECODER, **TRANSLATION)
add("Pegasus", "FlaxPegasusForConditionalGeneration", "PegasusConfig", PAIRS, DECODER,
    **TRANSLATION)  # fmt: skip

# --- sound ---

add("Whisper", "FlaxWhisperForConditionalGeneration", "WhisperConfig",
    (numbers(2, 10, 24), below(60, 2, 8)), DECODER, num_mel_bins=10, max_source_positions=12,
    max_target_positions=16,
    **{k: v for k, v in TRANSLATION.items() if k != "max_position_embeddings"},
    suppress_tokens=None, begin_suppress_tokens=None)  # fmt: skip
add("Wav2Vec2", "FlaxWav2Vec2ForCTC", "Wav2Vec2Config", (numbers(2, 200),),
    **{k: v for k, v in TEXT.items() if k != "max_position_embeddings"}, conv_dim=[16, 16, 24],
    conv_kernel=[10, 3, 2], conv_stride=[5, 2, 2], num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=4, do_stable_layer_norm=True, feat_extract_norm="layer",
    mask_time_prob=0.0)  # fmt: skip

# --- images ---

add("ViT", "FlaxViTForImageClassification", "ViTConfig", IMAGES, **IMAGE)
add("BEiT", "FlaxBeitForImageClassification", "BeitConfig", IMAGES, **IMAGE,
    use_relative_position_bias=True, layer_scale_init_value=0.1, drop_path_rate=0.1)  # fmt: skip
add("DINOv2", "FlaxDinov2ForImageClassification", "Dinov2Config", IMAGES, **IMAGE, mlp_ratio=2)
add("ResNet", "FlaxResNetForImageClassification", "ResNetConfig", IMAGES, **STAGES,
    layer_type="bottleneck")  # fmt: skip
add("RegNet", "FlaxRegNetForImageClassification", "RegNetConfig", IMAGES, **STAGES, groups_width=4,
    layer_type="y")  # fmt: skip
add("CLIP", "FlaxCLIPModel", "CLIPConfig", (below(60, 4, 16), np.moveaxis(IMAGES[0], 1, 1)),
    ("pixel_values",), projection_dim=16, text_config={**TEXT, "eos_token_id": 59},
    vision_config=IMAGE)  # fmt: skip
