"""The optimizer's step alone over the adapters of the 8B shape; paged states saved and restored.

448 parameters: 7 linears of 32 layers, two matrices each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gpu_parts.setting import RANK, Setting
from gpu_parts.shapes import BIG, shape_of
from qlora_kit.training.optimizer import make_optimizer, optimizer_state, restore_optimizer

NAMES = ("adamw", "adamw_8bit", "paged_adamw_8bit")
STEPS = 5
PAGED_ELEMENTS = 2**20
"""A state of 1 MB in 8 bits."""


def run(setting: Setting, found: dict[str, Any]) -> str:
    """Seconds of a step by optimizer, then whether what is restored is what was saved."""
    parameters = _adapters(setting)
    found["parameters"] = len(parameters)
    found["elements"] = sum(parameter.numel() for parameter in parameters)
    for name in NAMES:
        optimizer = make_optimizer(name, parameters, 1e-4)
        found[name] = {"step_s": setting.median_s(optimizer.step, STEPS, warm_up=2)}
        del optimizer
    found["restored"] = {name: _restored(setting, name) for name in NAMES[1:]}
    wrong = [name for name, one in found["restored"].items() if not one["equal"]]
    times = ", ".join(f"{name} {found[name]['step_s'] * 1e3:.2f} ms" for name in NAMES)
    return f"{len(parameters)} parameters: {times}; restored {wrong or 'equal'}"


def _adapters(setting: Setting) -> list[nn.Parameter]:
    config = shape_of(BIG, setting.small)
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    kv = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    linears = [(hidden, hidden)] * 2 + [(kv, hidden)] * 2 + [(ffn, hidden)] * 2 + [(hidden, ffn)]
    made = []
    for out, into in linears * config["num_hidden_layers"]:
        for shape in ((RANK, into), (out, RANK)):
            parameter = nn.Parameter(torch.randn(shape, device=setting.device) * 0.01)
            parameter.grad = torch.randn_like(parameter) * 1e-3
            made.append(parameter)
    return made


def _restored(setting: Setting, name: str) -> dict[str, Any]:
    """One more step after saving and restoring, against one more step without."""

    def made() -> tuple[nn.Parameter, torch.optim.Optimizer]:
        drawn = torch.Generator().manual_seed(0)
        values = torch.randn(PAGED_ELEMENTS, generator=drawn).to(setting.device)
        parameter = nn.Parameter(values)
        return parameter, make_optimizer(name, [parameter], 1e-3)

    def step(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, seed: int) -> None:
        drawn = torch.Generator().manual_seed(seed)
        parameter.grad = torch.randn(PAGED_ELEMENTS, generator=drawn).to(setting.device)
        optimizer.step()

    parameter, optimizer = made()
    step(parameter, optimizer, 1)
    tensors, numbers = optimizer_state(optimizer, {parameter: "p"})
    other, another = made()
    other.data.copy_(parameter.data)
    restore_optimizer(another, {other: "p"}, {k: t.clone() for k, t in tensors.items()}, numbers)
    for one, its in ((parameter, optimizer), (other, another)):
        step(one, its, 2)
    setting.wait()
    paged = [bool(getattr(one, "is_paged", False)) for one in another.state[other].values()]
    return {"equal": bool(torch.equal(parameter, other)), "paged": sum(paged)}
