"""A corpus without a download: seeded sentences of a tiny grammar, for first steps and tests.

Each document has a topic (its label) that decides most of its words, so that there is something to
find.
"""

import random
from collections.abc import Iterator

VERSION = 1
"""Bumped when the sentences change: it is the source's checksum."""

N_DOCUMENTS = 2_000

_TOPICS = {
    "garden": ["rose", "hedge", "spade", "seed", "apple tree", "bee", "rain", "soil"],
    "kitchen": ["soup", "knife", "oven", "bread", "onion", "spoon", "salt", "plate"],
    "harbour": ["boat", "rope", "tide", "anchor", "gull", "sail", "crane", "wave"],
    "workshop": ["hammer", "plank", "nail", "lathe", "glue", "drill", "bench", "saw"],
}
_PEOPLE = ["Anna", "Boris", "Clara", "David", "Edith", "Farid"]
_VERBS = ["found", "lost", "carried", "painted", "sold", "mended", "wanted", "did not like"]
_QUALITIES = ["old", "small", "red", "heavy", "broken", "new", "wet", "quiet"]
_PLACES = ["near the door", "on Monday", "at 7 o'clock", "in the shade", "for 12 euros"]


def documents() -> Iterator[tuple[str, str]]:
    """Yield (text, topic), always the same."""
    chance = random.Random(VERSION)  # noqa: S311 (a text, no secret)
    topics = list(_TOPICS)
    for number in range(N_DOCUMENTS):
        topic = topics[number % len(topics)]
        sentences = [_sentence(chance, topic) for _ in range(chance.randrange(3, 9))]
        yield " ".join(sentences), topic


def _sentence(chance: random.Random, topic: str) -> str:
    words = _TOPICS[topic]
    if chance.random() < 0.1:
        words = _TOPICS[chance.choice(list(_TOPICS))]
    person, verb = chance.choice(_PEOPLE), chance.choice(_VERBS)
    thing = f"{chance.choice(_QUALITIES)} {chance.choice(words)}"
    other = f"{chance.choice(_QUALITIES)} {chance.choice(words)}"
    place = chance.choice(_PLACES)
    return chance.choice(
        [
            f"{person} {verb} the {thing} {place}.",
            f"The {thing} and the {other} were {place}.",
            f'"Where is the {thing}?" asked {person}.',
            f"{place.capitalize()}, {person} {verb} a {thing} and a {other}.",
        ]
    )
