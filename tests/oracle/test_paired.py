"""Differences draw by draw, beside SciPy and by hand."""

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from saelab.circuits.paired import ClaimConfig, against_best
from saelab.errors import ConfigError

CLAIM = ClaimConfig(score="codes", examples=10, smallest=0.1)


def row(method, draw, kendall, *, group="observational", seed=None, **changes):
    place = {"position": "end", "direction": "noising", "negatives": "unpredictable"}
    about = {"method": method, "group": group, "draw": draw, "seed": seed, "examples": 10}
    return about | place | {"kendall": kendall, "spearman": -kendall} | changes


def rows(codes, *baselines):
    found = [row("codes", draw, value, group="codes", seed=0) for draw, value in enumerate(codes)]
    for number, values in enumerate(baselines):
        found += [row(f"b{number}", draw, value) for draw, value in enumerate(values)]
    return found


def test_each_draw_is_held_against_its_own_best_baseline():
    found = against_best(
        rows([0.5, 0.4, 0.3, 0.6], [0.1, 0.5, 0.2, 0.0], [0.2, 0.3, 0.1, 0.9]), CLAIM
    )
    assert found.best == ("b1", "b0", "b0", "b1")
    assert found.differences == pytest.approx([0.3, -0.1, 0.1, -0.3])
    expected = ttest_1samp(np.array(found.differences), 0).confidence_interval(0.95)
    assert found.interval == pytest.approx((expected.low, expected.high))
    assert found.mean == pytest.approx(0) and found.verdict(0.1) == "undecided"


def test_better_or_worse_in_every_draw_decides_and_a_wide_interval_does_not():
    low = [0.1, 0.1, 0.1]
    assert against_best(rows([0.5, 0.5, 0.52], low), CLAIM).verdict(0.1) == "supported"
    small = against_best(rows([0.14, 0.15, 0.15], low), CLAIM).verdict(0.1)
    assert small == "supported, but smaller than of interest"
    assert against_best(rows([0.0, 0.0, 0.01], low), CLAIM).verdict(0.1) == "refuted"
    assert against_best(rows([0.9, 0.11, 0.11], low), CLAIM).verdict(0.1) == "undecided"
    two = against_best(rows([0.9, 0.9], low[:2]), CLAIM)
    assert two.verdict(0.1) == "undecided (too few draws)"
    assert against_best(rows([0.9], low[:1]), CLAIM).interval == (float("-inf"), float("inf"))


def test_only_the_same_examples_and_the_same_group_count_and_seeds_are_averaged():
    kept = rows([0.5, 0.5, 0.5], [0.1, 0.1, 0.1])
    kept += [row("codes", 0, 0.7, group="codes", seed=1), row("b0", 0, 0.3, seed=1)]
    others = [
        row("zero_patching", 0, 1.0, group="causal"), row("codes_pairs", 0, 1.0, group="codes"),
        row("b1", 0, 1.0, examples=20), row("b1", 0, 1.0, negatives="off_task"),
        row("b1", 0, 1.0, position="all"), row("b1", 0, 1.0, direction="denoising"),
    ]  # fmt: skip
    found = against_best(kept + others, CLAIM)
    assert found.differences == pytest.approx([0.6 - 0.2, 0.4, 0.4])
    other = ClaimConfig(score="codes", agreement="spearman")
    assert against_best(kept, other).differences == pytest.approx([-0.4, -0.4, -0.4])


def test_a_claim_about_what_was_not_run_is_refused():
    with pytest.raises(ConfigError, match="no draw has codes_pairs and a baseline at 10 examples"):
        against_best(rows([0.5], [0.1]), ClaimConfig(score="codes_pairs"))
    with pytest.raises(ConfigError, match="at 5 examples"):
        against_best(rows([0.5], [0.1]), ClaimConfig(score="codes", examples=5))
