"""Where this runs: versions, the card, which libraries answer, what the context takes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import time
from typing import Any

import torch

from gpu_parts.setting import Setting
from qlora_kit.device.target import DTYPES
from qlora_kit.kernels.triton_ops import uses_triton

PACKAGES = (
    *("torch", "triton", "transformers", "bitsandbytes", "peft", "accelerate"),
    *("safetensors", "huggingface_hub", "numpy", "pytest", "rich", "jinja2"),
)
ASKED = "name,driver_version,memory.total,memory.used,clocks.max.sm,power.limit"


def run(setting: Setting, found: dict[str, Any]) -> str:
    """Look and note; on a card also make the context."""
    found["python"] = platform.python_version()
    found["versions"] = {name: _version(name) for name in PACKAGES}
    found["built_for_cuda"] = torch.version.cuda
    if setting.prepared is not None:
        found["prepared"] = json.loads((setting.prepared / "prepared.json").read_text())
    if setting.cuda:
        _card(found)
    began = time.perf_counter()
    from bitsandbytes import cextension

    found["bitsandbytes_import_s"] = time.perf_counter() - began
    found["bitsandbytes_library"] = str(getattr(cextension.lib, "_lib", cextension.lib))
    found["gemm_4bit"] = hasattr(torch.ops.bitsandbytes, "gemm_4bit")
    what = found.get("card", {}).get("name", "CPU")
    return f"{what}, torch {torch.__version__}, {found['versions']['bitsandbytes'] or 'no bnb'}"


def _card(found: dict[str, Any]) -> None:
    free, total = torch.cuda.mem_get_info()
    found["context_bytes"] = total - free
    properties = torch.cuda.get_device_properties(0)
    found["card"] = {
        "name": properties.name,
        "capability": list(torch.cuda.get_device_capability()),
        "total_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "bf16": torch.cuda.is_bf16_supported(False),
    }
    found["cudnn"] = torch.backends.cudnn.version()
    found["attention"] = {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
        "varlen": importlib.util.find_spec("torch.nn.attention.varlen") is not None,
    }
    found["triton"] = {  # it needs a C compiler beside itself
        name: uses_triton(torch.ones(1, device="cuda", dtype=dtype))
        for name, dtype in DTYPES.items()
    }
    small = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    (small @ small).sum().item()
    free, total = torch.cuda.mem_get_info()
    found["with_one_product_bytes"] = total - free - torch.cuda.memory_reserved()
    try:
        command = ["nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        found["nvidia_smi"] = done.stdout.strip() or done.stderr.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        found["nvidia_smi"] = str(error)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
