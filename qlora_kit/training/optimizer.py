"""Optimizers by name, their states as plain tensors, and learning-rate schedules.

`adamw` is torch's fused one, with fp32 states. The others are bitsandbytes': 8-bit states, and
paged ones whose states move to host memory when the GPU is full. Paging needs CUDA; where it does
not exist, or would page nothing, `paging_note` says so. With quantize.py, the only module that
imports bitsandbytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.base.quantize import check_library
from qlora_kit.config.training import TrainingConfig
from qlora_kit.device.found import synchronize
from qlora_kit.device.target import device_type, has_own_memory, has_values
from qlora_kit.errors import CheckpointError

PAGED_FROM_ELEMENTS = 100_000
"""bitsandbytes 0.50 pages the state of a parameter only from this size on."""


def optimizer_names(name: str, device: torch.device) -> tuple[str, ...]:
    """The optimizers that `name` allows on this device, of which the first is taken that fits.

    `auto` on CUDA is `adamw` first: a few launches a step. bitsandbytes' optimizers launch a kernel
    and wait for the device once a parameter (0.50, `optim/optimizer.py`), 448 times a step for all
    linears of a Llama 3.1 8B. They save three quarters of the states, and paging the rest of them.
    """
    if name != "auto":
        return (name,)
    return ("adamw", "paged_adamw_8bit") if has_own_memory(device) else ("adamw",)


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """The optimizer of that name (one of `config.OPTIMIZERS`) over the trainable `parameters`."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if name == "adamw":
        return torch.optim.AdamW(trained, learning_rate, weight_decay=weight_decay, fused=True)
    for parameter in trained[:1]:
        check_library(parameter.device)
    import bitsandbytes.optim as bnb

    classes = {
        "adamw_8bit": bnb.AdamW8bit,
        "paged_adamw_8bit": bnb.PagedAdamW8bit,
        "paged_adamw_32bit": bnb.PagedAdamW32bit,
        "lion_8bit": bnb.Lion8bit,
        "paged_lion_8bit": bnb.PagedLion8bit,
    }
    if name.startswith("paged") and device_type(trained[0]) != "cuda":
        # The same arithmetic without the paging, which would only warn and do nothing here.
        classes["paged_adamw_8bit"], classes["paged_lion_8bit"] = bnb.AdamW8bit, bnb.Lion8bit
        classes["paged_adamw_32bit"] = bnb.AdamW32bit
    optimizer: torch.optim.Optimizer = classes[name](
        trained, lr=learning_rate, weight_decay=weight_decay
    )
    return optimizer


def paging_note(name: str, parameters: Iterable[nn.Parameter], device: torch.device) -> str | None:
    """One sentence where a paged optimizer pages nothing, else None."""
    if not name.startswith("paged"):
        return None
    if not has_own_memory(device):
        return f"{name}: paging needs CUDA; on {device.type} its states stay in ordinary memory"
    largest = max((p.numel() for p in parameters if p.requires_grad), default=0)
    if largest < PAGED_FROM_ELEMENTS:
        return (
            f"{name} pages nothing here: a state is paged from {PAGED_FROM_ELEMENTS} elements on, "
            f"and the largest adapter matrix has {largest}"
        )
    return None


def state_bytes(name: str) -> float:
    """Bytes of state for each trained element, at most; small parameters keep fp32 states."""
    return 4.0 if "lion" in name else 8.0


def tag_states(
    optimizer: torch.optim.Optimizer, tag: Callable[[str, Iterable[Tensor]], None]
) -> None:
    """Hand over the states as `optimizer`, those in managed memory as `paged`."""
    for parameter, state in optimizer.state.items():
        # A plan's states stand for what bitsandbytes makes on a GPU.
        planned = not has_values(parameter) and _is_paged(optimizer, parameter)
        for key, value in state.items():
            if isinstance(value, Tensor):
                paged = getattr(value, "is_paged", False) or (planned and key.startswith("state"))
                tag("paged" if paged else "optimizer", (value,))


def optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The states as they are held (8-bit ones in 8 bits): tensors on the CPU, and whole numbers.

    Both are by `<parameter name>.<state name>`. Constant tables of bitsandbytes are left out.
    """
    for device in {parameter.device for parameter in names}:
        synchronize(device)  # paged states are read from the host
    constants = _constants(optimizer)
    tensors, numbers = {}, {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            name = f"{names[parameter]}.{key}"
            if not isinstance(value, Tensor):
                numbers[name] = int(value)
            elif value.data_ptr() not in constants:
                tensors[name] = value.detach().cpu()
    return tensors, numbers


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[Tensor, str],
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, int],
) -> None:
    """Put saved states into a new optimizer; paged ones are paged again.

    Each state is made as the optimizer makes it and then filled, because `load_state_dict` of
    bitsandbytes 0.50 turns paged states into ordinary ones. Errors: `CheckpointError` where names,
    shapes or dtypes differ from what this optimizer has; it is then as it was.
    """
    found = {**tensors, **numbers}
    made: dict[Tensor, Any] = {}
    for parameter, own in _new_states(optimizer):
        # The host writes into managed memory, which on some systems (WSL2) it may not touch while
        # the device works at anything: the zeros of the states before, say.
        synchronize(parameter.device)
        name = names[parameter]
        if not any(f"{name}.{key}" in found for key in own):
            continue  # saved before its first step
        made[parameter] = own
        for key, value in own.items():
            if isinstance(value, Tensor) and value.data_ptr() in _constants(optimizer):
                continue
            saved = found.pop(f"{name}.{key}", None)
            if isinstance(value, Tensor) and (
                isinstance(saved, Tensor)
                and (saved.shape, saved.dtype) == (value.shape, value.dtype)
            ):
                value.copy_(saved)
            elif not isinstance(value, Tensor) and isinstance(saved, int):
                own[key] = saved
            else:
                raise _other_optimizer(optimizer, f"{name}.{key}")
    if found:
        raise _other_optimizer(optimizer, next(iter(found)))
    optimizer.state.update(made)


def make_states(optimizer: torch.optim.Optimizer) -> None:
    """Give the parameters without a state the one that their first step would begin with.

    A step that has them allocates next to nothing, and where there is no room for them that is
    known before any of it is taken: an optimizer that finds none has changed the parameters before.
    Of paged states bitsandbytes 0.50 ends the process then, without an error.
    """

    def is_missing(parameter: nn.Parameter) -> bool:
        return parameter not in optimizer.state

    optimizer.state.update(dict(_new_states(optimizer, is_missing)))


def _is_paged(optimizer: torch.optim.Optimizer, parameter: Tensor) -> bool:
    return getattr(optimizer, "is_paged", False) and parameter.numel() >= PAGED_FROM_ELEMENTS


def gradient_like(parameter: Tensor) -> Tensor:
    """Memory for the gradient that backward leaves of a parameter, not filled."""
    return torch.empty_like(parameter, dtype=getattr(parameter, "grad_dtype", parameter.dtype))


def _new_states(
    optimizer: torch.optim.Optimizer, chosen: Callable[[nn.Parameter], bool] = lambda one: True
) -> Iterator[tuple[nn.Parameter, MutableMapping[str, Any]]]:
    """The chosen parameters, each with the state that its first step would begin with."""
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if not chosen(parameter):
                continue
            if isinstance(optimizer, torch.optim.AdamW):
                yield (
                    parameter,
                    {
                        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    },
                )
                continue
            optimizer.init_state(group, parameter, group_index, index)  # type: ignore[attr-defined]
            yield parameter, optimizer.state.pop(parameter)


def _constants(optimizer: torch.optim.Optimizer) -> set[int]:
    """Addresses of bitsandbytes' tables of 8-bit values, which its states refer to."""
    return {table.data_ptr() for table in getattr(optimizer, "name2qmap", {}).values()}


def _other_optimizer(optimizer: torch.optim.Optimizer, name: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint's optimizer state {name} is not one of {type(optimizer).__name__}",
        "resume with the --optim of the checkpoint",
    )


def warmup_steps(config: TrainingConfig, num_steps: int) -> int:
    """Whole steps of warm-up; a value below 1 is a share of all steps."""
    if config.warmup_steps < 1:
        return math.ceil(config.warmup_steps * num_steps)
    return round(config.warmup_steps)


def learning_rates(config: TrainingConfig, num_steps: int) -> Callable[[int], float]:
    """The learning rate of step 1 ... num_steps: linear warm-up, then the schedule down to 0.

    The last step of cosine and linear still trains: 0 would be reached one step after it.
    """
    warmup = warmup_steps(config, num_steps)

    def at(step: int) -> float:
        if step <= warmup:
            return config.peak_rate * step / warmup
        if config.lr_scheduler_type == "constant":
            return config.peak_rate
        done = (step - 1 - warmup) / max(1, num_steps - warmup)
        if config.lr_scheduler_type == "linear":
            return config.peak_rate * max(0.0, 1 - done)
        return config.peak_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return at
