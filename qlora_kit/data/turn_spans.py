"""Where an assistant's turn is in a rendered chat, found by comparing renderings.

Turn i is what the rendering of the first i + 1 messages has more than that of the first i with the
header of an answer, where each of these is the beginning of the whole.

Where not even the rendering of the chat up to the turn begins with its prompt (that of R1's
distills ends in `<think>`, Mistral v0.3 writes the system text with a user's turn that comes last),
the chat is the prompt and behind it the turn's own text with its end token. Where the own text
begins is found by rendering the turn with other contents. Ids are never searched for.
"""

from __future__ import annotations

import os
import re
from typing import Any

from qlora_kit.data.rendering import THOUGHT, Messages, Renderer, Rendering, is_written
from qlora_kit.data.tokens import Span
from qlora_kit.errors import DataError

LONGEST_LEAD, LONGEST_END = 256, 2**20
"""Characters that a template may write between the header of an answer and its text, and those of
a last message with its header."""


def turn_span(template: Renderer, messages: Messages, index: int, whole: Rendering) -> Span | None:
    """Where message `index` is in `whole`, or None where the renderings do not concatenate."""
    before = template.render(messages[:index], header=True)
    after = template.render(messages[: index + 1])
    first, last = len(before.text), len(after.text)
    if not (whole.text.startswith(before.text) and whole.text.startswith(after.text)):
        return None
    if first >= last:
        return None
    return first, first + _trained_length(template, whole.part(first, last))


def with_end(
    template: Renderer, messages: Messages, index: int, whole: Rendering, span: Span
) -> tuple[Rendering, Span]:
    """A chat and a turn of it, with the end that a turn has where its template writes it none.

    GLM's answers end where `<|user|>` or `<|observation|>` begins the next message: the model says
    that token, and stops. Where no message follows, what would begin one is written.
    """
    end, message = span[1], messages[index]
    if whole.text[:end].rstrip().endswith(template.special):
        return whole, span
    rest = whole.part(end)
    if not rest.text:
        rest = _next_message(template, messages[:index], message)
    begins = [one for one in template.ends if rest.text.startswith(one)]
    if not begins or any(first == 0 for first, _ in rest.literals):
        return whole, span
    last = end + len(max(begins, key=len))
    return (whole if whole.part(end).text else whole + rest.part(0, last - end)), (span[0], last)


def _next_message(template: Renderer, before: Messages, message: dict[str, Any]) -> Rendering:
    """What a template writes behind an answer where the next message follows; perhaps nothing."""
    calls = {name: message[name] for name in ("tool_calls",) if message.get(name)}
    following = {"role": "tool" if calls else "user", "content": "a"}
    # Where the thoughts of earlier turns are taken out, a chat without any shows it.
    plain = {"role": "assistant", "content": "a", **calls}
    for chat in ([*before, message], [{"role": "user", "content": "a"}, plain]):
        try:
            alone, longer = template.render(chat).text, template.render([*chat, following])
        except DataError:
            continue
        if longer.text.startswith(alone):
            return longer.part(len(alone))
    return Rendering("")


def behind_prompt(template: Renderer, messages: Messages) -> tuple[Rendering, Span] | None:
    """The prompt of the last message and behind it the message's own text; and where that is.

    None where the template does not show where the own text begins.
    """
    *before, message = messages
    prompt, whole = template.render(before, header=True), template.render(messages)
    plain: dict[str, Any] = {n: message[n] for n in ("role", "name") if n in message}
    one, other = (template.render([*before, {**plain, "content": text}]) for text in ("a", "1"))
    frame = os.path.commonprefix((one.text, other.text))  # noqa: RUF071
    surplus, lead = _behind_header(template, before, prompt.text, frame)
    if surplus is None:
        return None
    closing = one.part(len(frame) + 1)
    frame = frame[: len(frame) - len(lead)]
    # Words behind an answer are what a template writes at the end of every chat.
    if not whole.text.startswith(frame) or _has_words(template, closing.text):
        return None
    turn = whole.part(len(frame))
    turn = turn.part(0, _trained_length(template, turn))
    content = message.get("content") or ""
    if THOUGHT in content and content.partition(THOUGHT)[0].strip() not in turn.text:
        # The template writes without its thoughts what the model has to write with them.
        closing = closing.part(0, _trained_length(template, closing))
        turn = template.own_text(content.strip()) + closing
    # What the prompt ends with already is not written twice.
    for already in (surplus, surplus.strip()):
        if already and turn.text.startswith(already):
            turn = turn.part(len(already))
            break
    text = prompt + turn
    return (text, (len(prompt.text), len(text.text))) if turn.text else None


def _trained_length(template: Renderer, turn: Rendering) -> int:
    """How many characters of a turn are trained on: all of it, or up to its end token.

    A line end behind the end token is the template's: generation has stopped before it.
    """
    text = turn.text.rstrip()
    literal = len(text) in {last for _, last in turn.literals}
    ended = text.endswith(template.added) and not literal
    return len(text) if ended else len(turn.text)


def _has_words(template: Renderer, text: str) -> bool:
    for token in sorted(template.special, key=len, reverse=True):
        text = text.replace(token, "")
    return bool(text.strip())


def _behind_header(
    template: Renderer, before: Messages, prompt: str, frame: str
) -> tuple[str, str] | tuple[None, str]:
    """What a prompt and a frame have behind the header of an answer that both share."""
    shared = len(os.path.commonprefix((prompt, frame)))  # noqa: RUF071
    # Both may go on with another control token, and these begin alike.
    for match in re.finditer(r"<[^<>\s]+>|\[[A-Z_]+\]", prompt):
        if match.start() < shared < match.end() and match[0] in template.added:
            shared = match.start()
    surplus, lead = prompt[shared:], frame[shared:]
    # Where each goes on in its own way, that must be behind a control token: else it is a header
    # that the template does not write.
    parted = not (surplus and lead) or prompt[:shared].endswith(template.added)
    least = len(template.render(before).text)
    if parted and shared >= least:
        return surplus, lead
    # What is before the header is written in two ways: the same last message and header end it.
    found = _aligned(prompt, frame, max(0, len(prompt) - least))
    if found is None:
        return None, ""
    surplus, lead, common = found
    header = len(prompt) - least - len(surplus)
    if is_written(before[-1], common) or 0 < header <= len(common):
        return surplus, lead
    return None, ""


def _aligned(prompt: str, frame: str, header: int) -> tuple[str, str, str] | None:
    """What a prompt has behind the end that both share, what a frame has, and that end.

    Both end with the same last message and the header of an answer. The prompt may go on with what
    it gives the model to begin with, the frame with what the template writes before an answer's
    text. Of all the ways to cut both, the one that leaves the longest common end.
    """
    backwards, other = prompt[-LONGEST_END:][::-1], frame[-LONGEST_END:][::-1]
    # What a prompt has behind the shared end is at most the header that it writes.
    cuts = [(surplus, 0) for surplus in range(min(LONGEST_LEAD, len(backwards), header + 1))]
    cuts += [(0, lead) for lead in range(1, min(LONGEST_LEAD, len(other)))]
    shared = {
        cut: len(os.path.commonprefix((backwards[cut[0] :], other[cut[1] :])))  # noqa: RUF071
        for cut in cuts
    }
    surplus, lead = max(cuts, key=shared.__getitem__, default=(0, 0))
    end = len(prompt) - surplus
    common = prompt[end - shared.get((surplus, lead), 0) : end]
    return (prompt[end:], frame[len(frame) - lead :], common) if common else None
