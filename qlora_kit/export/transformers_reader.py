"""An export as transformers reads it, with nothing of ours in between.

transformers says which tensors it missed and which it did not know, and loads all the same with
random weights in their place; here that is an error. Shapes and values are not looked at: wrong
ones show in the distance. What bitsandbytes holds is multiplied by our own matmuls: on CPUs its own
are wrong for some widths, and repack weights in place (0.50); and in 8 bits they round the tokens
too, which is no distance of the weights.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.utils import logging

from qlora_kit.base.architecture import architecture_of
from qlora_kit.base.bnb_tensors import hold_as_ours
from qlora_kit.base.towers import multimodal_class
from qlora_kit.errors import ExportError
from qlora_kit.export.verify import AT_ONCE, Piece
from qlora_kit.gguf.layout import gguf_facts
from qlora_kit.process.out_of_memory import is_out_of_memory

TRANSFORMERS = "transformers"
REMEDY = "nothing was written; report this with the command and the model"
LISTED = 3
"""Tensors that an error names."""


def read_model(directory: Path, device: torch.device) -> Any:
    """The model in `directory` on a device.

    A multimodal checkpoint is read as the class that transformers has for its family.
    Errors: `ExportError` for one that transformers does not read, or reads in part.
    """
    config = json.loads((directory / "config.json").read_text())
    kind = AutoModelForCausalLM
    if "text_config" in config and (name := multimodal_class(config["model_type"])) is not None:
        kind = getattr(transformers, name)
    capped = config.get("text_config", config).get("attn_logit_softcapping") is not None
    model = _read(kind, directory, device, capped, dtype="auto")
    hold_as_ours(model)
    return model


def read_gguf(file: Path, config: PreTrainedConfig, device: torch.device) -> Any:
    """The model in a GGUF in fp32 on a device, its numbers and names by `config`.

    Of most families transformers does not take all of these from a GGUF. Errors: `ExportError`.
    """
    said = config.to_dict()
    said.pop("quantization_config", None)
    kind, facts = said.pop("model_type"), gguf_facts(config.model_type)
    if architecture_of(facts.architecture).gguf is facts:
        kind = facts.architecture  # a family that is written, and read, as another one
    plain = AutoConfig.for_model(kind, **said)
    capped = said.get("attn_logit_softcapping") is not None
    more = {"gguf_file": file.name, "config": plain, "dtype": torch.float32}
    return _read(AutoModelForCausalLM, file.parent, device, capped, **more)


def _read(kind: Any, directory: Path, device: torch.device, capped: bool, **more: Any) -> Any:
    """What transformers reads, whole. Of the kinds of attention only `eager` has a soft cap."""
    with _quiet(), _refusals():
        model, said = kind.from_pretrained(
            directory,
            device_map={"": str(device)},
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            attn_implementation="eager" if capped else None,
            **more,
        )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found := sorted(map(str, said.get(what, ()))):
            listed = f"{len(found)} {what.replace('_', ' ')}: {', '.join(found[:LISTED])}"
            raise ExportError(f"{TRANSFORMERS} reads the export with {listed}", REMEDY)
    return model.eval()


def read_tokenizer(directory: Path, *, file: str | None = None) -> Any:
    """The tokenizer in `directory`, or in the GGUF `file` there. Errors: `ExportError`."""
    more = {} if file is None else {"gguf_file": file}
    with _quiet(), _refusals():
        return AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, **more
        )


@torch.no_grad()
def model_pieces(model: Any, rows: Sequence[Sequence[int]]) -> Iterator[Piece]:
    """The model's logits for each row of token ids, for all positions but the last."""
    device = model.get_input_embeddings().weight.device
    step = max(1, AT_ONCE // model.get_output_embeddings().out_features)
    for number, row in enumerate(rows):
        ids = torch.tensor([row[:-1]], device=device)
        if ids.shape[1] <= step:
            yield Piece(number, 0, model(input_ids=ids, use_cache=False).logits[0])
            continue
        body = model.base_model
        given = body(input_ids=ids, use_cache=False)
        for start in range(0, ids.shape[1], step):
            # The model's own forward on what its decoder gave for these positions.
            states = given.last_hidden_state[:, start : start + step]
            part = type(given)(last_hidden_state=states)
            body.forward = lambda *_, part=part, **__: part
            try:
                logits = model(input_ids=ids[:, start : start + step], use_cache=False).logits
            finally:
                del body.forward
            yield Piece(number, start, logits[0])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside transformers draws no bars, and says nothing: what it reports is looked at.

    The bar of its GGUF reader heeds no setting, so that nothing at all goes to stderr.
    """
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Whatever transformers raises is an `ExportError`, but for want of memory."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ExportError(f"{TRANSFORMERS} does not read the export: {error}", REMEDY) from error
