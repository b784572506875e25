"""What lexicons read in the texts of a chosen response, beside the judge that chose it.

A direction that writes a list's words into the logits moves a lexicon whatever the text says. So
there are two scores: by the whole list, and without the words among the 20 tokens that the
direction's own logit effect favours most.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from saelab.edits import LatentEdit
from saelab.protocols import LanguageModel
from saelab.stats import ResultRow
from saelab.steering.judges import LexiconJudge
from saelab.steering.judging import Lexicon
from saelab.steering.rows import UNITS, Rows
from saelab.steering.trial import EditAt, Measure, Response, Trial, reported_half

N_SHOWN = 20
"""Tokens that a direction is held to write by itself."""
_READ: tuple[Measure, ...] = ("score", "lift")


@torch.no_grad()
def favoured_tokens(model: LanguageModel, edits: Sequence[LatentEdit], n: int) -> list[str]:
    """Return the tokens that the direct logit effect of edits that add favours most."""
    effects = []
    for edit in edits:
        rows = edit.handle.dictionary.W_dec.detach()[list(edit.config.latents)].float()
        change = edit.strengths().to(rows) @ rows
        effects.append(model.logit_effect(edit.handle.site, change[None])[0].cpu())
    total = torch.stack(effects).sum(0)
    return model.to_strings(total.topk(min(n, len(total))).indices.tolist())


def unshown(
    model: LanguageModel, lexicon: LexiconJudge, arm: Sequence[EditAt], response: Response
) -> list[LexiconJudge]:
    """Return the lexicon for each direction that wrote, without what it favours by itself."""
    strengths = [one.strength for one in response.matched]
    return [
        lexicon.without(favoured_tokens(model, edit_at(strength), N_SHOWN))
        for edit_at, strength in zip(arm, strengths, strict=True)
        if strength is not None
    ]


def read_again(response: Response, trial: Trial, judges: Sequence[LexiconJudge]) -> Response:
    """Return a reported response as lexicons read its texts, one for each direction that wrote.

    Each is held against what it reads in the unsteered texts of the same prompts.
    """
    n = len(trial.prompts)
    parts = torch.zeros(len(response.written), n, 3, dtype=torch.float64)
    runs = zip(parts, response.asked, response.written, judges, strict=True)
    for part, asked, one, judge in runs:
        own, usual = list(asked), judge(trial.usual.texts).double().reshape(-1, n).mean(0)
        scores = judge(one.texts).double()
        part[own] = torch.stack([scores, usual[own], torch.ones_like(scores)], 1)
    parts = (parts / parts[..., 2].sum(0)[:, None].clamp(min=1))[:, reported_half(n)]
    assert response.per_direction is not None  # a trial wrote it
    parts = torch.cat([parts, response.per_direction[..., 3:]], 2)
    return replace(response, judge=judges[0].name, sums=parts.sum(0), per_direction=parts)


def lexicon_rows(
    rows: Rows,
    lexicon: Lexicon,
    trial: Trial,
    name: str,
    response: Response,
    *,
    model: LanguageModel,
    arm: Sequence[EditAt] | None,
) -> Iterator[ResultRow]:
    """Yield score and lift of an arm's reported response by a lexicon, unless it is the judge
    anyway; and without what the directions of the `arm` favour, None for an instruction."""
    if not response.written:
        return
    whole = len(response.written) * [lexicon.judge]
    if not lexicon.is_chosen:
        again = read_again(response, trial, whole)
        yield from _rows(rows.read_by(lexicon.validation), "lexicon", name, again)
    if arm is not None:
        again = read_again(response, trial, unshown(model, lexicon.judge, arm, response))
        said = f"{lexicon.judge.name[:-1]}, without {N_SHOWN} shown tokens)"
        by = rows.read_by(replace(lexicon.validation, judge=said))
        yield from _rows(by, "unshown", name, again)


def _rows(rows: Rows, kind: str, arm: str, response: Response) -> Iterator[ResultRow]:
    for measure in _READ:
        drawn = response.replicates(measure, resamples=rows.resamples, seed=rows.seed)
        yield rows.row(
            f"steering_{kind}_{measure}", getattr(response, measure), UNITS[measure], arm, drawn,
            n=response.n_answered,
        )  # fmt: skip
