"""How the next token is drawn from its logits.

Temperature 0 takes the likeliest. Else a token is drawn from the nucleus (top-p) by inverting its
cumulative distribution at one uniform number, which depends on the seed and on how many tokens the
answer has already: an answer depends on its prompt and its seed, and rows of a batch may each have
settings of their own. What comes before it, the penalty for tokens that were there and top-k, is
transformers' own; the penalty sees a row's tokens, prompt included, and no padding.

Sources: Holtzman et al., "The Curious Case of Neural Text Degeneration" (2020), for the nucleus;
Keskar et al., "CTRL" (2019), for the penalty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from qlora_kit.config.generation import SamplingConfig
from qlora_kit.device.target import sent

NUMBERS_AT_ONCE = 64
"""Uniform numbers of a row that go to the device in one copy."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; each as the option of its name. Errors: `ConfigError`."""

    temperature: float = SamplingConfig.temperature
    top_p: float = SamplingConfig.top_p
    top_k: int = SamplingConfig.top_k
    repetition_penalty: float = SamplingConfig.repetition_penalty
    seed: int = SamplingConfig.seed

    def __post_init__(self) -> None:
        SamplingConfig(**vars(self))

    @staticmethod
    def of(options: SamplingConfig) -> Sampling:
        """As the options of a command say it."""
        return Sampling(**{field.name: getattr(options, field.name) for field in fields(Sampling)})

    def drawer(self, prompts: Sequence[Sequence[int]], steps: int) -> Drawer:
        """What draws up to so many tokens after each of some prompts."""
        return Drawer([Drawn(self, prompt, steps) for prompt in prompts])


class Drawn:
    """What drawing the next token of a row remembers of those before it."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], steps: int) -> None:
        self.sampling, self.step = sampling, 0
        self._prompt, self._seen = prompt, torch.empty(0, dtype=torch.long)
        self._uniforms = torch.empty(0)
        if sampling.temperature:
            # Drawn on the CPU whatever the device: a seed means the same numbers everywhere. The
            # first of them are the same however many are drawn.
            generator = torch.Generator().manual_seed(sampling.seed)
            self._uniforms = torch.rand(steps, generator=generator)

    def uniforms(self, count: int) -> Tensor:
        """The numbers (count,) of the next steps; 0 behind the last."""
        numbers = self._uniforms[self.step : self.step + count]
        return torch.nn.functional.pad(numbers, (0, count - len(numbers)))

    def penalised(self, logits: Tensor) -> Tensor:
        """The logits (1, V) with the penalty for the tokens that were there."""
        from transformers import RepetitionPenaltyLogitsProcessor

        if self._prompt:
            self._seen, self._prompt = sent(self._prompt, logits.device), ()
        penalty = RepetitionPenaltyLogitsProcessor(self.sampling.repetition_penalty)
        return penalty(self._seen[None], logits)  # type: ignore[arg-type, no-any-return]

    def add(self, tokens: Tensor, place: int) -> None:
        """What was drawn: the one at its place of `tokens` (B,)."""
        self.step += 1
        if self.sampling.repetition_penalty != 1:
            self._seen = torch.cat((self._seen, tokens[place : place + 1]))


class Drawer:
    """Draws a token for each of some rows, step after step, while they are the same rows.

    After the first step nothing goes from the host to the device, or back, but the uniform numbers
    of the next `NUMBERS_AT_ONCE` steps.
    """

    def __init__(self, rows: Sequence[Drawn]) -> None:
        self.rows = list(rows)
        chosen = [row.sampling for row in rows]
        self._is_penalised = any(one.repetition_penalty != 1 for one in chosen)
        self._sampled = [place for place, one in enumerate(chosen) if one.temperature]
        self._places: Tensor | None = None  # None where every row is sampled
        self._settings = torch.empty(0)
        self._by_top_k: list[tuple[int, Tensor | None]] = []
        self._uniforms, self._used = torch.empty(0), NUMBERS_AT_ONCE

    def __call__(self, logits: Tensor) -> Tensor:
        """Tokens (B,) for logits (B, V) in fp32."""
        if self._is_penalised:
            logits = torch.cat(
                [
                    row.penalised(one[None]) if row.sampling.repetition_penalty != 1 else one[None]
                    for row, one in zip(self.rows, logits, strict=True)
                ]
            )
        everywhere = len(self._sampled) == len(self.rows)
        if not self._sampled:
            drawn = logits.argmax(-1)
        elif everywhere:
            drawn = self._draw(logits)
        else:
            self._prepare(logits.device)
            assert self._places is not None
            some = self._draw(logits.index_select(0, self._places))
            drawn = logits.argmax(-1).index_copy_(0, self._places, some)
        for place, row in enumerate(self.rows):
            row.add(drawn, place)
        return drawn

    def _draw(self, logits: Tensor) -> Tensor:
        """The same of the rows that are sampled."""
        from transformers import TopKLogitsWarper

        self._prepare(logits.device)
        for top_k, places in self._by_top_k:
            # It reads no ids.
            warper = TopKLogitsWarper(top_k)
            if places is None:
                logits = warper(None, logits)  # type: ignore[arg-type]
            else:
                some = warper(None, logits.index_select(0, places))  # type: ignore[arg-type]
                logits = logits.index_copy(0, places, some)
        uniform = self._uniforms[:, self._used, None]  # (S, 1)
        self._used += 1
        return nucleus(logits, self._settings[0], self._settings[1], uniform)

    def _prepare(self, device: torch.device) -> None:
        """What the device needs for the next steps, in as few copies as there are kinds of it."""
        sampled = [self.rows[place] for place in self._sampled]
        if self._used == NUMBERS_AT_ONCE:
            numbers = torch.stack([row.uniforms(NUMBERS_AT_ONCE) for row in sampled])
            self._uniforms, self._used = numbers.to(device, non_blocking=True), 0
        if self._settings.numel():
            return
        chosen = [row.sampling for row in sampled]
        settings = [[one.temperature for one in chosen], [one.top_p for one in chosen]]
        self._settings = sent(settings, device)[..., None]  # (2, S, 1)
        if len(sampled) < len(self.rows):
            self._places = sent(self._sampled, device)
        for top_k in sorted({one.top_k for one in chosen} - {0}):
            places = [place for place, one in enumerate(chosen) if one.top_k == top_k]
            every = len(places) == len(chosen)
            self._by_top_k.append((top_k, None if every else sent(places, device)))


def nucleus(
    logits: Tensor, temperature: float | Tensor, top_p: float | Tensor, uniform: Tensor
) -> Tensor:
    """Tokens (B,) from logits (B, V): the nucleus' cumulative distribution inverted at `uniform`.

    The nucleus is the fewest likeliest tokens whose probabilities sum to at least `top_p`. The
    others are one number each, or one a row, (B, 1).
    """
    # The largest becomes 0 first, so that a tiny temperature gives -inf and never inf.
    shifted = logits - logits.amax(-1, keepdim=True)
    scaled = shifted / torch.as_tensor(temperature).clamp(min=1e-6)
    # Stable, so that equal logits have one order on every device.
    probabilities, tokens = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    cumulative = probabilities.cumsum(-1)
    # A token is in while those before it do not reach top_p: at least one is. All are where top_p
    # is 1, whatever sums are rounded to.
    # Logits that are not finite are an error of the caller's, and no index outside.
    top_p = torch.as_tensor(top_p)
    inside = ((cumulative - probabilities) < top_p) | (top_p >= 1)
    last = (inside.sum(-1, keepdim=True) - 1).clamp(min=0)
    target = uniform.to(cumulative) * cumulative.gather(-1, last)
    # Sums made in parallel need not rise to the last bit: `last` keeps the rank in the nucleus.
    rank = torch.searchsorted(cumulative, target, right=True).minimum(last)
    return tokens.gather(-1, rank)[:, 0]
