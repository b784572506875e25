"""Rows of a steered concept: what is not known has no row."""

import math

import torch

from saelab.steering.judges import Validation
from saelab.steering.rows import Rows, valued
from saelab.steering.trial import Response


def rows_with(validation: Validation) -> Rows:
    return Rows("glad", validation, 8, "steering", 1, 20, 0, "fluency(other)")


def test_an_area_that_does_not_exist_has_no_row_and_marks_the_others():
    (only,) = valued(rows_with(Validation("some", 0.9, math.nan)).judge())
    assert (only.name, only.value) == ("steering_judge_heldout_auroc(glad)", 0.9)
    assert only.encoder == "some, unvalidated"
    both = list(rows_with(Validation("some", 0.9, 0.9, 0.5)).judge())
    assert [row.value for row in both] == [0.9, 0.9, 0.5]
    assert both[0].encoder == "some"


def response(answered: int) -> Response:
    sums = torch.ones(8, 5, dtype=torch.float64)
    sums[:, 1] = 0.25
    sums[answered:, :3] = 0
    return Response("some", 0.1, (), None, "some", sums, ())


def test_rows_count_the_prompts_that_were_answered():
    rows = rows_with(Validation("some", 0.9, 0.9))
    found = {row.name: row for row in rows.chosen("arm", response(1), 1)}
    lift = found["steering_lift(glad)"]
    assert (lift.value, lift.n, lift.standard_error) == (0.75, 1, 0.0)
    assert lift.replicates.isnan().any()
    fluency = found["steering_fluency(glad)"]
    assert (fluency.n, fluency.encoder, lift.encoder) == (8, "fluency(other)", "some")
    missing = found["steering_missing(glad)"]
    assert (missing.value, missing.unit, missing.n) == (7 / 8, "share", 8)


def test_a_score_that_nobody_gave_has_no_row():
    rows = rows_with(Validation("some", 0.9, 0.9))
    found = {row.name: row.value for row in valued(rows.response("arm", response(0)))}
    assert found == {"steering_fluency(glad)": 1.0}
    lead = rows.lead("other", "arm", response(3), response(5))
    assert (lead.value, lead.n) == (0.0, 3)
    assert math.isfinite(lead.standard_error)
    assert not list(valued([rows.lead("other", "arm", response(3), response(0))]))
