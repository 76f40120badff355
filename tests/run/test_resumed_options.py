"""Which options of a checkpoint have to be those of the run that goes on from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qlora_kit.config.run import RunConfig
from qlora_kit.config.training import TrainingConfig
from qlora_kit.errors import ConfigError
from qlora_kit.run.reporter import Reporter
from qlora_kit.run.resume import check_resumed
from qlora_kit.training.checkpoint import Checkpoint


def checkpoint(**options):
    return Checkpoint(Path("checkpoint-2"), 2, {}, {"config": options, "identity": {}})


def check(saved, training):
    check_resumed(replace(RunConfig(), training=training), {}, saved, set(), Reporter())


def test_an_option_that_is_newer_than_a_checkpoint_counts_as_left_alone_there():
    saved = RunConfig().as_flat()
    for name in ("triton_kernels", "group_by_length"):
        del saved[name]
    check(checkpoint(**saved), TrainingConfig())
    with pytest.raises(ConfigError, match="triton_kernels: True there, False here"):
        check(checkpoint(**saved), TrainingConfig(triton_kernels=False))
