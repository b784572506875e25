"""The five tasks as texts: frames with slots, and what fills them in each version of a prompt.

A frame is a text with named slots. The versions of one example differ only in what fills the slots,
and every filling is a single token, so that all versions are equally long.

*Indirect object identification* (Wang et al. 2022, arXiv 2211.00593), *greater-than* (Hanna et al.
2023, arXiv 2305.00586), *docstring completion* (Heimersheim and Janiak 2023), *induction* (Olsson
et al. 2022, arXiv 2209.11895), *subject–verb agreement* (Linzen et al. 2016, arXiv 1611.01368).
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from saelab.circuits.protocols import Tokenizer
from saelab.errors import TaskError

VERSION = 1
"""Bumped when the prompts of a seed change."""


@dataclass(frozen=True)
class Example:
    """One example of a task in three versions."""

    frame: str
    """A text in which `{name}` is a slot."""
    clean: Mapping[str, str]
    """What fills each slot where the task is as it should be."""
    corrupted: Mapping[str, str]
    """The same with another right answer, or with none."""
    unpredictable: Mapping[str, str]
    """The same form with an answer that nothing in the prompt tells."""
    right: Sequence[str]
    wrong: Sequence[str]
    attributes: Mapping[str, str] = field(default_factory=dict[str, str])
    """What the prompt is about, by name, where a task has such a structure."""
    before_answer: str = ""
    """End of the frame with which the answers have to be tokenised: where they begin no word."""


Examples = Callable[[Tokenizer, random.Random], Iterator[Example]]
"""Yields examples without end, each frame in turn; raises TaskError if a tokenizer has too few
single tokens."""


# ----------------------------------------------------------------------------------- single tokens


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def single_tokens(
    tokenizer: Tokenizer, words: Sequence[str], *, least: int, what: str
) -> list[str]:
    """Return the words that are one token after a space.

    Raises TaskError, saying how many were found, if there are fewer than `least`.
    """
    runs = tokenizer.tokenize([f" {word}" for word in words])
    found = [word for word, run in zip(words, runs, strict=True) if len(run) == 1]
    if len(found) < least:
        raise TaskError(
            f"{least} {what} that are single tokens are needed, but {tokenizer.name} has "
            f"{len(found)} of the {len(words)} that are known: {', '.join(found) or 'none'}. "
            "Take another task, or give examples of your own (`tasks.encode`)."
        )
    return found


# ------------------------------------------------------------------- indirect object identification

_NAMES = _words("""
Aaron Adam Alan Alex Alice Amy Andrew Anna Anne Anthony Arthur Ben Bill Bob Brian Carl Carol
Charles Charlie Chris Claire Clark Dan Daniel David Dean Diana Edward Elizabeth Emily Emma Eric
Frank Fred George Grace Graham Harry Helen Henry Howard Jack Jacob James Jane Jason Jeff Jim Joe
John Joseph Julia Kate Kelly Kevin Laura Lee Lewis Linda Lisa Louis Lucy Luke Maria Mark Martin
Mary Matthew Max Michael Mike Nancy Neil Nick Oliver Oscar Paul Peter Philip Rachel Ray Richard
Robert Roger Rose Roy Ryan Sam Sara Sarah Scott Simon Stephen Steve Susan Thomas Tim Tom Tony
Victoria Walter William
""")
_PLACES = _words("store garden restaurant school hospital office house station market park library")
_OBJECTS = _words("drink ring book ball computer letter gift card key ticket photo")
_IOI_FRAMES = (
    "Then, {first} and {second} went to the {place}. {s2} gave a {object} to",
    "When {first} and {second} got to the {place}, {s2} decided to give a {object} to",
    "Then, {first} and {second} had a talk at the {place}. After that, {s2} gave a {object} to",
    "While {first} and {second} were working at the {place}, {s2} handed a {object} to",
)


def indirect_object(tokenizer: Tokenizer, chance: random.Random) -> Iterator[Example]:
    """Yield prompts in which one of two people acts, so that the other one is meant at the end.

    Corrupted: the other one acts. Unpredictable: a third person does. Every frame stands in both
    orders, ABBA (the indirect object first) and BABA.
    """
    names = single_tokens(tokenizer, _NAMES, least=8, what="names")
    places = single_tokens(tokenizer, _PLACES, least=1, what="places")
    objects = single_tokens(tokenizer, _OBJECTS, least=1, what="objects")
    orders = {"ABBA": ("io", "s1"), "BABA": ("s1", "io")}
    while True:
        for frame in _IOI_FRAMES:
            for order, (first, second) in orders.items():
                io, subject, third = chance.sample(names, 3)
                fills = {
                    "io": io,
                    "s1": subject,
                    "s2": subject,
                    "place": chance.choice(places),
                    "object": chance.choice(objects),
                }
                yield Example(
                    frame.replace("{first}", f"{{{first}}}").replace("{second}", f"{{{second}}}"),
                    fills,
                    fills | {"s2": io},
                    fills | {"s2": third},
                    [io],
                    [subject],
                    {"io": io, "subject": subject, "order": order},
                )


# ------------------------------------------------------------------------------------- greater-than

_EVENTS = _words("""
war siege reign voyage project treaty journey crisis revolt famine strike drought trial marriage
career expedition campaign conflict empire dynasty construction partnership study
""")
_CENTURIES = ("11", "12", "13", "14", "15", "16", "17", "18")
_YEARS_FRAME = "The {event} lasted {from} the year {century}{year} {to} the year {again}"
_DIGITS_FRAME = "The {event} lasted {from} the year {century}{tens}{ones} {to} the year {again}"


def greater_than(tokenizer: Tokenizer, chance: random.Random) -> Iterator[Example]:
    """Yield spans of years whose end is missing its last two digits.

    Right are the years after the first one, wrong those before. Where years are split into digits
    the tens are asked for, and equal tens are neither. Corrupted: the first year is the 1st of its
    century, so that all are right. Unpredictable: `from` and `to` change places, so that no later
    year is asked for.
    """
    events = single_tokens(tokenizer, _EVENTS, least=1, what="events")
    centuries = [c for c in _CENTURIES if _in_pairs(tokenizer, c)]
    if centuries:
        return _years_in_pairs(events, centuries, chance)
    centuries = [c for c in _CENTURIES if _in_digits(tokenizer, c)]
    if centuries:
        return _years_in_digits(events, centuries, chance)
    raise TaskError(
        f"years that end in a token of two digits or of one are needed, but {tokenizer.name} "
        "splits them otherwise (1743, say). Take another task, or give examples of your own "
        "(`tasks.encode`)."
    )


def _in_pairs(tokenizer: Tokenizer, century: str) -> bool:
    """Return whether all years of a century are its two digits and one more token."""
    return _extend(tokenizer, century, [f"{year:02d}" for year in range(100)])


def _in_digits(tokenizer: Tokenizer, century: str) -> bool:
    """Return whether two more digits are two more tokens."""
    digits = [str(digit) for digit in range(10)]
    return _extend(tokenizer, century, digits) and _extend(tokenizer, f"{century}4", digits)


def _extend(tokenizer: Tokenizer, stem: str, endings: Sequence[str]) -> bool:
    head, *runs = tokenizer.tokenize([f" {stem}", *(f" {stem}{end}" for end in endings)])
    ids = head.ids.tolist()
    found = [run.ids.tolist() for run in runs]
    return all(run[:-1] == ids for run in found) and len({run[-1] for run in found}) == len(found)


def _years_in_pairs(
    events: list[str], centuries: list[str], chance: random.Random
) -> Iterator[Example]:
    years = [f"{year:02d}" for year in range(100)]
    while True:
        start = chance.randrange(2, 98)
        fills = _span(events, centuries, chance) | {"year": years[start]}
        yield _years(_YEARS_FRAME, fills, {"year": "01"}, years[start + 1 :], years[: start + 1])


def _years_in_digits(
    events: list[str], centuries: list[str], chance: random.Random
) -> Iterator[Example]:
    digits = [str(digit) for digit in range(10)]
    while True:
        tens = chance.randrange(1, 9)
        fills = _span(events, centuries, chance)
        fills |= {"tens": digits[tens], "ones": chance.choice(digits)}
        early = {"tens": "0", "ones": "1"}
        yield _years(_DIGITS_FRAME, fills, early, digits[tens + 1 :], digits[:tens])


def _span(events: list[str], centuries: list[str], chance: random.Random) -> dict[str, str]:
    century = chance.choice(centuries)
    fills = {"event": chance.choice(events), "from": "from", "to": "to"}
    return fills | {"century": century, "again": century}


def _years(
    frame: str,
    fills: dict[str, str],
    early: dict[str, str],
    right: list[str],
    wrong: list[str],
) -> Example:
    turned = fills | {"from": "to", "to": "from"}
    before = f" {fills['century']}"
    return Example(frame, fills, fills | early, turned, right, wrong, before_answer=before)


# ---------------------------------------------------------------------------------------- docstring

_ARGUMENTS = _words("""
file load size path name key value index data list text line user width height color count mode
type state level order label image table field group node port host token date model output input
result message format buffer offset limit
""")
_WORDS = _words("""
time year people way day man thing world life hand part child eye place work week case point
company number group problem fact water room money story month book area side word house friend
father power hour game line end member law car city name team minute idea body back parent face
level office door health person art war history party result change morning reason research girl
boy moment air teacher force education
""")
_DOCSTRING_FRAME = '''def {function}(self, {a}, {b}, {c}, {d}):
    """ {n1} {n2} {n3}

    :param {doc_a}: {n4} {n5}
    :param {doc_b}: {n6} {n7}
    :param'''


def docstring(tokenizer: Tokenizer, chance: random.Random) -> Iterator[Example]:
    """Yield functions of four arguments whose docstring has named the first two.

    Right is the third argument, wrong are the others. Corrupted: the third and the fourth change
    places. Unpredictable: the docstring names arguments that the function has not.
    """
    arguments = single_tokens(tokenizer, _ARGUMENTS, least=10, what="argument names")
    words = single_tokens(tokenizer, _WORDS, least=10, what="words")
    while True:
        a, b, c, d, e, f, function = chance.sample(arguments, 7)
        others = {f"n{i + 1}": word for i, word in enumerate(chance.sample(words, 7))}
        fills = {"function": function, "a": a, "b": b, "c": c, "d": d, "doc_a": a, "doc_b": b}
        fills |= others
        yield Example(
            _DOCSTRING_FRAME,
            fills,
            fills | {"c": d, "d": c},
            fills | {"doc_a": e, "doc_b": f},
            [c],
            [a, b, d],
        )


# ---------------------------------------------------------------------------------------- induction

_REPEATED, _LENGTH = 5, 10
"""Words of the second run, and of the first."""


def induction(tokenizer: Tokenizer, chance: random.Random) -> Iterator[Example]:
    """Yield random words that begin again: right is the word that followed the last one before.

    Wrong is a later word of the first run. Corrupted: in the first run the last word changes places
    with the one before the wrong word. Unpredictable: the second run has words that the first one
    has not.
    """
    words = single_tokens(tokenizer, _WORDS, least=_LENGTH + _REPEATED, what="words")
    first, second = (
        [f"{run}{i}" for i in range(n)] for run, n in (("x", _LENGTH), ("y", _REPEATED))
    )
    frame = "".join(f" {{{name}}}" for name in (*first, *second))
    while True:
        drawn = chance.sample(words, _LENGTH + _REPEATED)
        run, fresh = drawn[:_LENGTH], drawn[_LENGTH:]
        other = chance.randrange(_REPEATED + 2, _LENGTH)
        fills = dict(zip(first, run, strict=True)) | dict(zip(second, run, strict=False))
        last, before = first[_REPEATED - 1], first[other - 1]
        yield Example(
            frame,
            fills,
            fills | {last: fills[before], before: fills[last]},
            fills | dict(zip(second, fresh, strict=True)),
            [run[_REPEATED]],
            [run[other]],
        )


# ---------------------------------------------------------------------------------------- agreement

_NOUNS = _words("""
key/keys book/books door/doors car/cars house/houses tree/trees boy/boys girl/girls dog/dogs
picture/pictures letter/letters box/boxes chair/chairs table/tables student/students
teacher/teachers friend/friends river/rivers road/roads bird/birds garden/gardens window/windows
year/years day/days
""")
_VERBS = (("is", "are"), ("was", "were"), ("has", "have"))
_LINKS = _words("near behind beside by with from")
_AGREEMENT_FRAME = "Today the {subject} {link} the {attractor}"


def agreement(tokenizer: Tokenizer, chance: random.Random) -> Iterator[Example]:
    """Yield subjects, each followed by another noun, of either number; the verb comes next.

    Right are verbs of the subject's number, wrong those of the other. Corrupted: the subject's
    number changes. Unpredictable: the subject and the preposition change places, so that no noun is
    a subject.
    """
    links = single_tokens(tokenizer, _LINKS, least=1, what="prepositions")
    pairs = _whole_pairs(
        tokenizer, [noun.split("/") for noun in _NOUNS], 2, "nouns of both numbers"
    )
    verbs = _whole_pairs(tokenizer, _VERBS, 1, "verbs of both numbers")
    while True:
        number = chance.randrange(2)
        subject, attractor = chance.sample(pairs, 2)
        fills = {
            "subject": subject[number],
            "link": chance.choice(links),
            "attractor": attractor[chance.randrange(2)],
        }
        yield Example(
            _AGREEMENT_FRAME,
            fills,
            fills | {"subject": subject[1 - number]},
            fills | {"subject": fills["link"], "link": fills["subject"]},
            [verb[number] for verb in verbs],
            [verb[1 - number] for verb in verbs],
            {"number": ("singular", "plural")[number]},
        )


def _whole_pairs(
    tokenizer: Tokenizer, pairs: Sequence[Sequence[str]], least: int, what: str
) -> list[Sequence[str]]:
    words = [word for pair in pairs for word in pair]
    single = set(single_tokens(tokenizer, words, least=2 * least, what=what))
    found = [pair for pair in pairs if single.issuperset(pair)]
    if len(found) < least:
        raise TaskError(
            f"{least} {what} that are single tokens are needed, but {tokenizer.name} has "
            f"{len(found)} of {len(pairs)}. Take another task."
        )
    return found
