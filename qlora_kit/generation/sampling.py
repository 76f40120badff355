"""How the next token is drawn from its logits.

Temperature 0 takes the likeliest. Else a token is drawn from the nucleus (top-p) by inverting its
cumulative distribution at one uniform number a step, which depends on the seed and the step alone:
an answer depends on its prompt and the seed, and equal prompts of a batch get equal answers. What
comes before it, the penalty for tokens that were there and top-k, is transformers' own; the penalty
sees a row's tokens, prompt included, and no padding.

Sources: Holtzman et al., "The Curious Case of Neural Text Degeneration" (2020), for the nucleus;
Keskar et al., "CTRL" (2019), for the penalty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_kit.config.generation import SamplingConfig


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; each as the option of its name. Errors: `ConfigError`."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 42

    def __post_init__(self) -> None:
        SamplingConfig(**vars(self))

    def drawer(self, prompts: Sequence[Sequence[int]], steps: int) -> Callable[[Tensor], Tensor]:
        """What gives, step after step, tokens (B,) for logits (B, V); it remembers its rows.

        After the first of `steps` nothing goes from the host to the device, or back.
        """
        from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper

        uniforms, rows, step = torch.empty(0), None, -1

        def draw(logits: Tensor) -> Tensor:
            nonlocal uniforms, rows, step
            step += 1
            if rows is None:
                rows = [torch.tensor(prompt).to(logits.device) for prompt in prompts]
                # Drawn on the CPU whatever the device: a seed means the same numbers everywhere.
                generator = torch.Generator().manual_seed(self.seed)
                uniforms = torch.rand(steps, generator=generator).to(logits)
            if self.repetition_penalty != 1:
                penalty = RepetitionPenaltyLogitsProcessor(self.repetition_penalty)
                # Row by row: the padding of a batch is no token that was there.
                parts = [
                    penalty(row[None], one[None]) for row, one in zip(rows, logits, strict=True)
                ]
                logits = torch.cat(parts)
            if self.temperature == 0:
                drawn = logits.argmax(-1)
            else:
                if self.top_k:
                    # It reads no ids.
                    logits = TopKLogitsWarper(self.top_k)(None, logits)  # type: ignore[arg-type]
                drawn = nucleus(logits, self.temperature, self.top_p, uniforms[step])
            if self.repetition_penalty != 1:
                rows = [torch.cat((row, one[None])) for row, one in zip(rows, drawn, strict=True)]
            return drawn

        return draw


def nucleus(logits: Tensor, temperature: float, top_p: float, uniform: Tensor) -> Tensor:
    """Tokens (B,) from logits (B, V): the nucleus' cumulative distribution inverted at `uniform`.

    The nucleus is the fewest likeliest tokens whose probabilities sum to at least `top_p`.
    """
    # The largest becomes 0 first, so that a tiny temperature gives -inf and never inf.
    shifted = logits - logits.amax(-1, keepdim=True)
    scaled = shifted / max(temperature, 1e-6)
    # Stable, so that equal logits have one order on every device.
    probabilities, tokens = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    cumulative = probabilities.cumsum(-1)
    if top_p < 1:
        # A token is in while those before it do not reach top_p: at least one is.
        # Logits that are not finite are an error of the caller's, and no index outside.
        last = (((cumulative - probabilities) < top_p).sum(-1, keepdim=True) - 1).clamp(min=0)
    else:
        last = torch.full_like(tokens[:, :1], tokens.shape[-1] - 1)
    target = uniform.to(cumulative) * cumulative.gather(-1, last)
    # Sums made in parallel need not rise to the last bit: `last` keeps the rank in the nucleus.
    rank = torch.searchsorted(cumulative, target, right=True).minimum(last)
    return tokens.gather(-1, rank)[:, 0]
