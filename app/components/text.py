"""Examples and lists of tokens as HTML; tokens themselves are `saelab.show`'s."""

from collections.abc import Mapping, Sequence
from html import escape

from saelab.features.read import Example, ExampleGroup, Neighbour, TokenShare
from saelab.show import marked, snippet, tokens
from saelab_app.components import numbers
from saelab_app.components.pieces import badge, bar


def chip(token: str) -> str:
    """Return a token as a chip for lists: spaces and line ends are marked."""
    return f'<span class="sl-tok">{marked(token, spaces=True)}</span>'


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
            parts.append(marked(string))
    return "".join(parts)


def example(item: Example, *, peak: float, context: int, whole: bool = False) -> str:
    """Return one example: value, split, the text around, and the whole window on a click, or at
    once."""
    split = badge("held-out", "held") if item.heldout else badge("train")
    shown = numbers.value(item.value)
    label = "" if item.label is None else f" ({escape(item.label)})"
    rest = _rest(item.strings, item.strip, item, peak)
    return (
        f'<div class="sl-ex"><div class="side">{split}<span>{shown}</span></div>'
        f'<details{" open" if whole else ""}><summary class="sl-text">'
        f'<span class="snip">{snippet(item, peak=peak, context=context)}</span>'
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
