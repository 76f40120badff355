"""The sample data sets: two tasks that `tiny` cannot do before it is fine-tuned and can do after.

- `extract`: a short passage becomes a record, `name: Mia; place: harbour; item: red kite`.
- `query`: a table's columns and a question become a query, `select owner from boats where ...`.

Each is learned as one LoRA adapter, so that adapters can be swapped on one base. The layouts of
prompt and completion are not in the corpus; the words and the skill under them (reading names,
columns and values out of the context) are. Prompts are distinct over all three files of a task,
and a completion is right only if it matches exactly.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

from corpus import BOYS, COLOURS, COLUMNS, GIRLS, ITEMS, PLACES, TOPICS, sentences

SPLITS = {"train": 1200, "valid": 100, "test": 100}
Row = dict[str, str]

# Every passage names one person, one place and one coloured item; the item may be met again.
PASSAGES = [
    ["{when} {name} {went} to the {place}.", "there {they} {found} a {item}."],
    ["{when} {name} {found} a {item} in the {place}.", "it was {spot}."],
    ["{when}, at the {place}, {name} {found} a {item}."],
    ["{when}, {name} {lost} a {item}.", "it happened in the {place}."],
    ["the {job} told {name} about a {item}.", "it was {spot} near the {place}."],
    ["a {item} was {spot}.", "so {name} took it to the {place}."],
    ["the {place} was quiet.", "only {name} was there with a {item}."],
    ["in the {place} there lived a {job} called {name}.", "{they} had a {item}."],
    ["the {item} in the {place} belongs to {name}.", "{they} {move}."],
]
BEFORE = ["{weather}.", "somebody was singing.", "it smelled of {food}.", "it was a {adj} day."]
AFTER = [
    "everyone was {feeling}.",
    "a {animal} ran past.",
    "nobody said a word.",
    "then it was time to go home.",
    "{they} was {feeling}.",
]


def extract(rng: random.Random) -> Row:
    name = rng.choice(GIRLS + BOYS)
    bound = {
        "name": name,
        "they": "she" if name in GIRLS else "he",
        "place": rng.choice(PLACES),
        "item": f"{rng.choice(COLOURS)} {rng.choice(ITEMS)}",
    }
    before = rng.sample(BEFORE, k=rng.random() < 0.4)
    after = rng.sample(AFTER, k=rng.random() < 0.4)
    passage = sentences(rng, *before, *rng.choice(PASSAGES), *after, **bound)
    return {
        "prompt": passage + "\n",
        "completion": "name: {name}; place: {place}; item: {item}".format(**bound),
    }


NUMERIC = ("price", "age", "length", "weight")
# Not `year`: a model of this size swaps the last digits of long numbers when it copies them.
QUERY_KEYS = ("owner", "colour", "place", "town", "food", "day", "job", *NUMERIC)
# Question, what is wanted, and the operator: `=` compares any column, the others numbers only.
# The words of a query all occur in the corpus: an embedding that was never trained, such as that
# of `<`, is out of the reach of an adapter on the attention.
QUESTIONS = [
    ("What is the {want} of the {topic} whose {key} is {value}?", "{want}", "="),
    ("Show the {want} of all {topic} with {key} {value}.", "{want}", "="),
    ("Which {topic} have the {key} {value}?", "name", "="),
    ("How many {topic} have the {key} {value}?", "count", "="),
    ("Which {topic} have a {key} over {value}?", "name", "over"),
    ("Show the {want} of {topic} with a {key} over {value}.", "{want}", "over"),
    ("Which {topic} have a {key} under {value}?", "name", "under"),
    ("How many {topic} have a {key} under {value}?", "count", "under"),
]


def query(rng: random.Random) -> Row:
    question, want, operator = rng.choice(QUESTIONS)
    keys = QUERY_KEYS if operator == "=" else NUMERIC
    topic, key = rng.choice([(t, k) for t in TOPICS for k in TOPICS[t].split() if k in keys])
    columns = TOPICS[topic].split()
    others = rng.sample([each for each in columns if each != key], k=2)
    shown = ", ".join(["name", *rng.sample([key, *others], k=3)])
    bound = {"topic": topic, "want": others[0], "key": key, "value": COLUMNS[key](rng)}
    if key == "age":
        question = question.replace("a {key}", "an {key}")
    command = f"get {want} of {{topic}} where {{key}} {operator} {{value}}"
    return {
        "prompt": f"{topic}: {shown}\n{question.format(**bound)}\n",
        "completion": command.format(**bound),
    }


TASKS: dict[str, Callable[[random.Random], Row]] = {"extract": extract, "query": query}


def write(directory: Path, seed: int) -> None:
    """Write `<task>/train.jsonl`, `valid.jsonl` and `test.jsonl` for every task."""
    for task, make_row in TASKS.items():
        rng, rows = random.Random(f"{task} {seed}"), {}
        while len(rows) < sum(SPLITS.values()):
            row = make_row(rng)
            rows[row["prompt"]] = json.dumps(row) + "\n"
        lines = iter(rows.values())
        (directory / task).mkdir(parents=True, exist_ok=True)
        for split, count in SPLITS.items():
            text = "".join(next(lines) for _ in range(count))
            (directory / task / f"{split}.jsonl").write_text(text)
