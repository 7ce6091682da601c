"""Fused ops for masked vision transformers: packed tokens, variable lengths, one-pass updates.

Nothing here knows I-JEPA: MAE, data2vec, iBOT, DINOv2 or V-JEPA can import the ops alone.
"""

from masked_vit_kernels.attention.varlen import (
    varlen_attention,
    varlen_attention_kvpacked,
    varlen_attention_qkvpacked,
)
from masked_vit_kernels.cpu_linear import linear
from masked_vit_kernels.float8 import Float8Rows, float8_linear
from masked_vit_kernels.optimizer.adamw_ema import AdamWEMA
from masked_vit_kernels.optimizer.ema import ema_update_
from masked_vit_kernels.packing import (
    Packing,
    PredictorPacking,
    PrefixPacking,
    choose_capacity,
    pack_lengths,
    pack_predictor,
    pack_prefix,
    packing_from_cu_seqlens,
)
from masked_vit_kernels.tokens.gather import gather_tokens, scatter_tokens
from masked_vit_kernels.tokens.patch_embed import embed_visible_patches
from masked_vit_kernels.tokens.prediction_loss import latent_prediction_loss
from masked_vit_kernels.tokens.predictor_tokens import assemble_predictor_tokens
from masked_vit_kernels.tokens.prefix import prepend_tokens, split_prefix

__all__ = [
    "AdamWEMA",
    "Float8Rows",
    "Packing",
    "PredictorPacking",
    "PrefixPacking",
    "assemble_predictor_tokens",
    "choose_capacity",
    "ema_update_",
    "embed_visible_patches",
    "float8_linear",
    "gather_tokens",
    "latent_prediction_loss",
    "linear",
    "pack_lengths",
    "pack_predictor",
    "pack_prefix",
    "packing_from_cu_seqlens",
    "prepend_tokens",
    "scatter_tokens",
    "split_prefix",
    "varlen_attention",
    "varlen_attention_kvpacked",
    "varlen_attention_qkvpacked",
]
