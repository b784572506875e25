"""Sentences that people rated, as a table: `sentiment` and `rating` of each `text`.

VADER's ground truth (Hutto, Gilbert 2014, ICWSM) has a line of id, mean rating from −4 to 4 and
text per sentence. Those rated within ±0.5 have no clear sentiment and are left out; so are lines in
which two files run together, since theirs end without a line's end.
"""

from collections.abc import Iterable, Iterator

from saelab.catalogue import CATALOGUE

CLEAR = 0.5
"""Sentences rated above this are positive, those below its opposite negative."""
SOURCES = frozenset(name for name, asset in CATALOGUE.items() if asset.rated)


def as_table(lines: Iterable[str]) -> Iterator[str]:
    """Yield the table's lines, comma-separated, from lines of id, rating and text between tabs."""
    yield "sentiment,rating,text\n"
    for line in lines:
        _, rating, text, *more = line.rstrip().split("\t")
        if abs(float(rating)) > CLEAR and not more:
            sentiment = "positive" if float(rating) > 0 else "negative"
            quoted = text.replace('"', '""')
            yield f'{sentiment},{rating},"{quoted}"\n'
