"""Fake runs of the same options, one for each placement of their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from qlora_kit.base.base import Base
from qlora_kit.base.config_only import open_shape
from qlora_kit.base.embedding import kept_on_device, movable_embeddings
from qlora_kit.base.layer_store import is_too_much, streamed_bytes
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.lora import LoRAConfig
from qlora_kit.config.training import Placement, TrainingConfig
from qlora_kit.device.found import find_device
from qlora_kit.device.target import Capability, has_own_memory
from qlora_kit.plan.fake_model import FakeModel
from qlora_kit.plan.fake_run import FakeRun
from qlora_kit.training.preference import objective_of


class FakeRuns:
    """Made when they are asked for; `placements` are those that the options allow on `device`.

    `base` is what the first of them is filled from, `notes` say what an option does not do. Of a
    base that a run has `opened` no file is opened again. A base is streamed from the cache where
    the `room` on its host, as far as that is known, has a run do so. Errors: `ConfigError`,
    `ModelError`, `UnsafeInputError`, `ResourceError`.
    """

    def __init__(
        self,
        base: BaseConfig,
        lora: LoRAConfig,
        training: TrainingConfig,
        device: str | None,
        opened: Base | None,
        capability: Capability | None,
        room: int | None = None,
    ) -> None:
        self.device = torch.device(device) if device else find_device(base.device)
        self.own_memory = has_own_memory(self.device)
        self.placements = training.placements_on(self.own_memory)
        # An adapter to go on with has rank and targets of its own, which `lora` has taken over.
        self._lora = replace(lora, adapter=None, adapter_fingerprint=None, allow_other_base=False)
        self._config, self._training, self._capability = base, training, capability
        self._room = room
        self._given = (opened.embedding_rows, opened.files) if opened else (None, None)
        self._objective = objective_of(training)
        self._made: dict[tuple[bool, bool], FakeRun] = {}
        self.base = self._open()
        model, head_bits = self.base.model, self.base.quantization.head_bits
        kept = kept_on_device(model, head_bits) if training.offload_embedding else None
        self.notes = () if kept is None else (kept,)
        self._movable = bool(movable_embeddings(model, head_bits))
        if training.offload_embedding is None and not self._movable:
            there = (replace(one, embedding_on_host=False) for one in self.placements)
            self.placements = tuple(dict.fromkeys(there))
        self.placements = self.possible(self.placements)

    def of(self, placement: Placement) -> FakeRun:
        """The run whose tensors lie where this says, until another one is asked for."""
        # Where weights lie is decided when they are loaded: each such place has a model.
        where = placement.embedding_on_host, placement.base_on_host
        if where not in self._made:
            base = self._open() if self._made else self.base
            options = self._lora, self._training, self.device, self._capability
            fake = FakeModel(base, *options, placement)
            if placement.base_on_host and self._is_short_of(fake):
                fake = FakeModel(self._open(), *options, placement, in_files=True)
            self._made[where] = FakeRun(fake, self._objective)
        self._made[where].place(placement)
        return self._made[where]

    def _is_short_of(self, fake: FakeModel) -> bool:
        """Whether the host cannot hold the layers of a base that is kept in the cache."""
        if self._room is None or not self.base.may_be_kept:
            return False
        return is_too_much(streamed_bytes(fake.layers), self._room)

    def possible(self, placements: Sequence[Placement]) -> tuple[Placement, ...]:
        """Those of the placements that differ for this model: tiles are those of our blocks."""
        if self.of(placements[0]).fused:
            return tuple(placements)
        return tuple(dict.fromkeys(replace(one, mlp_tiled=False) for one in placements))

    def in_effect(self, placement: Placement, levels: Sequence[str]) -> Placement:
        """A placement without what moves nothing, of this model or at these levels."""
        return replace(
            placement,
            embedding_on_host=placement.embedding_on_host and self._movable,
            activations_on_host=placement.activations_on_host and {*levels} != {"none"},
        )

    def _open(self) -> Base:
        return open_shape(self._config, self.device, *self._given)
