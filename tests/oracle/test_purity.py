"""Label purity: its two ends, and what random examples come to."""

import math
import random

import pytest

from saelab.metrics.purity import label_purity

EVEN = {label: 50 for label in "abcdefghij"}


def test_examples_of_one_label_are_pure_and_those_of_another_than_chosen_are_not():
    pure = label_purity(["a"] * 10, EVEN)
    assert (pure.label, pure.hits, pure.n, pure.share, pure.base) == ("a", 5, 5, 1.0, 0.1)
    assert pure.lift == pytest.approx(10)
    assert pure.p_value == pytest.approx(0.1**5)
    none = label_purity(["a", "b"] * 5, EVEN)
    assert (none.label, none.hits, none.share, none.lift, none.p_value) == ("a", 0, 0.0, 0.0, 1.0)


def test_random_examples_have_the_base_rate_though_their_commonest_label_has_not():
    draw = random.Random(0)
    shares, naive = [], []
    for _ in range(1500):
        labels = draw.choices(list(EVEN), k=20)
        shares.append(label_purity(labels, EVEN).share)
        naive.append(max(map(labels.count, EVEN)) / 20)
    error = math.sqrt(0.1 * 0.9 / 10 / len(shares))
    assert sum(shares) / len(shares) == pytest.approx(0.1, abs=4 * error)
    assert sum(naive) / len(naive) > 0.2


def test_a_label_that_everything_has_says_nothing():
    only = label_purity(["a"] * 8, {"a": 30})
    assert (only.share, only.base, only.lift, only.p_value) == (1.0, 1.0, 1.0, 1.0)


def test_the_base_rate_is_the_labels_share_of_all_and_p_the_sum_of_binomials():
    found = label_purity([*"aaabacaaab"], {"a": 10, "b": 25, "c": 5})
    assert (found.label, found.hits, found.n, found.base) == ("a", 2, 5, 0.25)
    tail = sum(math.comb(5, k) * 0.25**k * 0.75 ** (5 - k) for k in (2, 3, 4, 5))
    assert found.p_value == pytest.approx(tail) == found.chance_of(1.6)
    assert found.chance_of(2.0) == pytest.approx(tail - math.comb(5, 2) * 0.25**2 * 0.75**3)
    assert found.chance_of(0.0) == 1
    assert found.chance_of(4.01) == 0


def test_of_equally_common_labels_the_strongest_examples_is_chosen():
    assert label_purity(["b", "x", "a", "x", "a", "x", "b", "x"], EVEN | {"x": 1}).label == "b"


def test_fewer_than_two_examples_have_no_purity():
    assert label_purity([], EVEN) is None
    assert label_purity(["a"], EVEN) is None
