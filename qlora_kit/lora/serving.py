"""What those that serve an adapter refuse, or leave out without a word.

Each rule was read in a server's source. vLLM 0.32.0 (`config/lora.py`, `lora/peft_helper.py`,
`lora/lora_model.py`, `lora/model_manager.py`, the `hf_to_vllm_mapper` of each model):

- `--max-lora-rank` takes the values of `VLLM_RANKS`, 16 where it is not given. Buffers have that
  rank and are padded, so any smaller one fits; a larger `r`, or one in `rank_pattern`, is refused.
- `use_rslora` is read. `rank_pattern` and `alpha_pattern` are since 0.32: 0.12 to 0.31 scale every
  module by `lora_alpha / r`, without a word.
- Tensors are found by the names of modules. Those under a name that the model does not have are
  left out without a word where its last part is right. So an adapter with the text model's names
  does nothing on a multimodal class, but for those that rename `model.` (`RENAMES_TEXT`).
- Full weights under `embed_tokens.base_layer` and `lm_head.base_layer` are skipped without a word,
  others are refused; so are `modules_to_save`, bias and DoRA, which `lora/adapter_files.py` refuses
  already. Projections of hybrids (`in_proj`) are served.
- Prompts are tokenized by the base's tokenizer, and written by its chat template, unless
  `--tokenizer` says otherwise.

llama.cpp's convert_lora_to_gguf.py (at 0b03adaa) reads `lora_alpha` alone, and llama.cpp scales by
alpha over the rank of each pair: `use_rslora` and `alpha_pattern` are lost, ranks are not.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from qlora_kit.base.safetensors_file import some
from qlora_kit.lora.adapter_files import AdapterFiles, read_adapter

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT = 16
RENAMES_TEXT = (
    *("qwen2_vl", "qwen2_5_vl", "mistral3"),
    *("gemma3n", "gemma4", "gemma4_unified"),
)
"""Multimodal families of which vLLM 0.32 finds the text model's names too."""
PARTS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
GGUF = "export --format gguf-lora writes what llama.cpp needs"
NOT_PORTABLE = "the base is named by a path of this machine, {}, which others do not have: "
"""What is said of a base's name, with what names it for them yet to come."""


@dataclass(frozen=True)
class Served:
    """What a server must know of an adapter.

    `rank` is the largest, `patterns` are the options that give modules a rank or an alpha of their
    own. `names_of_text` says of which multimodal family it has the text model's names, where it
    has. `full` are the names of full weights beside it, `rows` those of its embedding where the
    base's files have fewer.
    """

    rank: int
    use_rslora: bool = False
    patterns: tuple[str, ...] = ()
    names_of_text: str | None = None
    full: tuple[str, ...] = ()
    rows: int | None = None

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        trained_on: Mapping[str, Any],
        names: Iterable[str] = (),
    ) -> Self:
        """What PEFT's `config`, the header of our files and the `names` of the tensors say."""
        ranks = config.get("rank_pattern") or {}
        is_text = trained_on.get("adapter_keys") == "text"
        return cls(
            rank=max(config["r"], *ranks.values(), 1),
            use_rslora=bool(config.get("use_rslora")),
            patterns=tuple(n for n in ("rank_pattern", "alpha_pattern") if config.get(n)),
            names_of_text=trained_on.get("wrapper") if is_text else None,
            full=tuple(name for name in names if not name.endswith(PARTS)),
            rows=trained_on.get("embedding_rows"),
        )

    @classmethod
    def of_files(cls, files: AdapterFiles) -> Self:
        """The same, of an adapter that is saved."""
        return cls.of(files.config, files.trained_on, files.entries)

    @property
    def max_lora_rank(self) -> int | None:
        """The `--max-lora-rank` with which vLLM serves it; None where it serves no such rank."""
        return next((rank for rank in VLLM_RANKS if rank >= self.rank), None)

    @property
    def is_served(self) -> bool:
        """Whether vLLM serves all of it on its base."""
        found = self.names_of_text is None or self.names_of_text in RENAMES_TEXT
        return self.max_lora_rank is not None and found and not self.full and self.rows is None

    def notes(self) -> Iterator[str]:
        """What is refused or left out somewhere, a sentence each."""
        if self.max_lora_rank is None:
            yield (
                f"vLLM serves no rank above {VLLM_RANKS[-1]}, and this is {self.rank}: merged into "
                "its base it has none (export --format hf)"
            )
        if self.use_rslora or "alpha_pattern" in self.patterns:
            option = "use_rslora" if self.use_rslora else "alpha_pattern"
            yield (
                f"llama.cpp's own converter does not read {option}, and scales by lora_alpha / r "
                f"without a word: {GGUF}"
            )
        if self.patterns:
            yield (
                f"vLLM before 0.32 does not read {' and '.join(self.patterns)}, and scales every "
                "module by lora_alpha / r without a word: serve it with 0.32 or later"
            )
        if self.names_of_text is not None and self.names_of_text not in RENAMES_TEXT:
            yield (
                f"it has the names of the text model alone: on a whole {self.names_of_text} "
                "checkpoint vLLM finds nothing of it, and answers as the base does without an "
                "error; what is trained with --adapter_keys wrapper is found"
            )
        if self.full:
            yield (
                f"it holds full weights beside A and B ({some(self.full)}), which servers leave "
                "out or refuse: PEFT's merge_and_unload puts them into the base"
            )
        if self.rows is not None:
            yield (
                f"it was trained with {self.rows} embedding rows, which no file of the base has: "
                "an export of the merged model has them (export --format hf)"
            )

    def rank_note(self) -> str | None:
        """That vLLM has to be told the rank, where it has to."""
        given = self.max_lora_rank
        if given is None or given <= VLLM_DEFAULT:
            return None
        return (
            f"vLLM serves rank {self.rank} with --max-lora-rank {given}; its default is "
            f"{VLLM_DEFAULT}, with which it refuses the adapter"
        )


def served_beside(base: Path, directory: Path) -> tuple[tuple[str, ...], str | None]:
    """What is to be noted of an adapter in `directory` on its `base`, and what serves both.

    Nothing where no adapter lies there.
    """
    if not directory.is_dir():
        return (), None
    served = Served.of_files(read_adapter(directory))
    return tuple(served.notes()), vllm_command(served, str(base), directory)


def vllm_command(served: Served, base: str, directory: Path) -> str | None:
    """The command line that serves the adapter in `directory` with vLLM; None where it does not.

    A tokenizer that lies beside it comes with it, for its chat template is the adapter's.
    """
    if not served.is_served:
        return None
    words = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(served.max_lora_rank)]
    if (directory / "tokenizer_config.json").is_file():
        words += ["--tokenizer", str(directory)]
    name = directory.resolve().name
    return shlex.join([*words, "--lora-modules", f"{name}={directory}"])
