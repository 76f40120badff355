"""An adapter beside the base that an export holds, and the card that says how to load both.

The base lies in the export's own directory, the adapter in its folder `adapter`, as PEFT's files.
It is said there to belong to the base beside it, under the name that the export has.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from huggingface_hub import ModelCardData

from qlora_kit.base.base import Base
from qlora_kit.base.open import open_base
from qlora_kit.base.source import is_path
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.export import QUANTIZED, ExportConfig
from qlora_kit.errors import redacted
from qlora_kit.export.adapter_files import CARD, FOLDER
from qlora_kit.export.tensors import dtype_of
from qlora_kit.files.atomic import real_path, write_file
from qlora_kit.lora.adapter import save_adapter


def write_beside(base: Base, adapter: str, options: ExportConfig, directory: Path) -> None:
    """Write an adapter of `base` and a card into `directory`, where the base is written already."""
    assert options.output_dir is not None
    place = real_path(Path(options.output_dir))
    reference = options.base_name or redacted(str(place))
    name = place.name if is_path(reference) else reference
    bits = QUANTIZED.get(options.format, 16)
    # On the CPU, for it is only asked what it is.
    asked = BaseConfig(str(directory), bits=bits, dtype=dtype_of(base, options), device="cpu")
    info = replace(open_base(asked).info, name=name, revision=None)
    save_adapter(base, directory / FOLDER, adapter, (reference, info))
    write_file(directory / CARD, _card(base, options, name).encode())


def _card(base: Base, options: ExportConfig, name: str) -> str:
    """The Markdown of the export's README.md."""
    source = base.source.name
    front = ModelCardData(base_model=source, library_name="peft", tags=["lora", "qlora"])
    form = f"in {QUANTIZED[options.format]} bits" if options.format in QUANTIZED else "as numbers"
    return f"""---
{front.to_yaml()}
---
# `{source}` {form}, and a LoRA adapter beside it

The adapter is not merged: it lies in `{FOLDER}` and belongs to the weights of this directory.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
model = PeftModel.from_pretrained(model, "{name}", subfolder="{FOLDER}")
```

With qlora-kit: `qlora-kit generate --model {name} --adapter {name}/{FOLDER}`.
How far both together are from the model as trained is in `export.json`.
"""
