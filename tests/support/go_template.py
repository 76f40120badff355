"""The part of Go's text/template that chat templates of Ollama are written in.

Texts, `.Field`, `$.Field`, `$i`, strings, numbers, `eq`, `and`, `len`, `slice`, parentheses,
`if` / `else if` / `else`, and `range $i, $_ := .Messages`; no `{{-`.
"""

import re

ACTION = re.compile(r"\{\{\s*(.*?)\s*\}\}(?=.|$)", re.DOTALL)
WORD = re.compile(r'"[^"]*"|[()]|[^\s()]+')
RANGE = re.compile(r"range (\$\w+), (\$\w+) := (\S+)")


def execute(template, data):
    """What Ollama makes of a template and messages, as its `Execute` gives them to it."""
    messages, system = _collated(data)
    root = {"System": system, "Messages": messages}
    parts = ACTION.split(template)  # texts and actions in turn
    assert not any(action.startswith("{") for action in parts[1::2]), "Go does not parse it"
    nodes, place = _block(parts, 0)
    assert place == len(parts), "an end without a beginning"
    return _run(nodes, root, {"$": root})


def _collated(messages):
    found = []
    for message in messages:
        if found and found[-1]["Role"] == message["role"]:
            found[-1]["Content"] += "\n\n" + message["content"]
        else:
            found.append({"Role": message["role"], "Content": message["content"]})
    return found, "\n\n".join(m["content"] for m in messages if m["role"] == "system")


def _block(parts, place):
    """Nodes up to an `else` or `end`, whose place is returned."""
    nodes = []
    while place < len(parts):
        if place % 2 == 0:
            nodes.append(("text", parts[place]))
            place += 1
        elif parts[place].startswith(("else", "end")):
            return nodes, place
        elif parts[place].startswith(("if ", "range ")):
            node, place = _control(parts, place)
            nodes.append(node)
        else:
            nodes.append(("write", parts[place]))
            place += 1
    return nodes, place


def _control(parts, place):
    head = parts[place].removeprefix("else ")
    inside, place = _block(parts, place + 1)
    other = []
    if parts[place].startswith("else if"):
        node, place = _control(parts, place)
        return ("if", head.removeprefix("if "), inside, [node]), place
    if parts[place] == "else":
        other, place = _block(parts, place + 1)
    assert parts[place] == "end"
    kind = head.split()[0]
    return (kind, head.removeprefix("if "), inside, other), place + 1


def _run(nodes, dot, names):
    written = []
    for kind, text, *blocks in nodes:
        if kind == "text":
            written.append(text)
        elif kind == "write":
            written.append(str(_value(text, dot, names)))
        elif kind == "if":
            written.append(_run(blocks[0 if _value(text, dot, names) else 1], dot, names))
        else:
            index, element, of = RANGE.fullmatch(text).groups()
            for number, one in enumerate(_value(of, dot, names)):
                written.append(_run(blocks[0], one, {**names, index: number, element: one}))
    return "".join(written)


def _value(text, dot, names):
    words = WORD.findall(text)
    value = _call(words, dot, names)
    assert not words, text
    return value


def _call(words, dot, names):
    """A function and its arguments, or one value; it takes its words off the list."""
    arguments = []
    while words and words[0] != ")":
        word = words.pop(0)
        if word == "(":
            arguments.append(_call(words, dot, names))
            assert words.pop(0) == ")"
        else:
            arguments.append(_word(word, dot, names))
    function, *rest = arguments
    return function(*rest) if callable(function) else function


FUNCTIONS = {
    "eq": lambda a, b: a == b,
    "and": lambda a, b: a and b,
    "len": len,
    "slice": lambda of, first: of[first:],
}


def _word(word, dot, names):
    if word in FUNCTIONS:
        return FUNCTIONS[word]
    if word.startswith('"'):
        return word[1:-1]
    if word.isdigit():
        return int(word)
    scope = names["$"] if word.startswith("$.") else dot
    return names[word] if word in names else scope[word.removeprefix("$").removeprefix(".")]
