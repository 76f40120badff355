"""Why a built model of a family without a record cannot be trained, where its modules say so."""

from __future__ import annotations

from typing import Any

ENCODED = ("encoder_attn", "crossattention", "cross_attn", "cross_attention")
"""What attention to the output of an encoder is called."""
OWN_REASONS = {
    "blt": "cuts a text into patches where a second model of it says so: shapes that follow from "
    "the text can neither be planned nor trained here",
    "rwkv": "multiplies and divides its own weights when it goes from training to evaluation and "
    "back, which quantized ones and adapters do not follow",
    "xlm": "keeps attention and MLPs in two lists of modules, not in one of layers, so that "
    "they can be neither recomputed nor looked at layer by layer",
}


def unfit(model: Any) -> str | None:
    """The reason in words that follow the model's name, or None."""
    settings = model.config
    if reason := OWN_REASONS.get(settings.model_type):
        return reason
    names = (name for name, _ in model.named_modules())
    if name := next((one for one in names if one.rpartition(".")[2] in ENCODED), None):
        return f"attends to the output of an encoder ({name}), which is not there"
    if getattr(settings, "default_language", "") is None:
        return "has an adapter for each language, and config.json names no default_language"
    return None
