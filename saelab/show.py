"""Text coloured by numbers, as HTML: what notebooks show inline and the app puts on its pages.

Every token is escaped here and nowhere else. `heatmap` and `examples` are blocks that bring their
own style, for a notebook; the app has `STYLE` on its page and takes the pieces.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import cast

from jaxtyping import Float
from torch import Tensor

from saelab.errors import ShapeError
from saelab.features.read import Example

STYLE = """
:root { --sl-pos: 15,150,135; --sl-neg: 214,96,20; }
.sl-text { font-size: .92rem; line-height: 1.72; white-space: pre-wrap; overflow-wrap: anywhere; }
.sl-text i { font-style: normal; opacity: .45; }
.sl-text s { text-decoration: none; opacity: .42; }
.sl-text b { font-weight: 400; border-radius: .22rem; padding: .1rem 0; }
.sl-text b.at { box-shadow: inset 0 -2px 0 currentColor; }
.sl-caption { font-size: .84rem; opacity: .68; }
.sl-line { display: grid; grid-template-columns: 4.5rem 4.5rem 1fr; padding: .1rem 0; }
.sl-line > span { font-size: .84rem; opacity: .68; font-variant-numeric: tabular-nums; }
"""
"""How the HTML of this module looks. Colours are translucent: they suit light and dark pages."""

_MARKS = {"\n": "↵", "\t": "⇥", "\r": "␍"}


class Html(str):
    """HTML that a notebook shows where it is the last value of a cell."""

    __slots__ = ()

    def __repr__(self) -> str:
        """Say that it is there: notebooks keep this beside the HTML."""
        return f"<HTML of {len(self):,} characters>"

    def _repr_html_(self) -> str:
        return str(self)


# ----------------------------------------------------------------------------------- for notebooks


def heatmap(
    strings: Sequence[str],
    values: Mapping[int, float] | Iterable[float] | Float[Tensor, " pos"],
    *,
    peak: float | None = None,
    at: int | None = None,
    masked: frozenset[int] = frozenset(),
    caption: str = "",
) -> Html:
    """Return a text with each token coloured by its value: teal above 0, orange below.

    `values` has one number per token, or numbers by position. `peak` is the size that has full
    colour, by default the largest here; give it where several texts are to be compared. For `at`
    and `masked` see `tokens`. Raises ShapeError if there are values without a token.
    """
    if not isinstance(values, Mapping):
        listed = values.tolist() if isinstance(values, Tensor) else [float(v) for v in values]
        if len(listed) != len(strings):
            raise ShapeError(
                f"{len(strings)} tokens came with {len(listed)} values; give one for each, or a "
                "mapping from positions to values"
            )
        by_position = dict(enumerate(listed))
    else:
        by_position = cast("Mapping[int, float]", values)
    outside = sorted(p for p in by_position if not 0 <= p < len(strings))
    if outside:
        raise ShapeError(
            f"there is a value at position {outside[0]}, but the text has {len(strings)} tokens; "
            "positions count from 0"
        )
    if peak is None:
        peak = max((abs(v) for v in by_position.values()), default=0.0)
    text = tokens(strings, by_position, peak=peak, at=at, masked=masked)
    return _block(f'<div class="sl-text">{text}</div>', caption)


def examples(
    items: Sequence[Example], *, peak: float | None = None, context: int = 12, caption: str = ""
) -> Html:
    """Return examples of a latent, a line each: its value, the split, and the text around.

    `peak` has full colour, by default the largest value here; `context` tokens are shown on either
    side. The examples are those of `open_features(…).latent(i).groups`.
    """
    if peak is None:
        peak = max((abs(item.value) for item in items), default=0.0)
    lines = "".join(
        f'<div class="sl-line"><span>{value(item.value)}</span>'
        f"<span>{'held-out' if item.heldout else 'train'}</span>"
        f'<div class="sl-text">{snippet(item, peak=peak, context=context)}</div></div>'
        for item in items
    )
    return _block(lines, caption)


def stack(*blocks: Html) -> Html:
    """Return blocks one below the other."""
    return Html("".join(blocks))


def _block(inner: str, caption: str) -> Html:
    head = f'<div class="sl-caption">{escape(caption)}</div>' if caption else ""
    return Html(f"<style>{STYLE}</style>{head}{inner}")


# ------------------------------------------------------------------------------------------ pieces


def tokens(
    strings: Sequence[str],
    values: Mapping[int, float],
    *,
    peak: float,
    at: int | None = None,
    masked: frozenset[int] = frozenset(),
    span: tuple[int, int] | None = None,
    where: str = "",
    titles: Mapping[int, str] | None = None,
) -> str:
    """Return a run of tokens, each coloured by its value, with a title that tells all about it.

    `at` underlines the token that an example is about; `masked` ones are dim: nothing was computed.
    """
    first, last = span or (0, len(strings))
    parts = []
    for position in range(first, last):
        string = strings[position]
        shown = marked(string)
        space = ""
        if string.strip(" "):  # the space before a word is not coloured
            shown = marked(string.lstrip(" "))
            space = " " * (len(string) - len(string.lstrip(" ")))
        number = values.get(position)
        title = (titles or {}).get(position) or _title(
            string, number, position, where, position in masked
        )
        mark = ' class="at"' if position == at else ""
        style = f' style="{colour(number, peak)}"' if number else ""
        tag = "s" if position in masked else "b"
        parts.append(f'{space}<{tag}{mark}{style} title="{escape(title)}">{shown}</{tag}>')
    return "".join(parts)


def _title(token: str, number: float | None, position: int, where: str, masked: bool) -> str:
    shown = "masked" if masked else value(number) if number else "silent"
    return f"“{plain(token)}” · {shown} · position {position}{where}"


def snippet(item: Example, *, peak: float, context: int) -> str:
    """Return the text around an example's token, with … where the window goes on."""
    first = max(0, item.position - context)
    last = min(len(item.strings), item.position + context + 1)
    text = tokens(
        item.strings, item.strip, peak=peak, at=item.position, masked=item.masked,
        span=(first, last), where=f" · document {item.document}",
    )  # fmt: skip
    before, after = "… " if first else "", " …" if last < len(item.strings) else ""
    return f"<i>{before}</i>{text}<i>{after}</i>"


def colour(number: float, peak: float) -> str:
    """Return a translucent background by strength: teal for positive, orange for negative."""
    strength = min(1.0, abs(number) / peak) if peak else 0.0
    channel = "--sl-pos" if number >= 0 else "--sl-neg"
    return f"background:rgba(var({channel}),{0.1 + 0.62 * strength:.2f})"


def plain(token: str) -> str:
    """Return a token as plain text with spaces and line ends marked (for charts and tables)."""
    shown = "".join(_MARKS.get(c, c) for c in token)
    inner = shown.lstrip(" ")
    return "␣" * (len(shown) - len(inner)) + inner or "∅"


def marked(token: str, *, spaces: bool = False) -> str:
    """Return a token as HTML: escaped, with dim marks for what cannot be seen.

    `spaces` marks leading spaces too, as lists of tokens need it.
    """
    blank = not token.strip(" ")
    shown = []
    for place, c in enumerate(token):
        leading = not token[:place].strip(" ")
        if c in _MARKS:
            shown.append(f"<i>{_MARKS[c]}</i>")
        elif c == " " and (blank or (spaces and leading)):
            shown.append("<i>␣</i>")
        elif not c.isprintable():
            shown.append(f"<i>\\x{ord(c):02x}</i>")
        else:
            shown.append(escape(c))
    return "".join(shown) or "<i>∅</i>"


def value(x: float | None) -> str:
    """Return a number with three significant digits, thousands with commas."""
    if x is None:
        return "–"
    if not math.isfinite(x):
        return str(x)
    if abs(x) >= 1000:
        return f"{x:,.0f}"
    if x == int(x):
        return f"{x:.0f}"
    digits = max(0, 2 - math.floor(math.log10(abs(x))))
    return f"{x:.{min(digits, 6)}f}"
