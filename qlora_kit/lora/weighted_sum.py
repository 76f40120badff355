"""The weighted sum of adapters as one: ranks beside each other, and weights in its B's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from qlora_kit.config.limits import LARGEST_ALPHA
from qlora_kit.errors import AdapterError
from qlora_kit.lora.low_rank import Part


def check_weights(weights: Mapping[str, float]) -> None:
    """Refuse those of no sum. Errors: `AdapterError` for no finite numbers, and for all 0."""
    wrong = {
        name: weight
        for name, weight in weights.items()
        if isinstance(weight, bool)
        or not isinstance(weight, (int, float))
        or not abs(weight) <= LARGEST_ALPHA
    }
    if wrong or not any(weights.values()):
        said = str(wrong or dict(weights))[:100]
        raise AdapterError(
            f"the weights of a sum must be numbers, not all 0, got {said}",
            "give a weight for each adapter, such as {'a': 0.7, 'b': 0.3}",
        )


def weighted_sum(terms: Sequence[tuple[Part, float]]) -> Part:
    """One part whose update is the weighted sum of those of parts of one linear."""
    factors = [part.scaling * weight for part, weight in terms]
    # The largest is left to the matmul, and the others are taken by it: equal ones leave every B as
    # it is, and no B grows out of the range of its dtype.
    scaling = max(factors, key=abs)
    dtype = terms[0][0].dtype
    for part, _ in terms:
        dtype = torch.promote_types(dtype, part.dtype)
    downs = [part.weights[0].to(dtype) for part, _ in terms]
    ups = [
        part.weights[1].float().mul(factor / scaling).to(dtype)
        for (part, _), factor in zip(terms, factors, strict=True)
    ]
    weights = torch.cat(downs, dim=0), torch.cat(ups, dim=1)  # (sum of r, in) and (out, sum of r)
    return Part(terms[0][0].base, weights, scaling, dtype)
