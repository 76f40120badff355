"""What writing a checkpoint takes beside the tensors of the run, which are all still there."""

from __future__ import annotations

import tracemalloc

import torch

from qlora_kit.training.checkpoint import load_checkpoint, save_checkpoint


def test_a_checkpoint_is_written_without_a_copy_of_its_tensors(tmp_path):
    tensors: dict[str, torch.Tensor] = {
        f"master.layers.{i}.lora_A": torch.randn(64, 1024 + i) for i in range(32)
    }
    tensors |= {f"optimizer.{i}.step": torch.tensor(float(i)) for i in range(32)}
    held = sum(one.nbytes for one in tensors.values())
    tracemalloc.start()
    try:
        path = save_checkpoint(tmp_path, 3, tensors, {"seed": 1}, lambda directory: None)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < held / 4, (most, held)
    found = load_checkpoint(path)
    assert found.step == 3
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[name], one) for name, one in tensors.items())
