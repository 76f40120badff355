"""A masker written apart: what each of the project's chat templates writes, by string formatting.

It shares no import with the code that it judges. A chat becomes pieces of text, each of them
trained on or not; the ids are those that transformers gives for the template's text, and a token
is trained on when one of its characters stands in a trained piece.
"""

BOS, EOS = "<s>", "</s>"


def pieces(name, messages):
    """`[(text, trained)]` of a chat under the template of that name."""
    found = [] if name == "llama-2" else [(BOS, False)]
    previous = None
    for message in messages:
        role, content = message["role"], message["content"]
        learn = role == "assistant" and message.get("weight", 1) == 1
        found += TEMPLATES[name](role, content, learn, previous)
        previous = role
    return found


def chatml(role, content, learn, _):
    return [
        (f"<|im_start|>{role}\n", False),
        (f"{content}<|im_end|>", learn),
        ("\n", False),
    ]


def llama_3(role, content, learn, _):
    role = {"tool": "ipython"}.get(role, role)
    header = f"<|start_header_id|>{role}<|end_header_id|>\n\n"
    return [(header, False), (f"{content}<|eot_id|>", learn)]


def llama_2(role, content, learn, previous):
    if role == "system":
        return [(f"{BOS}[INST] <<SYS>>\n{content}\n<</SYS>>\n\n", False)]
    if role == "user":
        return [
            ("" if previous == "system" else f"{BOS}[INST] ", False),
            (f"{content} [/INST]", False),
        ]
    return [(f" {content} {EOS}", learn)]


def alpaca(role, content, learn, _):
    if role == "system":
        return [(f"{content}\n\n", False)]
    if role == "user":
        return [(f"### Instruction:\n{content}\n\n", False)]
    return [("### Response:\n", False), (f"{content}{EOS}", learn), ("\n\n", False)]


def plain(role, content, learn, _):
    header = (f"{role.capitalize()}:\n", False)
    if role == "assistant":
        return [header, (f"{content}{EOS}", learn), ("\n", False)]
    return [header, (f"{content}\n", False)]


TEMPLATES = {
    "chatml": chatml,
    "llama-3": llama_3,
    "llama-2": llama_2,
    "alpaca": alpaca,
    "plain": plain,
}


def labels_of(name, messages, ids, offsets):
    """-100 or the id of each token, by the characters that the masker says are trained on."""
    trained = [learn for text, learn in pieces(name, messages) for _ in text]
    return [
        token if any(trained[first:last]) else -100
        for token, (first, last) in zip(ids, offsets, strict=True)
    ]
