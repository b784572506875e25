"""Cards and the scorecard as HTML."""

from collections.abc import Sequence
from html import escape
from typing import Any

from saelab.report import pretty
from saelab_app.components import numbers
from saelab_app.components.pieces import badge, stat, stats
from saelab_app.library import Entry

TITLES = {
    "fvu": "FVU ↓",
    "median_normalised_error": "median error ↓",
    "l0": "L0",
    "kl": "KL ↓",
    "delta_ce": "ΔCE ↓",
    "ce_recovered_zero": "CE recovered, zero ↑",
    "ce_recovered_mean": "CE recovered, mean ↑",
}
"""The leading metrics; arrows say which way is better."""
_WORDS = {
    "fvu": "FVU",
    "l0": "L0",
    "dead_share": "dead",
    "ce_recovered_zero": "CE recovered",
    "ce_recovered_mean": "CE recovered",
}


def card(entry: Entry) -> str:
    """Return what a dictionary is and how good it is."""
    facts = entry.facts
    shape = " · ".join(
        part
        for part in (
            str(facts.get("type", "")),
            f"{facts['d_sae']:,} latents" if "d_sae" in facts else "",
            f"k {facts['k']}" if facts.get("k") else "",
        )
        if part
    )
    model = facts.get("model") or {}
    source = model.get("name") or model.get("source") or "own arrays"
    where = f"{source} · {facts.get('site', '')}" if facts else "being trained"
    made = numbers.when(entry.made)
    return (
        f'<div class="sl-card"><div class="sl-h1">{escape(entry.name)}</div>'
        f'<div class="sl-note">{escape(where)}<br>{escape(shape)}'
        f"{' · ' + made if made else ''}</div>{_card_numbers(entry)}</div>"
    )


def _card_numbers(entry: Entry) -> str:
    if entry.running:
        lines = entry.metrics()
        if not lines:
            return badge("starting", "live")
        last = lines[-1]
        shown = [stat("tokens", f"{last['tokens']:,}")]
        shown += [stat(n, numbers.value(last[n])) for n in ("fvu", "loss", "l0") if n in last][:2]
        return badge("unfinished", "live") + stats(*shown)
    if not entry.results:
        return badge("not evaluated yet")
    shown = []
    for name in ("fvu", "l0", "ce_recovered_zero", "dead_share"):
        row = entry.row(name)
        if row is not None:
            text = numbers.percent(row["value"]) if name == "dead_share" else _with_error(row)
            shown.append(stat(_WORDS[name], text, f"{name}, n = {row['n']:,}"))
    return stats(*shown)


def _with_error(row: dict[str, Any]) -> str:
    return pretty(row["value"], row["standard_error"])


def scorecard(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table with a line per arm and a column per leading metric, planted truth apart."""
    rows = [row for row in rows if row.get("evaluator") != "truth"]
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    cells = {(row["name"], row["arm"]): row for row in rows}
    names = [name for name in TITLES if any((name, arm) in cells for arm in arms)]
    encoders = {row["arm"]: row["encoder"] for row in rows}
    head = "".join(f"<th>{escape(TITLES[name])}</th>" for name in names)
    lines = []
    for arm in arms:
        found = [cells.get((name, arm)) for name in names]
        if any(found):
            own = ' class="own"' if arm == "dictionary" else ""
            shown = "".join(_cell(row) for row in found)
            about = escape(f"encoder: {encoders[arm]}")
            lines.append(f'<tr{own}><td title="{about}">{escape(arm)}</td>{shown}</tr>')
    return (
        f'<div class="sl-scroll"><table class="sl-table"><tr><th></th>{head}</tr>'
        f"{''.join(lines)}</table></div>"
    )


def details(rows: Sequence[dict[str, Any]]) -> str:
    """Return the dictionary's other numbers, each name once, as name and value."""
    mine: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["arm"] == "dictionary" and row["name"] not in TITLES and "[" not in row["name"]:
            mine.setdefault(row["name"], row)
    items = "".join(
        f"<div><span>{escape(row['name'].replace('_', ' '))}</span>{_value(row)}"
        f"<small>{escape(row['unit'])}</small></div>"
        for row in mine.values()
    )
    return f'<div class="sl-list">{items}</div>'


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "<td></td>"
    title = f"{row['unit']}, n = {row['n']:,}, version {row['metric_version']}"
    return f'<td title="{escape(title)}">{_value(row)}</td>'


def _value(row: dict[str, Any]) -> str:
    shown, _, error = pretty(row["value"], row["standard_error"]).partition(" ± ")
    return f"<b>{escape(shown)}</b>" + (f" <small>± {escape(error)}</small>" if error else "")


def points(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return every arm that has both L0 and FVU as a point of the trade-off chart."""
    found = []
    for entry in entries:
        cells = {(row["name"], row["arm"]): row for row in entry.results}
        for arm in dict.fromkeys(row["arm"] for row in entry.results):
            x, y = cells.get(("l0", arm)), cells.get(("fvu", arm))
            if x and y and x["value"] > 0:
                found.append(
                    {
                        "x": x["value"], "y": y["value"], "error": y["standard_error"],
                        "arm": arm, "own": arm == "dictionary",
                        "entry": entry.id, "name": entry.name,
                    }
                )  # fmt: skip
    return found
