"""What goes wrong inside a run, done in its process before the command starts."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import struct
import time
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_pre_hook

from qlora_kit.device.target import has_values
from qlora_kit.run import assembly, evaluation, publish, replan, run, saving
from qlora_kit.training import loop, loss


def slow_steps() -> None:
    """Each step takes 50 ms more, and says that it begins."""

    def wait(step: int, model: Any) -> None:
        print(f"step {step} begins")
        time.sleep(0.05)

    _before_each_step(wait)


def endless_step() -> None:
    """The third step does not end for a long time, in small pieces, as a big model's would."""
    endless_step_endless_grace()
    _grace(0.3)


def endless_step_endless_grace() -> None:
    """The same, with more time than it takes: it ends if nothing stops it."""
    _grace(3600)

    def wait(step: int, model: Any) -> None:
        if step == 3:
            print("step 3 goes on and on")
        for _ in range(6000 if step == 3 else 0):
            time.sleep(0.01)

    _before_each_step(wait)


def nan_loss_at_2() -> None:
    """Step 2 alone has a module whose output is not finite."""
    _poison_output({2})


def nan_loss_from_1() -> None:
    """No step of the run is finite."""
    _poison_output(set(range(1, 100)))


def nan_loss_from_3() -> None:
    """So has every step from the third on."""
    _poison_output(set(range(3, 100)))


def nan_gradient_at_2() -> None:
    """One element of one adapter's gradient is not finite in step 2."""

    def poison(step: int, model: Any) -> None:
        if step == 2:
            name, parameter = [p for p in model.named_parameters() if p[1].requires_grad][-1]
            assert ".lora_B." in name
            hook = parameter.register_hook(lambda grad: _with_nan(grad, hook))

    _before_each_step(poison)


def full_device_above_one_row() -> None:
    """Two rows at a time do not fit, from step 2 on."""
    _full(lambda step, rows: step >= 2 and rows > 1)


def full_device() -> None:
    """Not even one row fits in step 3."""
    _full(lambda step, rows: step >= 3)


def full_device_in_optimizer() -> None:
    """In step 4, when the optimizer has changed one adapter and none of the others."""

    def half_a_step(optimizer: Any, args: Any, options: Any) -> None:
        first = optimizer.param_groups[0]["params"][0]
        if at["step"] == 4 and has_values(first):
            first.data.add_(1.0)
            torch.empty(2**55, dtype=torch.uint8)

    at = {"step": 0}
    register_optimizer_step_pre_hook(half_a_step)
    _before_each_step(lambda step, model: at.update(step=step))


def bug_in_optimizer() -> None:
    """The same with an error that says nothing of memory."""

    def half_a_step(optimizer: Any, args: Any, options: Any) -> None:
        first = optimizer.param_groups[0]["params"][0]
        if at["step"] == 4 and has_values(first):
            first.data.add_(1.0)
            raise RuntimeError("shapes do not match")

    at = {"step": 0}
    register_optimizer_step_pre_hook(half_a_step)
    _before_each_step(lambda step, model: at.update(step=step))


def full_device_after_the_passes() -> None:
    """In step 4, when its gradients are there and nothing has been done with them."""
    real = loop.total_norm

    def total_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
        if at["step"] == 4 and has_values(gradients[0]):
            torch.empty(2**55, dtype=torch.uint8)
        return real(gradients)

    at = {"step": 0}
    loop.total_norm = total_norm
    _before_each_step(lambda step, model: at.update(step=step))


def full_device_for_states() -> None:
    """The states of the optimizer do not fit."""

    def make_states(optimizer: Any) -> None:
        torch.empty(2**55, dtype=torch.uint8)

    replan.make_states = make_states


def tight_memory() -> None:
    """The process may grow by 150 MiB from its first step on."""

    def limit(step: int, model: Any) -> None:
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        if not limited:
            limited.append(step)
            resource.setrlimit(resource.RLIMIT_AS, (size + 150 * 1024**2,) * 2)

    limited: list[int] = []
    _before_each_step(limit)


def little_room() -> None:
    """The process may grow by 400 MiB from its start on."""
    _room(400)


def little_room_without_preflight() -> None:
    """The same, and nothing is tried before the first step."""
    _room(400)
    run.try_largest = lambda *args: 0


def room_for_half() -> None:
    """The process may grow by 900 MiB from its start on."""
    _room(900)


def stop_in_load() -> None:
    """SIGTERM comes while weights are read."""
    real = assembly.read_weights

    def read_weights(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    assembly.read_weights = read_weights


def stop_in_save() -> None:
    """SIGTERM comes while the second checkpoint is being written."""
    real = saving.save_adapter
    saves = []

    def save_adapter(*args: Any, **options: Any) -> None:
        saves.append(1)
        if len(saves) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        real(*args, **options)

    saving.save_adapter = save_adapter


def stop_twice_in_save() -> None:
    """Two SIGTERMs come at once while the second checkpoint is being written."""
    _signals_in_save(signal.SIGTERM, 0)


def stop_in_save_and_later_again() -> None:
    """The second one comes when it is no longer the same request."""
    _signals_in_save(signal.SIGTERM, 1.1)


def time_is_up_in_save() -> None:
    """SIGXCPU comes while the second checkpoint is being written, and again a second later."""
    _signals_in_save(signal.SIGXCPU, 1.1)


def _signals_in_save(number: signal.Signals, later_s: float) -> None:
    real = saving.save_adapter
    saves = []

    def save_adapter(*args: Any, **options: Any) -> None:
        saves.append(1)
        real(*args, **options)
        if len(saves) == 2:
            os.kill(os.getpid(), number)
            time.sleep(later_s)
            os.kill(os.getpid(), number)

    saving.save_adapter = save_adapter


def interrupt_once() -> None:
    """SIGINT comes in the second micro-batch of the third step, which then goes on for a while."""
    real = loss.supervised_loss
    seen: list[int] = []

    def supervised_loss(model: Any, batch: Any) -> torch.Tensor:
        if seen and torch.is_grad_enabled() and has_values(batch["input_ids"]):
            seen.append(3)
            print("micro-batch of step 3")
            if len(seen) == 3:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.3)
        return real(model, batch)

    loss.supervised_loss = supervised_loss
    _before_each_step(lambda step, model: seen.append(step) if step == 3 else None)


def stop_in_next_step() -> None:
    """SIGTERM comes in the first step that this process takes."""
    taken: list[int] = []

    def stop(step: int, model: Any) -> None:
        if not taken:
            taken.append(step)
            os.kill(os.getpid(), signal.SIGTERM)

    _before_each_step(stop)


def killed_before_tidying() -> None:
    """SIGKILL comes when the result is there, and the checkpoints that nobody asked for still."""
    saving.prune_unplanned = lambda *args: os.kill(os.getpid(), signal.SIGKILL)


def full_disk_at_checkpoint_2() -> None:
    """The second checkpoint finds no room."""
    real = saving.save_checkpoint

    def save_checkpoint(directory: Any, step: int, *args: Any) -> Any:
        if step == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))
        return real(directory, step, *args)

    saving.save_checkpoint = save_checkpoint


def name_looked_for_too_early() -> None:
    """The first default name is free when it is looked for, and taken when it comes to it."""
    from qlora_kit.run import place

    place.output_directory = lambda config, bits: next(place.default_names(config, bits))


def ignored(name: str) -> None:
    """The signal is ignored, as nohup does, and comes in every step."""
    number = signal.Signals[name]
    signal.signal(number, signal.SIG_IGN)
    _before_each_step(lambda step, model: os.kill(os.getpid(), number))


def signal_in(phase: str, name: str) -> None:
    """A signal comes in a phase of the run: PHASES has them."""
    arrived: list[str] = []

    def strike() -> None:
        if not arrived:
            arrived.append(name)
            os.kill(os.getpid(), signal.Signals[name])

    module, where, nth = PHASES[phase]
    if module is loop:
        _before_each_step(lambda step, model: strike() if step == nth else None)
        return
    real, calls = getattr(module, where), []

    def call(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == nth:
            strike()
        return real(*args, **options)

    setattr(module, where, call)


PHASES: dict[str, tuple[Any, str, int]] = {
    "loading": (assembly, "read_weights", 1),
    "first-evaluation": (evaluation, "evaluate", 1),
    "step": (loop, "", 3),
    "save": (saving, "save_adapter", 2),
    "last-evaluation": (evaluation, "evaluate", 4),
    "writing": (publish, "model_card", 1),
}
"""Each is a function in a room of a run and which of its calls, or `step` and which one."""


def adapter_value_flips_at_3() -> None:
    """One value of one adapter is not finite from step 3 on, as a broken memory cell makes it."""

    def flip(step: int, model: Any) -> None:
        if step == 3:
            parameter = next(p for p in model.parameters() if p.requires_grad)
            parameter.data.view(-1)[5] = float("inf")

    _before_each_step(flip)


def full_device_in_evaluation_above_one_row() -> None:
    """Two held-out rows at a time do not fit."""
    _full_evaluation(lambda calls, rows: rows > 1)


def full_device_in_the_last_evaluation() -> None:
    """Before the training the held-out rows fit; after it not even one does."""
    _full_evaluation(lambda calls, rows: calls > 1)


def own_mounts() -> None:
    """What is mounted from here on is there for this process and its own alone."""
    kernel, new_namespace, private = ctypes.CDLL(None, use_errno=True), 0x20000, 0x44000
    if kernel.unshare(new_namespace) or kernel.mount(b"none", b"/", None, private, None):
        raise OSError(ctypes.get_errno(), "unshare")


def without_privileges() -> None:
    """As an ordinary user: permissions count, also where the tests run as root."""
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    if ctypes.CDLL(None, use_errno=True).capset(header, nothing):
        raise OSError(ctypes.get_errno(), "capset")


def _full_evaluation(too_much: Any) -> None:
    real = evaluation.evaluate
    calls = []

    def evaluate(model: Any, batches: Any) -> Any:
        calls.append(1)
        batches = list(batches)
        if too_much(len(calls), max(batch["input_ids"].shape[0] for batch in batches)):
            torch.empty(2**55, dtype=torch.uint8)
        return real(model, batches)

    evaluation.evaluate = evaluate


def _room(mebibytes: int) -> None:
    if torch.backends.cuda.is_built():
        # A plan's first backward starts a thread for a card, and the C library gives it room.
        with FakeTensorMode():
            pass
        torch.ones(1, requires_grad=True).sum().backward()
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + mebibytes * 1024**2,) * 2)


def _grace(seconds: float) -> None:
    from qlora_kit.process import signals

    signals.StopSignals.__init__.__defaults__ = (seconds,)


def _before_each_step(act: Any) -> None:
    real = loop._accumulate

    def accumulate(model: Any, micro_batches: Any, step: int, *rest: Any) -> torch.Tensor:
        # The run's plan takes its steps on fake tensors, before there is a model.
        if has_values(model.get_input_embeddings().weight):
            act(step, model)
        return real(model, micro_batches, step, *rest)

    loop._accumulate = accumulate


def _poison_output(steps: set[int]) -> None:
    """A forward hook on one module, in the passes of these steps and when they are looked into.

    An output projection is called as a module; what reads norms or gates is called with them.
    """
    state = {"step": 0, "hooked": False}

    def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * float("nan") if state["step"] in steps and module.training else output

    def act(step: int, model: Any) -> None:
        state["step"] = step
        if not state["hooked"]:
            state["hooked"] = True
            model.get_submodule("model.layers.1.self_attn.o_proj").register_forward_hook(hook)

    _before_each_step(act)


def _with_nan(grad: torch.Tensor, hook: Any) -> torch.Tensor:
    hook.remove()
    grad = grad.clone()
    grad.view(-1)[3] = float("nan")
    return grad


def _full(too_much: Any) -> None:
    """Allocate more than there is where a batch is too large, half-way through its gradients."""
    real = loss.supervised_loss
    at = {"step": 0}

    def supervised_loss(model: Any, batch: Any) -> torch.Tensor:
        found = real(model, batch)
        if torch.is_grad_enabled() and too_much(at["step"], batch["input_ids"].shape[0]):
            found.backward(retain_graph=True)
            torch.empty(2**55, dtype=torch.uint8)
        return found

    loss.supervised_loss = supervised_loss
    _before_each_step(lambda step, model: at.update(step=step))
