"""Which client reads which format, how, and which of our models it should then be.

`trained`: the adapter on the base that it was trained on, quantized. `unquantized`: the same
adapter on the base as it was before, which is what a server has that loads the base in 16 or 32
bits; how far that is from the model as trained is told as well.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One client on one format; `once` for what is tried in one setting alone."""

    client: str
    format: str
    how: str = ""
    against: str = "trained"
    plain_kernels: bool = False
    once: bool = False

    @property
    def script(self) -> str:
        """The module that asks the client."""
        name = "transformers" if self.client == "PEFT" else self.client
        return f"ask_{name.replace('-', '_')}.py"

    @property
    def environment(self) -> str:
        """The client's own environment; PEFT is a part of that of transformers."""
        return "transformers" if self.client == "PEFT" else self.client


UNQUANTIZED = "unquantized"
AUTO = "AutoPeftModelForCausalLM"
ON_4_BITS = "PeftModel on the base in 4 bits"
BESIDE = "with the adapter beside it"
CASES = (
    Case("transformers", "hf"),
    Case("PEFT", "adapter", AUTO, UNQUANTIZED),
    Case("PEFT", "adapter", ON_4_BITS),
    Case("PEFT", "adapter", f"{ON_4_BITS}, no repacking", plain_kernels=True),
    Case("lm-eval", "hf"),
    Case("lm-eval", "adapter", "peft=", UNQUANTIZED),
    Case("vllm", "hf"),
    Case("vllm", "adapter", "base and LoRA", UNQUANTIZED),
    Case("PEFT", "hf-4bit", BESIDE),
    Case("PEFT", "hf-4bit", f"{BESIDE}, no repacking", plain_kernels=True),
    Case("PEFT", "hf-8bit", BESIDE),
    Case("vllm", "hf-4bit", BESIDE, once=True),
    Case("transformers", "hf-4bit, merged", "no repacking", plain_kernels=True),
    Case("transformers", "hf-8bit, merged"),
    Case("transformers", "gguf, F32", "gguf_file"),
    Case("transformers", "gguf, Q8_0", "gguf_file"),
    Case("xllamacpp", "gguf, F32"),
    Case("xllamacpp", "gguf, Q8_0"),
    Case("xllamacpp", "gguf-lora", "on the base in F32"),
)
CLIENTS = tuple(sorted({one.client for one in CASES}, key=str.lower))
