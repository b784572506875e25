"""Rows of a steered concept: what is not known has no row."""

import math

from saelab.steering.judges import Validation
from saelab.steering.rows import Rows


def rows_with(validation: Validation) -> Rows:
    return Rows("glad", validation, 8, "steering", 1, 20, 0)


def test_an_area_that_does_not_exist_has_no_row_and_marks_the_others():
    (only,) = rows_with(Validation("some", 0.9, math.nan)).judge()
    assert (only.name, only.value) == ("steering_judge_heldout_auroc(glad)", 0.9)
    assert only.encoder == "some, unvalidated"
    both = list(rows_with(Validation("some", 0.9, 0.9, 0.5)).judge())
    assert [row.value for row in both] == [0.9, 0.9, 0.5]
    assert both[0].encoder == "some"
