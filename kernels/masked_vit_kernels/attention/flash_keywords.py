"""flash-attn's keywords that this attention does not have: taken where they change nothing."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

# keyword -> the values at which it changes nothing, and what else it would ask for
_NEUTRAL: dict[str, tuple[tuple[object, ...], str]] = {
    "causal": ((False,), "every query of a sequence sees all of its keys"),
    "dropout_p": ((0, None), "there is no dropout within attention"),
    "window_size": (((-1, -1), (None, None), -1, None), "there are no local windows"),
    "softcap": ((0, None), "scores are not capped"),
    "alibi_slopes": ((None,), "scores take no bias"),
    "block_table": ((None,), "keys are not paged"),
}
_ANY = ("deterministic",)  # the backward always is


def check_flash_attn_keywords(keywords: Mapping[str, object]) -> None:
    """Raise unless every keyword is one of flash-attn's at a value that changes nothing.

    Raises:
        TypeError: a keyword that flash-attn does not have either.
        ValueError: a value that asks for something that this attention does not do.
    """
    for name, value in keywords.items():
        if name in _ANY:
            continue
        if name not in _NEUTRAL:
            raise TypeError(f"varlen_attention got an unexpected keyword argument {name!r}")
        neutral, why = _NEUTRAL[name]
        given = tuple(value) if isinstance(value, list) else value
        if isinstance(given, Tensor) or given not in neutral:
            raise ValueError(f"{name} must be {neutral[0]!r}: {why}, got {value!r}")
