"""Cards and the scorecard as HTML."""

from collections.abc import Sequence
from html import escape
from typing import Any

from saelab.report import pretty
from saelab_app.components import numbers
from saelab_app.components.pieces import badge, stat, stats
from saelab_app.library import Entry

_LEADING = ("fvu", "l0", "dead_share", "ce_recovered_zero", "ce_recovered_mean", "kl", "delta_ce")
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
    """Return results as a table: a line per metric, a column per arm, each with its error."""
    arms = list(dict.fromkeys((row["arm"], row.get("encoder", "own")) for row in rows))
    names = sorted(dict.fromkeys(row["name"] for row in rows), key=_order)
    cells = {(r["name"], r["arm"], r.get("encoder", "own")): r for r in rows}
    head = "".join(f"<th>{escape(_arm(*arm))}</th>" for arm in arms)
    body = []
    for name in names:
        found = [cells.get((name, *arm)) for arm in arms]
        first = next(row for row in found if row)
        title = f"{first['unit']}, n = {first['n']:,}, version {first['metric_version']}"
        line = "".join(_cell(row) for row in found)
        body.append(f'<tr><td title="{escape(title)}">{escape(name)}</td>{line}</tr>')
    return (
        f'<div class="sl-scroll"><table class="sl-table"><tr><th></th>{head}</tr>'
        f"{''.join(body)}</table></div>"
    )


def _order(name: str) -> tuple[int, str]:
    return (_LEADING.index(name) if name in _LEADING else len(_LEADING), name)


def _arm(arm: str, encoder: str) -> str:
    return arm if encoder == "own" or encoder in arm else f"{arm}, {encoder}"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "<td></td>"
    own = ' class="own"' if row["arm"] == "dictionary" else ""
    shown, _, error = pretty(row["value"], row["standard_error"]).partition(" ± ")
    return f"<td{own}>{escape(shown)}{f' <small>± {escape(error)}</small>' if error else ''}</td>"


def points(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return every arm that has both L0 and FVU as a point of the trade-off chart."""
    found = []
    for entry in entries:
        arms = list(dict.fromkeys((r["arm"], r.get("encoder", "own")) for r in entry.results))
        cells = {(r["name"], r["arm"], r.get("encoder", "own")): r for r in entry.results}
        for arm in arms:
            x, y = cells.get(("l0", *arm)), cells.get(("fvu", *arm))
            if x and y and x["value"] > 0:
                found.append(
                    {
                        "x": x["value"], "y": y["value"], "error": y["standard_error"],
                        "arm": _arm(*arm), "own": arm[0] == "dictionary",
                        "entry": entry.id, "name": entry.name,
                    }
                )  # fmt: skip
    return found
