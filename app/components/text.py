"""Tokens and examples as HTML. Every token is escaped here and nowhere else."""

from collections.abc import Mapping, Sequence
from html import escape

from saelab.features.read import Example, ExampleGroup, Neighbour, TokenShare
from saelab_app.components import numbers
from saelab_app.components.pieces import badge, bar

_MARKS = {"\n": "↵", "\t": "⇥", "\r": "␍"}


def chip(token: str) -> str:
    """Return a token as a chip for lists: spaces and line ends are marked."""
    return f'<span class="sl-tok">{_marked(token, spaces=True)}</span>'


def plain(token: str) -> str:
    """Return a token as plain text with spaces and line ends marked (for charts and tables)."""
    shown = "".join(_MARKS.get(c, c) for c in token)
    inner = shown.lstrip(" ")
    return "␣" * (len(shown) - len(inner)) + inner or "∅"


def _marked(token: str, *, spaces: bool = False) -> str:
    """Escape a token; invisible characters become dim marks."""
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


def colour(value: float, peak: float) -> str:
    """Return a translucent background by strength: teal for positive, orange for negative."""
    strength = min(1.0, abs(value) / peak) if peak else 0.0
    channel = "--sl-pos" if value >= 0 else "--sl-neg"
    return f"background:rgba(var({channel}),{0.1 + 0.62 * strength:.2f})"


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
        shown = _marked(string)
        space = ""
        if string.strip(" "):  # the space before a word is not coloured
            shown = _marked(string.lstrip(" "))
            space = " " * (len(string) - len(string.lstrip(" ")))
        value = values.get(position)
        title = (titles or {}).get(position) or _title(
            string, value, position, where, position in masked
        )
        mark = ' class="at"' if position == at else ""
        style = f' style="{colour(value, peak)}"' if value else ""
        tag = "s" if position in masked else "b"
        parts.append(f'{space}<{tag}{mark}{style} title="{escape(title)}">{shown}</{tag}>')
    return "".join(parts)


def _title(token: str, value: float | None, position: int, where: str, masked: bool) -> str:
    shown = "masked" if masked else numbers.value(value) if value else "silent"
    return f"“{plain(token)}” · {shown} · position {position}{where}"


def _rest(
    strings: Sequence[str], values: Mapping[int, float], example: Example, peak: float
) -> str:
    """Return a whole window; only tokens that fire get a title, so that long windows stay light."""
    parts = []
    for position, string in enumerate(strings):
        if position in values or position == example.position:
            parts.append(
                tokens(
                    strings, values, peak=peak, at=example.position,
                    span=(position, position + 1), where=f" · document {example.document}",
                )
            )  # fmt: skip
        else:
            parts.append(_marked(string))
    return "".join(parts)


def example(item: Example, *, peak: float, context: int, whole: bool = False) -> str:
    """Return one example: value, split, the text around, and the whole window on a click, or at
    once."""
    first = max(0, item.position - context)
    last = min(len(item.strings), item.position + context + 1)
    snippet = tokens(
        item.strings, item.strip, peak=peak, at=item.position, masked=item.masked,
        span=(first, last), where=f" · document {item.document}",
    )  # fmt: skip
    before, after = "… " if first else "", " …" if last < len(item.strings) else ""
    split = badge("held-out", "held") if item.heldout else badge("train")
    shown = numbers.value(item.value)
    label = "" if item.label is None else f" ({escape(item.label)})"
    rest = _rest(item.strings, item.strip, item, peak)
    return (
        f'<div class="sl-ex"><div class="side">{split}<span>{shown}</span></div>'
        f'<details{" open" if whole else ""}><summary class="sl-text">'
        f'<span class="snip"><i>{before}</i>{snippet}<i>{after}</i></span>'
        f'<span class="less">▴ document {item.document}{label}, window {item.window}, '
        f"position {item.position}</span></summary>"
        f'<div class="sl-text">{rest}</div></details></div>'
    )


def group(item: ExampleGroup, *, peak: float, context: int) -> str:
    """Return a whole group of examples as one block."""
    return "".join(example(e, peak=peak, context=context) for e in item.examples)


def bars(pairs: Sequence[tuple[str, float]], *, negative: bool = False) -> str:
    """Return tokens with a bar and a number each."""
    most = max((abs(v) for _, v in pairs), default=0.0) or 1.0
    kind = "neg" if negative else ""
    rows = "".join(
        f"<tr><td>{chip(token)}</td>"
        f'<td class="bar">{bar(abs(v) / most, kind)}</td>'
        f'<td class="num">{numbers.value(v)}</td></tr>'
        for token, v in pairs
    )
    return f'<table class="sl-bars">{rows}</table>'


def shares(found: Sequence[TokenShare]) -> str:
    """Return the tokens that carry a latent's activation, with their shares."""
    most = max((token.share for token in found), default=0.0) or 1.0
    rows = "".join(
        f"<tr><td>{chip(token.text)}</td>"
        f'<td class="bar">{bar(token.share / most)}</td>'
        f'<td class="num" title="{token.fires:,} firings">{numbers.percent(token.share)}</td></tr>'
        for token in found
    )
    return f'<table class="sl-bars">{rows}</table>'


def chips(gist: str) -> str:
    """Return what a latent fires on as chips."""
    return " ".join(chip(token) for token in gist.split(" · ")) if gist else "never fires"


def beside(value: float, gist: str, *, most: float = 1.0, about: str = "") -> str:
    """Return how much another latent has to do with this one, and what it fires on.

    The bar is a share of `most`; `about` is shown when hovering.
    """
    return (
        f'<div class="sl-near" title="{escape(about)}"><div class="num">{value:.2f}</div>'
        f'<div class="track">{bar(value / most)}</div><div class="gist">{chips(gist)}</div></div>'
    )


def near(other: Neighbour) -> str:
    """Return how near another decoder direction is, and what its latent fires on."""
    return beside(other.cosine, other.gist)
