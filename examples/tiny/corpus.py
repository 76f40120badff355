"""The text that `tiny` is pretrained on: an endless, seeded stream of short English documents.

One context-free grammar (`GRAMMAR`) supplies words and phrases; one function per kind of document
puts them together: stories, facts about an invented world, sums, tables, lists, dialogues,
questions about a passage, copying and rewording. Two things make the text worth a language model:

- Every document binds its own names, places and numbers, many of them invented on the spot, so
  that most of what can be predicted has to be read from the context and cannot be memorised.
- `notes` and `requests` show a pattern of random layout two or three times in one document, so
  that the model learns to pick up a layout. The layouts of the sample tasks (`tasks.py`) are kept
  out: no document has `name: ...; place: ...` or `get ... of ... where ...`.

Left out: anything true. Pure Python, no data files; the same seed gives the same text.
"""

import random
import re
from collections.abc import Callable, Iterator


def words(text: str) -> list[str]:
    return text.split()


GIRLS = words(
    "Mia Ada Nora Lily Ruth Clara Ivy Elsa Rosa Anna Zoe Tessa Maya Leah June Iris Emma Sofia Alma "
    "Hazel Olive Freya Wanda Greta Paula Daisy Ella Nina Vera Lucy Molly Edith Pearl Stella Agnes "
    "Martha Sally Kate Joan Dora Fiona Bella Carla Hilda Ingrid Laura Maria Naomi Petra Rita"
)
BOYS = words(
    "Tom Ben Leo Max Oscar Hugo Finn Sam Jonas Peter Otto Felix Adam Noah Theo Karl Luke Eli Omar "
    "Ivan Paul Simon Jack Henry Oliver Ned Arthur Edgar Victor Martin Jasper Emil Anton Boris "
    "Caleb Daniel Erik Frank George Harry Isaac Jacob Kevin Louis Marco Nils Robin Toby "
    "Walter Yusuf"
)
PLACES = words(
    "harbour market library forest garden bridge school mill castle river island beach meadow "
    "station tower farm village valley lake museum bakery kitchen attic barn cave church theatre "
    "lighthouse orchard quarry square temple workshop cellar courtyard desert field hill inn pond"
)
ITEMS = words(
    "kite lamp key boat book drum coat bell basket ring map clock hat box cup ladder mirror pencil "
    "rope shell spoon stone sword tent umbrella violin whistle button candle chair coin crown doll "
    "feather flag flute glove hammer jar kettle letter needle painting pillow ribbon scarf shoe "
    "telescope wheel wagon bottle blanket brush compass saddle shovel teapot ticket trumpet vase"
)
COLOURS = words(
    "red blue green yellow white black brown grey purple orange pink golden silver violet"
)
ADJECTIVES = words(
    "old new small large heavy tiny broken shiny dusty round wooden clean soft strange plain "
    "narrow rusty warm cold pretty smooth sharp light long short thin wide lucky quiet dark"
)
ANIMALS = words(
    "cat dog horse goat crow owl fox rabbit sheep duck hen mouse bear wolf deer frog swan bee "
    "turtle squirrel donkey pig cow eagle seal otter hedgehog parrot lizard goose"
)
FOODS = words(
    "bread cheese apples soup cake honey plums rice beans carrots fish pears nuts milk butter eggs "
    "onions grapes pancakes cherries potatoes jam tea salt pepper sugar lemons noodles"
)
JOBS = words(
    "baker farmer sailor teacher doctor painter miller weaver smith gardener singer hunter cook "
    "carpenter judge guard clerk potter tailor shepherd"
)
TRAITS = words("brave kind clever shy proud gentle lazy funny honest curious patient careful bold")
FEELINGS = words("happy sad tired angry proud calm afraid surprised glad lonely excited worried")
WEEKDAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

# fmt: off
GRAMMAR: dict[str, list[str]] = {
    "name": GIRLS + BOYS,
    "place": PLACES,
    "item": ITEMS,
    "colour": COLOURS,
    "adj": ADJECTIVES,
    "animal": ANIMALS,
    "food": FOODS,
    "job": JOBS,
    "trait": TRAITS,
    "feeling": FEELINGS,
    "day": WEEKDAYS,
    "thing": ["{colour} {item}", "{adj} {item}", "{colour} {item}", "{adj} {colour} {item}"],
    "number": ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve"],
    "relative": ["mother", "father", "sister", "brother", "aunt", "uncle", "grandmother", "cousin"],
    "when": [
        "one morning", "one evening", "on {day}", "last {day}", "after lunch", "before dawn",
        "at noon", "one winter day", "early in spring", "in the autumn", "late at night",
        "when the rain stopped", "during the festival", "after a long week",
    ],
    "went": [
        "went", "walked", "ran", "rode", "hurried", "travelled", "came", "climbed up", "wandered",
        "returned", "drove", "set out",
    ],
    "found": [
        "found", "saw", "picked up", "bought", "noticed", "discovered", "dug up", "was given",
        "spotted", "took", "chose",
    ],
    "lost": ["lost", "dropped", "forgot", "broke", "hid", "sold", "gave away", "left behind"],
    "spot": [
        "under a tree", "behind the door", "near the gate", "beside the road", "on a bench",
        "on the ground", "between two stones", "in the tall grass", "by the water",
        "below the stairs", "on a high shelf", "next to the wall",
    ],
    "weather": [
        "the sun was shining", "it was raining", "the wind was cold", "snow covered the ground",
        "a thick fog hung over the {place}", "the sky was grey", "the stars were out",
        "it was hot and dry", "clouds came up from the sea", "thunder rolled far away",
    ],
    "filler": [
        "{weather}.", "a {animal} was sleeping {spot}.", "the {place} was full of people.",
        "somebody was singing.", "it smelled of {food}.", "a {adj} {animal} ran past.",
        "nobody said a word.", "the {job} was already awake.", "two {job}s were talking {spot}.",
        "there was no hurry.", "it took {number} hours.", "a bell rang {number} times.",
        "the road was long and {adj}.", "everyone felt {feeling}.", "the {animal}s were {feeling}.",
    ],
    "said": ["said", "asked", "answered", "whispered", "shouted", "replied", "called"],
    "move": ["smiled", "laughed", "nodded", "sat down", "stood up", "waved", "looked away"],
    "problem": [
        "the {place} was closed", "the way was blocked by a {adj} cart", "the {item} was missing",
        "a {animal} had eaten all the {food}", "the {job} would not open the door",
        "the bridge had fallen down", "there was no more {food}", "the {adj} {item} was too heavy",
    ],
    "remedy": [
        "asked the {job} for help", "waited until {day}", "took the long way round",
        "shared some {food} with everyone", "built a new one out of wood", "looked again {spot}",
        "called for a {relative}", "made a plan and tried once more", "paid {number} coins",
    ],
    "ending": [
        "in the end everyone was {feeling}.", "that night {name} slept well.",
        "they never forgot that day.", "and so the {thing} came home.", "they all ate {food}.",
        "since then the {place} has been a {adj} place.", "{name} told the story many times.",
        "it was the best day of the year.", "nobody ever found out.",
    ],
    "syllable": words(
        "ba be bo da del dor el en fa fen ga gor ha hel il ka kel kor la lin lo ma mar mi mor na "
        "nel no or pa per ra ren ri ro sa sel sha so ta tan tel tho u va vel vin wa wen yar za zo"
    ),
}
# fmt: on

SLOT = re.compile(r"\{(\w+)\}")
ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou]|hon)")


def expand(rng: random.Random, template: str, **bound: str) -> str:
    """Fill the slots of `template`: bound ones with their value, the others from `GRAMMAR`."""

    def fill(slot: re.Match[str]) -> str:
        key = slot[1]
        return bound[key] if key in bound else expand(rng, rng.choice(GRAMMAR[key]), **bound)

    return SLOT.sub(fill, template)


def sentences(rng: random.Random, *templates: str, **bound: str) -> str:
    """Expand each template into a sentence with its capital letter and its articles, and join."""
    expanded = [ARTICLE.sub(r"\1n ", expand(rng, each, **bound)) for each in templates]
    return " ".join(each[0].upper() + each[1:] for each in expanded)


def invent(rng: random.Random) -> str:
    """A capitalised name that no word list holds, such as `Belmorta`."""
    return "".join(rng.choices(GRAMMAR["syllable"], k=rng.choice((2, 2, 3)))).capitalize()


def cast(rng: random.Random) -> dict[str, str]:
    """Bind the people, place and thing that one document is about."""
    girl = rng.random() < 0.5
    hero, friend = rng.sample(GIRLS if girl else BOYS, 1)[0], rng.choice(GIRLS + BOYS)
    if rng.random() < 0.3:
        hero = invent(rng)
    if friend == hero or rng.random() < 0.3:
        friend = invent(rng)
    return {
        "hero": hero,
        "friend": friend,
        "they": "she" if girl else "he",
        "them": "her" if girl else "him",
        "their": "her" if girl else "his",
        "home": rng.choice(PLACES) if rng.random() < 0.8 else invent(rng).lower(),
        "prize": expand(rng, "{thing}"),
        "pet": rng.choice(ANIMALS),
        "work": rng.choice(JOBS),
    }


STORY_OPENINGS = [
    "{hero} was a {trait} {work} who lived near the {home}.",
    "once there was a {trait} {work} called {hero}.",
    "{when}, {hero} {went} to the {home}.",
    "{when}, {hero} and {friend} {went} to the {home}.",
    "{hero} had a {trait} {pet} and a {prize}.",
    "in the {home} there lived a {pet} who belonged to {hero}.",
    "{hero} wanted a {prize} more than anything.",
    "{hero}, the {work}, left the {home} {when}.",
]
STORY_MIDDLES = [
    "{they} {found} a {prize} {spot}.",
    "{when} {they} {lost} the {prize}.",
    '"Have you seen my {prize}?" {said} {hero}.',
    '"The {prize} is {spot}," {said} {friend}.',
    "but {problem}.",
    "so {hero} {remedy}.",
    "so {hero} and {friend} {remedy}.",
    "{friend} {move} and gave {them} some {food}.",
    "{hero} showed the {prize} to {friend}.",
    "the {pet} followed {hero} to the {place}.",
    "{friend} was {feeling}, but {hero} was {feeling}.",
    "{filler}",
    "{filler}",
    "{hero} put the {prize} {spot} and {move}.",
    "{they} thought of {their} {relative} and felt {feeling}.",
    "the {work} from the {home} {move}.",
]


def story(rng: random.Random) -> str:
    bound = cast(rng)
    middles = rng.sample(STORY_MIDDLES, k=rng.randint(3, 8))
    ending = rng.choice(["{ending}", "{hero} took the {prize} home.", "{hero} thanked {friend}."])
    return sentences(rng, rng.choice(STORY_OPENINGS), *middles, ending, **bound)


def world() -> dict[str, dict[str, str]]:
    """The invented world: the same 60 towns for every seed, so that its facts can be learned."""
    rng = random.Random(0)
    return {
        invent(rng): {
            "ruler": invent(rng),
            "river": invent(rng),
            "food": rng.choice(FOODS),
            "animal": rng.choice(ANIMALS),
            "colour": rng.choice(COLOURS),
            "job": rng.choice(JOBS),
            "year": str(rng.randint(300, 1900)),
        }
        for _ in range(60)
    }


WORLD = world()
FACTS = [
    "{town} lies on the river {river}.",
    "the ruler of {town} is {ruler}.",
    "people in {town} like to eat {food}.",
    "the flag of {town} is {colour} and shows a {animal}.",
    "{town} was founded in the year {year}.",
    "most people in {town} work as a {job}.",
    "{ruler} rules the town of {town}.",
    "the river {river} flows through {town}.",
    "in {year} a {job} built the first house of {town}.",
]


def facts(rng: random.Random) -> str:
    towns = rng.sample(sorted(WORLD), k=rng.randint(1, 2))
    return "\n".join(
        sentences(rng, *rng.sample(FACTS, k=rng.randint(3, 5)), town=town, **WORLD[town])
        for town in towns
    )


def sums(rng: random.Random) -> str:
    lines = []
    for _ in range(rng.randint(3, 7)):
        a, b = rng.randint(1, 30), rng.randint(1, 20)
        item, name = rng.choice(FOODS + ITEMS), rng.choice(GIRLS + BOYS)
        if item in ITEMS:
            item += "es" if item.endswith(("x", "s", "sh")) else "s"
        lines.append(
            rng.choice(
                [
                    f"{a} + {b} = {a + b}",
                    f"{a + b} - {b} = {a}",
                    f"{a} plus {b} is {a + b}.",
                    f"{a} is {'more' if a > b else 'not more'} than {b}.",
                    f"{name} has {a} {item} and gets {b} more. Now {name} has {a + b} {item}.",
                    f"{name} had {a + b} {item} and sold {b}. Now {name} has {a} {item}.",
                    f"count from {a}: " + ", ".join(str(a + i) for i in range(6)),
                ]
            )
        )
    return "\n".join(lines)


# How the cells of a column are drawn.
COLUMNS: dict[str, Callable[[random.Random], str]] = {
    "name": invent,
    "owner": lambda rng: rng.choice(GIRLS + BOYS),
    "colour": lambda rng: rng.choice(COLOURS),
    "place": lambda rng: rng.choice(PLACES),
    "town": lambda rng: rng.choice(sorted(WORLD)),
    "food": lambda rng: rng.choice(FOODS),
    "day": lambda rng: rng.choice(WEEKDAYS),
    "job": lambda rng: rng.choice(JOBS),
    "price": lambda rng: str(rng.randint(2, 99)),
    "age": lambda rng: str(rng.randint(2, 99)),
    "length": lambda rng: str(rng.randint(2, 99)),
    "weight": lambda rng: str(rng.randint(2, 99)),
    "year": lambda rng: str(rng.randint(1800, 1999)),
}
# What the tables are about, and the columns that each may have next to `name`.
TOPICS = {
    "boats": "owner colour length place year price",
    "ships": "owner town length weight year",
    "books": "owner colour year price weight",
    "birds": "colour food place age weight",
    "dogs": "owner colour food town age weight",
    "cats": "owner colour food place age weight",
    "horses": "owner colour food town age weight",
    "houses": "owner colour town year price",
    "farms": "owner town food year price",
    "shops": "owner town day place year",
    "cakes": "colour food day price weight",
    "songs": "owner day town length year",
    "plays": "owner place day length price",
    "paintings": "owner place year price length",
    "lamps": "colour place price weight length",
    "bells": "town place year weight",
    "people": "town job food age weight",
    "children": "town day food age weight",
}


def table(rng: random.Random) -> str:
    """A small table in one of three layouts, with questions that its cells answer."""
    topic = rng.choice(list(TOPICS))
    columns = ["name", *rng.sample(TOPICS[topic].split(), k=rng.randint(2, 3))]
    rows = [[COLUMNS[column](rng) for column in columns] for _ in range(rng.randint(2, 5))]
    separator = rng.choice([" | ", ", ", "\t"])
    title = rng.choice(["{topic}", "table of {topic}", "the {topic}"])
    lines = [sentences(rng, title, topic=topic)]
    lines += [separator.join(columns), *map(separator.join, rows)]
    for _ in range(rng.randint(2, 4)):
        row, column = rng.choice(rows), rng.randrange(1, len(columns))
        key, value = columns[column], row[column]
        matches = " and ".join(other[0] for other in rows if other[column] == value)
        lines.append(
            rng.choice(
                [
                    f"What is the {key} of {row[0]}? {value}",
                    f"The {key} of {row[0]} is {value}.",
                    f"Which of the {topic} have {key} {value}? {matches}",
                    f"{topic} whose {key} is {value}: {matches}",
                ]
            )
        )
    return "\n".join(lines)


def lists(rng: random.Random) -> str:
    pool = rng.choice([FOODS, ITEMS, ANIMALS, COLOURS, JOBS, PLACES, GIRLS + BOYS])
    words = rng.sample(pool, k=rng.randint(3, 6))
    joined = ", ".join(words)
    bullets = "\n".join(f"- {word}" for word in words)
    numbered = "\n".join(f"{i}. {word}" for i, word in enumerate(words, 1))
    owner = rng.choice(GIRLS + BOYS)
    return rng.choice(
        [
            f"{owner} needs {joined}.\n{bullets}",
            f"List for {owner}:\n{numbered}\nIn one line: {joined}",
            f"Words: {joined}\nBackwards: {', '.join(reversed(words))}",
            f"Words: {joined}\nIn order: {', '.join(sorted(words))}",
            f"Words: {joined}\nFirst: {words[0]}\nLast: {words[-1]}\nSecond: {words[1]}",
            f"{bullets}\nHow many? {len(words)}",
            f"{owner} counted: {joined}. That makes {len(words)}.",
        ]
    )


def dialogue(rng: random.Random) -> str:
    bound = cast(rng)
    exchanges = [
        ("where are you going?", "to the {home}, to buy some {food}."),
        ("who has the {prize}?", "{third} has it. I saw it {spot}."),
        ("what did you find?", "a {prize}. It was {spot}."),
        ("how are you?", "I am {feeling}, because {problem}."),
        ("do you like the {pet}?", "yes, it is a {trait} {pet}."),
        ("when will {third} come?", "on {day}, I think."),
        ("what is that?", "that is a {prize}."),
        ("may I have the {prize}?", "no, the {prize} belongs to {third}."),
        ("who lives in the {home}?", "a {work} called {third}."),
    ]
    lines = []
    for question, answer in rng.sample(exchanges, k=rng.randint(2, 4)):
        third = rng.choice((rng.choice(GIRLS + BOYS), invent(rng)))
        lines.append(f"{bound['hero']}: {sentences(rng, question, third=third, **bound)}")
        lines.append(f"{bound['friend']}: {sentences(rng, answer, third=third, **bound)}")
    return "\n".join(lines)


def description(rng: random.Random) -> str:
    parts = [
        "the {home} is {adj} and {adj}.",
        "in the middle stands a {prize}.",
        "on the left there is a {thing}, on the right a {thing}.",
        "{hero} keeps a {pet} there.",
        "the {prize} belongs to {hero}.",
        "{friend} is {trait} and has a {thing}.",
        "{filler}",
        "the {work} wears a {colour} coat and carries a {thing}.",
        "it is {number} miles from the {home} to the {place}.",
    ]
    return sentences(rng, *rng.sample(parts, k=rng.randint(3, 6)), **cast(rng))


def event(rng: random.Random, bound: dict[str, str]) -> str:
    """A few sentences in which `hero` comes by `prize` at `home`, among other things."""
    core = rng.choice(
        [
            ["{when} {hero} {went} to the {home}.", "{they} {found} a {prize} {spot}."],
            ["{hero} {found} a {prize} in the {home} {when}."],
            ["{when}, {hero} {lost} a {prize} near the {home}."],
            ["at the {home}, {hero} {found} a {prize}."],
            ["{hero} the {work} {went} to the {home}.", "there {they} {found} a {prize}."],
            ["the {prize} in the {home} belongs to {hero}."],
            ["{hero} was at the {home} {when}.", "{filler}", "{they} {lost} a {prize}."],
        ]
    )
    before, after = (["{filler}"] * (rng.random() < 0.4) for _ in range(2))
    return sentences(rng, *before, *core, *after, **bound)


def questions(rng: random.Random) -> str:
    bound = cast(rng)
    asked = [
        ("Who is this about?", "{hero}"),
        ("Where was {hero}?", "{home}"),
        ("Where did it happen?", "the {home}"),
        ("What was it?", "a {prize}"),
        ("What did {hero} have to do with?", "the {prize}"),
        ("Who was at the {home}?", "{hero}"),
    ]
    mark, reply = rng.choice([("Question: ", "Answer: "), ("Q: ", "A: "), ("", ""), ("- ", "  ")])
    lines = [event(rng, bound)]
    for question, answer in rng.sample(asked, k=rng.randint(2, 4)):
        lines.append(mark + expand(rng, question, **bound))
        lines.append(reply + ARTICLE.sub(r"\1n ", expand(rng, answer, **bound)))
    return "\n".join(lines)


def notes(rng: random.Random) -> str:
    """Two or three events, each followed by its facts in one layout that is drawn per document."""
    fields = {
        "hero": rng.choice(["who", "person", "hero", "about", "someone"]),
        "home": rng.choice(["where", "spot", "at", "location", "the place"]),
        "prize": rng.choice(["what", "thing", "object", "with", "a"]),
    }
    order = rng.sample(sorted(fields), k=rng.choice((2, 3, 3)))
    between = rng.choice([", ", " | ", " / ", "\n", " - "])
    after_key = rng.choice([" = ", " ", " is "])
    keyed = rng.random() < 0.7
    opening, closing = rng.choice([("", ""), ("(", ")"), ("[", "]"), ("-> ", ""), ("Note: ", "")])
    lines = []
    for _ in range(rng.randint(2, 3)):
        bound = cast(rng)
        lines.append(event(rng, bound))
        noted = [(fields[key] + after_key) * keyed + bound[key] for key in order]
        lines.append(opening + between.join(noted) + closing)
    return "\n".join(lines)


REQUESTS = [
    "which {topic} have {key} {value}?",
    "give the {want} of the {topic} whose {key} is {value}.",
    "what is the {want} of {topic} with {key} {value}?",
    "I want the {want} of all {topic} with {key} {value}.",
    "show me {topic} that have the {key} {value}.",
    "find {topic} where the {key} is {value} and tell me the {want}.",
]
ANSWER_LAYOUTS = [
    "{topic} / {key} / {value}",
    "look in {topic} for {key} {value}",
    "{key} of {topic} is {value}",
    "{want} ( {topic} , {key} , {value} )",
    "take {topic}, keep {key} {value}, read {want}",
    "{value} -> {key} -> {topic}",
    "get {want} in {topic} if {key} is {value}",
    "[{topic}] [{want}] [{key}] [{value}]",
    "{want} of {topic} with {key} {value}",
    "{topic} has {want} and {key}; need {value}",
]


def requests(rng: random.Random) -> str:
    """Three or four requests about tables, each restated in one layout drawn per document."""
    layout = rng.choice(ANSWER_LAYOUTS)
    lines = []
    for _ in range(rng.randint(3, 4)):
        topic = rng.choice(list(TOPICS))
        want, key = rng.sample(["name", *TOPICS[topic].split()], k=2)
        value = COLUMNS[key](rng)
        bound = {"topic": topic, "want": want, "key": key, "value": value}
        lines.append(sentences(rng, rng.choice(REQUESTS), **bound))
        lines.append(expand(rng, layout, **bound))
    return "\n".join(lines)


def rewording(rng: random.Random) -> str:
    bound = cast(rng)
    pairs = [
        ("{hero} gave the {prize} to {friend}.", "{friend} got the {prize} from {hero}."),
        ("the {prize} is in the {home}.", "in the {home} there is a {prize}."),
        ("{hero} is older than {friend}.", "{friend} is younger than {hero}."),
        ("the {pet} was seen by {hero}.", "{hero} saw the {pet}."),
        ("{hero} has a {prize} and a {pet}.", "a {prize} and a {pet} belong to {hero}."),
        ("{hero} is a {work}.", "{hero} works as a {work}."),
        ("{friend} lives near the {home}.", "the home of {friend} is near the {home}."),
    ]
    first, second = rng.choice(
        [("", "In other words: "), ("Before: ", "After: "), ("", "That is: "), ("A. ", "B. ")]
    )
    lines = []
    for before, after in rng.sample(pairs, k=rng.randint(2, 4)):
        lines.append(first + sentences(rng, before, **bound))
        lines.append(second + sentences(rng, after, **bound))
    return "\n".join(lines)


def copying(rng: random.Random) -> str:
    words = [
        rng.choice((invent(rng), rng.choice(ITEMS), rng.choice(ANIMALS), str(rng.randint(2, 999))))
        for _ in range(rng.randint(3, 8))
    ]
    line, pick = " ".join(words), rng.randrange(len(words) - 1)
    return rng.choice(
        [
            f"{line}\n{line}",
            f"Say it again: {line}. {line}.",
            f"{line}\nAfter {words[pick]} comes {words[pick + 1]}.",
            f"{line}\nBefore {words[pick + 1]} comes {words[pick]}.",
            f'"{line}" was written on the wall. It said "{line}".',
            "\n".join(f"{word} {word}" for word in words),
        ]
    )


def chat(rng: random.Random) -> str:
    """A question about a fact, a passage or a sum in the markup of the chat template."""
    bound = cast(rng)
    town = rng.choice(sorted(WORLD))
    a, b = rng.randint(1, 30), rng.randint(1, 20)
    turns = [
        (event(rng, bound) + " Who is this about?", bound["hero"] + "."),
        (event(rng, bound) + " Where was it?", f"In the {bound['home']}."),
        (f"Who rules {town}?", WORLD[town]["ruler"] + "."),
        (f"Which river flows through {town}?", WORLD[town]["river"] + "."),
        (f"What is {a} + {b}?", f"{a + b}."),
        (f"Hello, I am {bound['hero']}.", f"Hello {bound['hero']}! How can I help you?"),
        ("Thank you!", "You are welcome."),
    ]
    system = "<|system|>You are a helpful assistant.<|end|>" if rng.random() < 0.3 else ""
    return system + "".join(
        f"<|user|>{question}<|end|><|assistant|>{answer}<|end|>"
        for question, answer in rng.sample(turns, k=rng.randint(1, 3))
    )


# Parts of a hundred. Documents that ask for reading the context outweigh plain prose, because a
# model of this size sees too few tokens to learn to copy from stories alone.
KINDS: dict[Callable[[random.Random], str], int] = {
    story: 14,
    facts: 5,
    sums: 5,
    table: 11,
    lists: 5,
    dialogue: 6,
    description: 5,
    questions: 12,
    notes: 14,
    requests: 9,
    rewording: 6,
    copying: 4,
    chat: 4,
}


def documents(seed: int, size_bytes: int) -> Iterator[str]:
    """Documents for `seed` until `size_bytes` of text are reached; other seeds give other texts."""
    rng = random.Random(seed)
    kinds, weights = list(KINDS), list(KINDS.values())
    while size_bytes > 0:
        document = rng.choices(kinds, weights)[0](rng)
        size_bytes -= len(document.encode())
        yield document
