"""Continuous batching: requests join and leave a running batch between two steps.

A step computes the prompts that wait, then one token for every row. Rows of a batch share the
model's forward and nothing else: each has its own prompt, adapter, way of drawing and end, and
leaves when it has ended. What a request gets depends on itself alone (`sharing.py`), in 16 bits but
for the order of sums in matmuls, which may decide between tokens that are nearly as likely: of 20
greedy answers of `tiny` in bf16, 40 tokens each, 17 were the same alone and together; in fp32 all.

Prompts of one step have at most `most_tokens` together, so that running rows are not held up for
long; one that is longer by itself is computed in parts of so many, a part a step. It is computed
whole where its parts would not be what it is (`Sharing.takes_parts`), or where the kind of cache is
not known. The caches of rows are joined and cut along
the batch, padded on the left to that of the longest row; what that takes is `Engine.cache_bytes`,
and how many requests may run is for the caller to say.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlora_kit.base.decoder import in_mode
from qlora_kit.base.packed_matmul import Copies, copied_bytes
from qlora_kit.base.placed_embedding import computed_in
from qlora_kit.generation.batches import Batch, RowAdapters, by
from qlora_kit.generation.cache import RowBytes
from qlora_kit.generation.group import Group
from qlora_kit.generation.request import Request, Ticket, check_cache, check_request, check_token
from qlora_kit.generation.sampling import Drawer
from qlora_kit.generation.sharing import Sharing
from qlora_kit.lora.bank import AdapterBank
from qlora_kit.lora.switch import Active

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_TOKENS = 2048
"""Tokens of prompts that a step computes, padding included."""


class Engine:
    """Requests on one model, decoded step by step.

    With a bank each request names its adapter; without one, what takes part in the model is left
    alone. Nothing else of the model changes: a step runs in evaluation mode and without gradients,
    and puts each module's mode back. No two threads may be in it at a time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        pad_id: int,
        bank: AdapterBank | None = None,
        most_tokens: float = MOST_TOKENS,
    ) -> None:
        check_cache(model)
        check_token(model, pad_id)
        self._model, self._pad_id, self._most_tokens = model, pad_id, most_tokens
        self._adapters = RowAdapters(model, bank)
        self._sharing = Sharing(model)
        self._modules = list(model.modules())
        self._waiting: deque[Ticket] = deque()
        self._again: list[Ticket] = []
        self._begun: list[Batch] = []
        """Of a prompt whose first parts are computed: none, or one."""
        self._batches: list[Batch] = []
        self._drawer = Drawer([])
        self._row_bytes: RowBytes | None = None
        self._alone = False
        # A run that trains has planned its memory, and a short answer does not need them.
        trains = any(one.requires_grad for one in model.parameters())
        self._copies: Copies | None = None if trains else Copies()

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs."""
        return not (self._waiting or self._begun or self._again or self._batches)

    @property
    def num_waiting(self) -> int:
        """Requests whose prompt is not computed yet."""
        return len(self._waiting) + len(self._begun)

    @property
    def num_running(self) -> int:
        """Requests that get a token in each step."""
        running = sum(ticket.end is None for ticket in self._running())
        return running + len(self._again)

    def add(self, request: Request) -> Ticket:
        """Let a request wait for the next step.

        Errors, and nothing is changed then: `ConfigError` for a number out of its range, an empty
        prompt, a token that the model does not have, or a prompt that together with
        `max_new_tokens` exceeds the model's context; `AdapterError` for an unknown adapter.
        """
        check_request(self._model, request, "the prompt")
        ticket = Ticket(request, self._adapters.find(request.adapter))
        self._waiting.append(ticket)
        return ticket

    def drop(self, ticket: Ticket) -> None:
        """End a request, running or not: it gets no more tokens, and is told no end."""
        ticket.leave("dropped")
        self._waiting = deque(one for one in self._waiting if one is not ticket)
        self._again = [one for one in self._again if one is not ticket]
        # Its cache is cut off before the next step, or here, where nobody is left.
        self._begun, self._batches = (
            [batch for batch in batches if any(one.end is None for one in batch.tickets)]
            for batches in (self._begun, self._batches)
        )
        self._forget()

    # Not inference_mode: a cast that a module caches here must serve training later.
    @torch.no_grad()
    def step(self) -> list[tuple[Ticket, int | None]]:
        """Go on by one token; what each request got, and None where it has ended.

        A request that ends by its length is told its last token, then None. How it ended is
        `Ticket.end`: an error of one request ends that one, and no other. An error of another kind
        is raised, and all requests are dropped.
        """
        begun = [ticket for batch in self._begun for ticket in batch.tickets]
        tickets = [*self._waiting, *begun, *self._again, *self._running()]
        try:
            self._leave()
            self._batches += self._prompts()
            return self._step()
        except BaseException:
            for ticket in tickets:
                ticket.leave("dropped")
            self._waiting.clear()
            self._again, self._begun, self._batches = [], [], []
            self._forget()
            raise

    def _step(self) -> list[tuple[Ticket, int | None]]:
        told: list[tuple[Ticket, int | None]] = []
        parts: list[Tensor] = []
        batches, self._batches = self._batches, []
        with in_mode(self._modules, training=False):
            for batch in batches:
                for one, logits in self._computed(batch):
                    if isinstance(logits, Tensor):
                        parts.append(logits)
                        self._batches.append(one)
                    elif logits is None:
                        self._begun.append(one)
                    else:
                        told += [(ticket, None) for ticket in one.fail(logits)]
        if parts:
            logits = torch.cat(parts) if len(parts) > 1 else parts[0]  # (B, V)
            tickets = self._running()
            drawn = self._draw(tickets, logits)
            # One transfer a step for both, and the only one.
            both = torch.stack((drawn, logits.amax(-1).isfinite().long())).tolist()
            for ticket, token, is_finite in zip(tickets, *both, strict=True):
                told += [(ticket, one) for one in ticket.take(token, bool(is_finite))]
            sizes = [len(batch.tickets) for batch in self._batches]
            for batch, tokens in zip(self._batches, torch.split(drawn, sizes), strict=True):
                batch.group.feed(tokens)
        self._leave()
        return told + self._join()

    def copied_bytes(self) -> int:
        """Bytes of the weights that steps lay out again and keep, 0 where they do not."""
        if self._copies is None:
            return 0
        return copied_bytes(self._modules, computed_in(self._model))

    def copy_nothing(self) -> None:
        """Let steps keep no weights laid out again: there is no room for them."""
        self._copies = None

    def cache_bytes(self, tokens: int, rows: int = 1) -> int | None:
        """Bytes of the cache of so many rows, of which the longest has so many tokens.

        None where the kind of cache is not known. The first call computes one token.
        """
        if self._row_bytes is None:
            group = Group(self._model, [[self._pad_id]], self._pad_id)
            with torch.no_grad(), in_mode(self._modules, training=False):
                group.logits()
            self._row_bytes = group.row_bytes
        return None if self._row_bytes is None else rows * self._row_bytes.at(tokens)

    def _running(self) -> list[Ticket]:
        return [ticket for batch in self._batches for ticket in batch.tickets]

    def _prompts(self) -> list[Batch]:
        """Those whose turn it is, as batches that are to be computed."""
        begun, self._begun = self._begun, []
        chosen, self._again = self._again, []
        width = count = 0
        while self._waiting and not begun:
            width, count = max(width, len(self._waiting[0].request.ids)), count + 1
            if count > 1 and count * width > self._most_tokens:
                break
            chosen.append(self._waiting.popleft())
        return begun + self._made(chosen)

    def _made(self, chosen: Sequence[Ticket]) -> list[Batch]:
        """Batches of requests that start, or start again, from their first token."""
        texts = {ticket: [*ticket.request.ids, *ticket.tokens] for ticket in chosen}

        def key(ticket: Ticket) -> Hashable:
            if self._alone or self._part_of(texts[ticket]):
                return id(ticket)
            apart = self._adapters.apart(ticket.active)
            return apart, self._sharing.of_prompts(len(texts[ticket]))

        made = []
        for tickets in by(chosen, key):
            prompts = [texts[ticket] for ticket in tickets]
            group = Group(self._model, prompts, self._pad_id, self._part_of(prompts[0]))
            made.append(Batch(group, tickets, self._mixed(tickets)))
        return made

    def _part_of(self, prompt: Sequence[int]) -> int | None:
        """How many tokens of a prompt are computed at a time; None: all of them."""
        if len(prompt) <= self._most_tokens or not self._sharing.takes_parts:
            return None
        return None if self.cache_bytes(1) is None else int(self._most_tokens)

    def _computed(self, batch: Batch) -> Iterator[tuple[Batch, Tensor | Exception | None]]:
        """A batch with its logits (B, V), or what was raised where memory ended.

        Rows of a cache whose kind is not known can not leave a batch, and are computed alone from
        the first such batch on.
        """
        logits = batch.logits(self._adapters, self._copies)
        if isinstance(logits, Exception) or batch.group.can_change or len(batch.tickets) == 1:
            yield batch, logits
            return
        self._alone = True
        for one in self._made(batch.tickets):
            yield one, one.logits(self._adapters, self._copies)

    def _draw(self, tickets: list[Ticket], logits: Tensor) -> Tensor:
        drawn = [ticket.drawn for ticket in tickets]
        if drawn != self._drawer.rows:
            self._drawer = Drawer(drawn)
        return self._drawer(logits)

    def _mixed(self, tickets: Sequence[Ticket]) -> Active | None:
        return self._adapters.together([ticket.active for ticket in tickets])

    def _leave(self) -> None:
        """Cut off the rows of requests that have ended, or that are to be computed again."""
        batches = []
        for batch in self._batches:
            kept = []
            for place, ticket in enumerate(batch.tickets):
                if ticket.end is not None:
                    continue
                if self._sharing.is_computed_again(batch.group.lengths[place]):
                    self._again.append(ticket)
                else:
                    kept.append(place)
            if not kept:
                continue
            if len(kept) < len(batch.tickets):
                batch.group.keep(kept)
                batch.tickets = [batch.tickets[place] for place in kept]
                batch.active = self._mixed(batch.tickets)
            batches.append(batch)
        self._batches = batches
        self._forget()

    def _join(self) -> list[tuple[Ticket, None]]:
        """Put the batches together that may share a forward from now on.

        Where memory ends for that, those end that would join a batch; they are what is told.
        """

        def key(batch: Batch) -> Hashable:
            if not batch.group.can_change:
                return id(batch)
            apart = self._adapters.apart(batch.active)
            return apart, self._sharing.of_steps(batch.group.lengths[0])

        told: list[tuple[Ticket, None]] = []
        batches = []
        for first, *others in by(self._batches, key):
            batches.append(first)
            if others and (error := first.join(others, self._mixed)) is not None:
                told += [(t, None) for one in others for t in one.fail(error)]
        self._batches = batches
        return told

    def _forget(self) -> None:
        """Hold nothing of requests that have left."""
        if not self._batches:
            self._drawer = Drawer([])
