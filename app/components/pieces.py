"""Small pieces of HTML that all pages share. Text is escaped here."""

from html import escape


def title(text: str, note: str) -> str:
    """Return a page's heading with its question."""
    return f'<h1 class="sl-h1">{escape(text)}<small>{escape(note)}</small></h1>'


def heading(text: str, note: str = "") -> str:
    """Return a panel's heading with a remark."""
    return f'<h2 class="sl-h2">{escape(text)}<small>{escape(note)}</small></h2>'


def note(text: str) -> str:
    """Return a quiet line."""
    return f'<div class="sl-note">{escape(text)}</div>'


def stat(name: str, shown: str, about: str = "") -> str:
    """Return one number with its name below; `about` is shown when hovering."""
    return (
        f'<div class="sl-stat" title="{escape(about)}"><b>{escape(shown)}</b>'
        f"<span>{escape(name)}</span></div>"
    )


def stats(*items: str) -> str:
    """Return numbers in a row."""
    return f'<div class="sl-stats">{"".join(items)}</div>'


def badge(text: str, kind: str = "", about: str = "") -> str:
    """Return a small label; kinds: warn, live, held."""
    return f'<span class="sl-badge {kind}" title="{escape(about)}">{escape(text)}</span>'


def legend(colour: dict[str, str]) -> str:
    """Return names with their colours."""
    return " ".join(
        f'<span class="sl-key"><i style="background:{c}"></i>{escape(name)}</span>'
        for name, c in colour.items()
    )


def bar(share: float, kind: str = "") -> str:
    """Return a bar of this share of its track."""
    width = 100 * min(1.0, max(0.0, share))
    return f'<div class="sl-bar {kind}" style="width:{width:.0f}%"></div>'
