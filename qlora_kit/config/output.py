"""The results of a run: where they go, here and on the Hugging Face hub, and what is reported."""

from __future__ import annotations

import re
import typing
from dataclasses import dataclass

from qlora_kit.options.checks import FALSE, MOST_STEPS, TRUE, a_name, also, between, joined
from qlora_kit.options.option import Options, option


def _option_names(value: str | tuple[str, ...]) -> str | None:
    names = value.split(",") if isinstance(value, str) else value
    return None if all(name.strip() for name in names) and names else "names of options"


@dataclass(frozen=True)
class OutputConfig(Options):
    """Where the results go, and what is reported."""

    title: typing.ClassVar[str] = "output"

    output_dir: str | None = option(
        None,
        "new or empty directory for the results",
        check=a_name(),
        path=True,
        shown_default="runs/<model>-<data>-<bits>bit, then -2, -3 ...",
        metavar="DIR",
    )
    overwrite: bool = option(
        False, "replace what is in --output_dir", aliases=("overwrite_output_dir",)
    )
    save_steps: int = option(
        0,
        "write a checkpoint every so many steps",
        check=between(0, MOST_STEPS),
        shown_default="0: by the clock alone, and when a signal or an error stops the run",
    )
    save_minutes: float = option(
        10.0,
        "write a checkpoint after so many minutes without one; a finished run keeps none of them; "
        "0: none",
        check=between(0, 10**6),
    )
    save_total_limit: int = option(2, "checkpoints that are kept", check=between(1, MOST_STEPS))
    eval_steps: int = option(
        0,
        "held-out loss every so many steps",
        check=between(0, MOST_STEPS),
        shown_default="0: at the start and the end",
    )
    logging_steps: int = option(
        1, "a line in metrics.jsonl every so many steps", check=between(1, MOST_STEPS)
    )
    load_best: bool = option(False, "save the adapter of the lowest held-out loss, not the last")
    early_stopping: int | None = option(
        None,
        "stop after this many evaluations without a lower held-out loss",
        check=between(1, MOST_STEPS),
    )
    resume_from_checkpoint: str | None = option(
        None,
        "auto (the newest whole checkpoint of --output_dir) or the directory of a checkpoint",
        check=a_name("auto or the directory of a checkpoint"),
        path=True,
        reads=also(dict.fromkeys(TRUE, "auto") | dict.fromkeys(FALSE)),
        metavar="auto|DIR",
    )
    override: str | tuple[str, ...] | None = option(
        None,
        "options, comma-separated, that may differ from those of the checkpoint",
        check=_option_names,
        metavar="NAMES",
    )
    report_to: str = option(
        "none",
        "trackers of accelerate: tensorboard, wandb, ... (comma-separated)",
        check=a_name("none, or names of trackers with commas between them"),
        reads=joined,
        metavar="NAMES",
    )
    plot: str | None = option(
        None,
        "draw loss, learning rate, tokens/s and memory of the finished run into this .png or .html",
        check=a_name("the name of a file"),
        path=True,
        metavar="FILE",
    )
    sample_prompts: int = option(
        0, "answer this many held-out prompts before and after training", check=between(0, 100)
    )
    compare_bits: bool = option(
        False, "first load the base in 16, 8 and 4 bits and show the memory of each"
    )

    @property
    def overridden(self) -> frozenset[str]:
        """The names in `override`, hyphens as underscores."""
        names = self.override.split(",") if isinstance(self.override, str) else self.override or ()
        return frozenset(name.strip().lstrip("-").replace("-", "_") for name in names)

    def _conflicts(self) -> typing.Iterator[str]:
        if self.eval_steps == 0:
            if self.load_best:
                yield "load_best needs eval_steps of at least 1, got 0"
            if self.early_stopping is not None:
                yield f"early_stopping {self.early_stopping} needs eval_steps of at least 1, got 0"
        if self.resume_from_checkpoint is None and self.override is not None:
            yield "override goes with resume_from_checkpoint, which is not given"
        if self.resume_from_checkpoint is not None and self.overwrite:
            yield (
                f"overwrite is given beside resume_from_checkpoint {self.resume_from_checkpoint}: "
                "name one of them"
            )


NAME_LIMIT = 96
"""Characters of each of the two parts of a repository's name."""


def _a_repository(value: str) -> str | None:
    """A check for what the hub takes as a name, which is asked before it is sent anywhere."""
    parts = value.split("/")
    good = len(parts) == 2 and all(
        re.fullmatch(r"\w([\w.-]*\w)?", part, re.ASCII)
        and len(part) <= NAME_LIMIT
        and not re.search(r"--|\.\.|\.git$", part)
        for part in parts
    )
    return None if good else "the name of a repository on the hub, OWNER/NAME"


@dataclass(frozen=True)
class HubConfig(Options):
    """Where on the hub a result goes."""

    title: typing.ClassVar[str] = "hub"

    push_to_hub: str | None = option(
        None,
        "repository on the Hugging Face hub that gets the result once it is on disk, in place of "
        "an older one's README.md and weights; the token is HF_TOKEN's or that of `hf auth login`",
        aliases=("hub_model_id",),
        check=_a_repository,
        reads=also(dict.fromkeys(FALSE)),
        metavar="OWNER/NAME",
    )
    hub_private: bool = option(
        True, "only you see a repository that is made for it", aliases=("hub_private_repo",)
    )

    def _conflicts(self) -> typing.Iterator[str]:
        if self.push_to_hub is None and not self.hub_private:
            yield "hub_private false goes with push_to_hub, which is not given"
