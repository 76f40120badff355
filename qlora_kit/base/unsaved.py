"""`model.save_pretrained` refuses where what it would write is no model.

transformers saves tensors by their names alone. Of a linear of ours these are packed bytes under
the name of a weight, and of an adapted one names that its class does not have; `from_pretrained`
then makes every such linear anew, at random, and says so in a load report only.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from qlora_kit.errors import ExportError


def refuse_saving(model: nn.Module) -> None:
    """Let the method `save_pretrained` of a model refuse. Errors of it: `ExportError`."""
    model.save_pretrained = functools.partial(_refuse, type(model).__name__)  # type: ignore[assignment]


def allow_saving(model: nn.Module) -> None:
    """Let it be transformers' own again."""
    model.__dict__.pop("save_pretrained", None)


def _refuse(name: str, *args: Any, **options: Any) -> None:
    raise ExportError(
        f"save_pretrained of a {name} whose linears are packed or carry adapters would write what "
        "transformers loads as random linears",
        "save_adapter(base, DIR) writes the adapter, export_model(base, DIR) a whole model, and "
        "to_peft(base) makes the model that a Trainer trains and saves",
    )
