"""`qlora-kit quantize`: a base as a checkpoint that transformers loads in 4 or 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from qlora_kit.commands.argv import parse
from qlora_kit.commands.export import run_export
from qlora_kit.commands.failure import reports_errors
from qlora_kit.config.base import BaseConfig
from qlora_kit.config.export import ExportConfig, QuantizeConfig
from qlora_kit.config.output import HubConfig
from qlora_kit.errors import ConfigError
from qlora_kit.options.parsed import Parsed, refuse_tokens

SUMMARY = "Write a base as a checkpoint that transformers loads in 4 or 8 bits, verified."


@partial(reports_errors, output_is_product=False)
def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parsed = parse("qlora-kit quantize", SUMMARY, (QuantizeConfig, BaseConfig), argv)
    refuse_tokens(parsed)
    return run_export(_as_export(parsed))


def _as_export(parsed: Parsed) -> Parsed:
    """The options of the export that it is. Errors: `ConfigError`."""
    base = parsed[BaseConfig]
    bits = base.bits
    assert bits is not None  # a config says what None stands for
    if bits == 16:
        raise ConfigError("bits 16 quantizes nothing", "give --bits 4 or 8")
    if base.head_bits != 16:
        raise ConfigError(
            f"head_bits {base.head_bits}: a checkpoint has its head in 16 bits",
            "leave --head_bits out; whoever loads it for training may give it",
        )
    if "base_cache" not in parsed.given[BaseConfig]:
        # What is made here is what would be kept, a second time.
        base = replace(base, base_cache=False)
    export = parsed[QuantizeConfig].as_export(bits)
    groups = {**parsed.groups, BaseConfig: base, ExportConfig: export, HubConfig: HubConfig()}
    given = {group: parsed.given.get(group, frozenset()) for group in groups}
    return replace(parsed, groups=groups, given=given)
