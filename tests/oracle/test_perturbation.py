"""Targeted perturbation and spurious correlation removal: known answers, and slow references."""

import pytest
import torch
from perturbed import COMBINATIONS, WINDOW, confounded, dictionary, labelled, table
from sklearn.metrics import balanced_accuracy_score

from saelab.evals.attributes import AttributesConfig
from saelab.evals.perturbation import Halves, fall, group_accuracies, matched, strongest
from saelab.evals.scr import ScrConfig, ScrEvaluator, recovered
from saelab.evals.tpp import TppConfig, TppEvaluator
from saelab.metrics.pooling import HalfPooling
from saelab.probes import fit_probe
from saelab.types import SparseLatents

SMALL = {"resamples": 20, "per_label": 5, "draws": 3}
TPP = TppConfig.parse({"ns": [1, 2], **SMALL})
SCR = ScrConfig.parse({"ns": [1, 2], **SMALL})


def tpp(store, of, config=TPP):
    return table(TppEvaluator(config, "site")(of, store))


def scr(store, of, config=SCR):
    return table(ScrEvaluator(config, "site")(of, store))


def some_labels(*, n=160, seed=0):
    """Four labels that three coordinates of six tell, none of them well."""
    g = torch.Generator().manual_seed(seed)
    signals = 0.4 * torch.randn(4, 6, generator=g)
    return labelled(signals.tolist(), "pqrs", n=n, noise=1.5, seed=seed)


def some_dictionary(*, kind="abs_topk", latents=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    return dictionary(torch.randn(latents, 6, generator=g), kind=kind)


# ---------------------------------------------------------------------------------------------- TPP


def test_the_one_latent_of_each_label_costs_half_its_own_accuracy_and_no_other():
    found = tpp(labelled(torch.eye(3).tolist(), "abc"), dictionary(torch.eye(3)))
    assert found["probe", "tpp_accuracy"].value == 1
    for arm in ("dictionary", "raw"):
        for name, value in (("tpp", 0.5), ("tpp_own", 0.5), ("tpp_others", 0)):
            assert found[arm, f"{name}[n=1]"].value == value
            assert found[arm, f"{name}[n=1]"].standard_error == 0
        assert found[arm, "tpp[n=1](b)"].value == 0.5
    # a probe that its own direction is taken from says the same of every document
    assert found["linear_probe", "tpp_own[n=1]"].value == 0.5
    assert found["mean_difference", "tpp_own[n=1]"].value == 0.5
    assert found["dictionary", "tpp_over(raw)[n=1]"].value == 0
    assert found["dictionary", "tpp_over(linear_probe)[n=1]"].value >= 0
    # the other latents fire less on the label: none of them is ablated as the second
    assert found["dictionary", "tpp_ablated[n=2]"].value == 1
    assert found["dictionary", "tpp[n=2]"].value == 0.5


def test_latents_that_carry_nothing_of_any_label_cost_nothing():
    signals = torch.eye(3, 5).tolist()
    found = tpp(labelled(signals, "abc"), dictionary(torch.eye(5)[3:]))
    for name in ("tpp", "tpp_own", "tpp_others"):
        assert found["dictionary", f"{name}[n=1]"].value == 0


def test_the_two_signs_of_a_latent_are_ablated_each_by_itself():
    signals = [[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, 0, 1]]
    store = labelled(signals, "abcd", noise=0.02)
    signed = tpp(store, dictionary(torch.eye(3), kind="abs_topk"))
    for label in "abcd":
        assert signed["dictionary", f"tpp[n=1]({label})"].value == 0.5
    assert signed["dictionary", "tpp_others[n=1]"].value == 0
    # without negative codes nothing can be said of the label at the other end
    one_sided = tpp(store, dictionary(torch.eye(3)))
    assert one_sided["dictionary", "tpp[n=1](a)"].value == 0.5
    assert one_sided["dictionary", "tpp[n=1](b)"].value == 0


def test_a_large_negative_code_is_a_firing():
    of = dictionary(torch.eye(3), kind="abs_topk")
    up, down = (tpp(labelled((s * torch.eye(3)).tolist(), "abc"), of) for s in (1, -1))
    assert down["dictionary", "tpp[n=1]"].value == up["dictionary", "tpp[n=1]"].value == 0.5


def test_signed_codes_that_happen_to_be_positive_score_as_one_sided_ones():
    store = labelled(torch.eye(3).tolist(), "abc", noise=0.3)
    store._x["site"].abs_()
    rows = [tpp(store, dictionary(torch.eye(3), kind=kind)) for kind in ("topk", "abs_topk")]
    assert rows[0] == rows[1]


def documents(store, d):
    """The rows of each document, float64, and whether it is held out."""
    x = store.rows("site", torch.arange(store.n_rows)).double().reshape(-1, WINDOW, d)
    return x, torch.tensor([store.document(i).heldout for i in range(len(x))])


def coded(of, x):
    """The codes of documents' rows: for each half, (sign, latent), its values, at least 0."""
    with torch.no_grad():
        z = of.encode(x.float()).double()
    return {(s, i): (s * z[..., i]).clamp(min=0) for s in (1, -1) for i in range(z.shape[-1])}


def reference_order(of, codes, positive, weight, *, clamped):
    """Halves by effect, one by one."""
    D, effects = of.W_dec.detach().double(), {}
    for (sign, latent), values in codes.items():
        means = [rows.mean() for rows in values]
        own = [float(m) for m, p in zip(means, positive, strict=True) if p]
        others = [float(m) for m, p in zip(means, positive, strict=True) if not p]
        apart = sum(own) / len(own) - sum(others) / len(others)
        push = float(sign * D[latent] @ weight)
        effects[sign, latent] = max(apart, 0) * push if clamped else abs(apart * push)
    ranked = sorted(effects, key=lambda half: -effects[half])
    return [half for half in ranked if effects[half] > 0]


def reference_ablated(of, x, codes, chosen):
    """The means of documents after halves are taken out of every row."""
    D, left = of.W_dec.detach().double(), x.clone()
    for sign, latent in chosen:
        for document in range(len(x)):
            for row in range(x.shape[1]):
                left[document, row] -= codes[sign, latent][document, row] * sign * D[latent]
    return left.mean(1)


@pytest.mark.parametrize("kind", ["abs_topk", "topk"])
def test_tpp_is_what_loops_over_labels_latents_and_rows_give(kind):
    store, of, names = some_labels(), some_dictionary(kind=kind), "pqrs"
    found = tpp(store, of, TppConfig.parse({"ns": [1, 3], **SMALL}))
    x, heldout = documents(store, 6)
    truth = torch.tensor([[label == name for name in names] for label in store.labels])
    train, test = x[~heldout], x[heldout]
    probes = [fit_probe(train.mean(1), positive) for positive in truth[~heldout].T]

    def accuracies(means):
        said = [probe.scores(means) > 0 for probe in probes]
        return [balanced_accuracy_score(t, s) for t, s in zip(truth[heldout].T, said, strict=True)]

    before, codes, test_codes = accuracies(test.mean(1)), coded(of, train), coded(of, test)
    assert found["probe", "tpp_accuracy"].value == pytest.approx(sum(before) / 4)
    assert 0.55 < sum(before) / 4 < 0.95
    for n in (1, 3):
        values = []
        for c in range(4):
            own = truth[~heldout][:, c]
            order = reference_order(of, codes, own, probes[c].weight, clamped=True)
            after = accuracies(reference_ablated(of, test, test_codes, order[:n]))
            falls = [b - a for b, a in zip(before, after, strict=True)]
            values.append(falls[c] - sum(f for i, f in enumerate(falls) if i != c) / 3)
            row = found["dictionary", f"tpp[n={n}]({names[c]})"]
            assert row.value == pytest.approx(values[-1], abs=1e-12)
        assert found["dictionary", f"tpp[n={n}]"].value == pytest.approx(sum(values) / 4)


# ---------------------------------------------------------------------------------------------- SCR

WEAK, STRONG = [1, 0, 0, 0, 0], [0, 1, 1, 1, 0]


@pytest.mark.parametrize(("signals", "tested"), [((WEAK, STRONG), 1), ((STRONG, WEAK), 2)])
def test_taking_out_the_planted_spurious_latent_recovers_all(signals, tested):
    store = confounded(*signals)
    of = dictionary([[0, 3**-0.5, 3**-0.5, 3**-0.5, 0]], kind="abs_topk")
    found = scr(store, of)
    assert found["probe", "scr_before"].value == 0.5
    assert found["probe", "scr_clean"].value == 1
    assert found["probe", "scr_tested(a or b)"].value == tested
    assert found["probe", "scr_without_gap"].value == 0
    # one half frees the documents on its side, both free all
    assert found["dictionary", "scr[n=1]"].value == 0.5
    assert found["dictionary", "scr[n=2]"].value == 1
    assert found["dictionary", "scr[n=2](a or b)"].unit == "share of the gap"
    assert found["linear_probe", "scr[n=1]"].value == 1
    assert found["mean_difference", "scr[n=1]"].value == 1
    assert found["dictionary", "scr_over(shuffled_labels)[n=1]"].value == pytest.approx(
        0.5 - found["shuffled_labels", "scr[n=1]"].value
    )


def test_a_latent_of_neither_attribute_recovers_nothing():
    found = scr(confounded(WEAK, STRONG), dictionary([[0, 0, 0, 0, 1.0]], kind="abs_topk"))
    assert found["dictionary", "scr[n=2]"].value == 0
    assert found["dictionary", "scr[n=2]"].standard_error == 0


def test_without_a_gap_the_score_is_zero_and_says_so():
    store = confounded([0] * 3, [0] * 3, noise=0.0)
    found = scr(store, dictionary(torch.eye(3)))
    assert found["probe", "scr_without_gap"].value == 1
    row = found["dictionary", "scr[n=1](a or b)"]
    assert row.value == 0 and row.unit == "share of the gap; no gap: 0"
    assert "1 of 1 pairs" in found["dictionary", "scr[n=1]"].unit


def test_the_share_of_a_gap_has_its_ends_and_is_zero_without_one():
    before, clean = torch.tensor([0.5, 0.5, 0.5, 0.9]), torch.tensor([0.9, 0.9, 0.5009, 0.5])
    ablated = torch.tensor([0.5, 0.9, 0.8, 0.2])
    assert recovered(ablated, before, clean).tolist() == [0, 1, 0, 0]
    assert recovered(*torch.tensor([[0.4], [0.5], [0.7]])).item() == pytest.approx(-0.5)


@pytest.mark.parametrize("kind", ["abs_topk", "topk"])
def test_scr_is_what_loops_over_latents_and_rows_give(kind):
    store = confounded([0.3, 0, 0.1, 0, 0, 0], [0, 0.5, 0.2, 0, 0.3, 0], n=200, noise=1.0)
    of = some_dictionary(kind=kind)
    config = ScrConfig.parse({"ns": [1, 4], **SMALL})
    found = scr(store, of, config)
    x, heldout = documents(store, 6)
    has = torch.tensor([[label == c for c in COMBINATIONS] for label in store.labels])
    first, second = has[:, :2].any(1), has[:, [0, 2]].any(1)
    train = ~heldout  # every combination is as frequent, so all documents are used
    agree = train & (first == second)
    means = x.mean(1)
    spurious = fit_probe(means[agree], first[agree])
    apart = train & (first != second)
    said = spurious.scores(means[apart]) > 0
    tested = 0 if (said == first[apart]).double().mean() <= 0.5 else 1
    truth, removed = (first, second) if tested == 0 else (second, first)
    remover = fit_probe(means[train], removed[train])
    clean = fit_probe(means[train], truth[train])

    def accuracy(scores):
        right = (scores > 0) == truth[heldout]
        return float(torch.stack([right[c].double().mean() for c in has[heldout].T]).mean())

    low, high = (accuracy(p.scores(means[heldout])) for p in (spurious, clean))
    assert found["probe", "scr_before"].value == pytest.approx(low)
    assert found["probe", "scr_clean"].value == pytest.approx(high)
    assert high - low > 0.1
    codes, test_codes = coded(of, x[train]), coded(of, x[heldout])
    order = reference_order(of, codes, removed[train], remover.weight, clamped=False)
    for n in (1, 4):
        left = reference_ablated(of, x[heldout], test_codes, order[:n])
        expected = (accuracy(spurious.scores(left)) - low) / (high - low)
        assert found["dictionary", f"scr[n={n}]"].value == pytest.approx(expected, abs=1e-12)


def test_a_pattern_in_the_text_is_an_attribute_as_good_as_a_label():
    store = confounded(WEAK, STRONG)
    of = dictionary([[0, 3**-0.5, 3**-0.5, 3**-0.5, 0]], kind="abs_topk")
    by_label = scr(store, of)
    store.texts = [
        f"{label[0]} {'Marked' if label[2] == 'x' else 'plain'}" for label in store.labels
    ]
    store.labels = [label[0] for label in store.labels]
    attributes = AttributesConfig(pattern=r"\bmarked\b")
    by_text = scr(store, of, SCR.model_copy(update={"attributes": attributes}))
    for name in ("scr[n=1]", "scr[n=2]"):
        assert by_text["dictionary", name].value == by_label["dictionary", name].value


# -------------------------------------------------------------------------------------------- parts


def test_halves_are_pooled_alike_from_sparse_and_dense_codes_in_any_split():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(50, 7, generator=g) * (torch.rand(50, 7, generator=g) < 0.4)
    of = torch.tensor([2, 5, 9])[torch.randint(3, (50,), generator=g).sort().values]
    numbers = torch.tensor([2, 5, 9, 11])
    expected = torch.stack(
        [
            torch.cat([z[of == i].clamp(min=0).mean(0), (-z[of == i]).clamp(min=0).mean(0)])
            for i in (2, 5, 9)
        ]
    )
    for size in (1, 7, 50):
        dense, sparse = HalfPooling(numbers, 7), HalfPooling(numbers, 7)
        for part, mine in zip(z.split(size), of.split(size), strict=True):
            dense.update(part, mine)
            sparse.update(SparseLatents.from_dense(part), mine)
        assert dense.seen.tolist() == [True, True, True, False]
        torch.testing.assert_close(dense.compute(), expected)
        assert torch.equal(dense.compute(), sparse.compute())


def test_the_strongest_have_an_effect_and_ties_go_by_number():
    effects = torch.tensor([0.0, 2, -1, 2, 5, 0.5])
    assert strongest(effects, 3).tolist() == [4, 1, 3]
    assert strongest(effects, 10).tolist() == [4, 1, 3, 5]


def test_matched_halves_are_distinct_live_ones_of_like_size():
    g = torch.Generator().manual_seed(0)
    sizes = torch.rand(200, generator=g) * (torch.rand(200, generator=g) < 0.5)
    live = (sizes > 0).nonzero()[:, 0]
    chosen = live[torch.randperm(len(live), generator=g)[:30]]
    rank = sizes[live].argsort().argsort() * 10 // len(live)
    tenth = dict(zip(live.tolist(), rank.tolist(), strict=True))
    first, second = (matched(chosen, sizes, 0, draw) for draw in (0, 1))
    assert first.tolist() != second.tolist()
    for drawn in (first, second):
        assert len(set(drawn.tolist())) == 30
        assert [tenth[i] for i in drawn.tolist()] == [tenth[i] for i in chosen.tolist()]
    assert matched(chosen[:7], sizes, 0, 0).tolist() == first[:7].tolist()
    assert matched(chosen[:0], torch.zeros(4), 0).tolist() == []


def test_a_fall_is_that_of_the_probes_score_when_rows_lose_their_halves():
    of, g = some_dictionary(), torch.Generator().manual_seed(1)
    x = torch.randn(5, WINDOW, 6, generator=g, dtype=torch.float64)
    W = torch.randn(2, 6, generator=g, dtype=torch.float64)
    codes = coded(of, x)
    pooled = torch.stack([values.mean(1) for values in codes.values()], 1).float()
    halves = Halves(pooled, pooled, of.W_dec.detach())
    ablated = torch.tensor([3, 12, 19])  # of ten latents: a positive half, two negative ones
    left = reference_ablated(of, x, codes, [(1, 3), (-1, 2), (-1, 9)])
    expected = (x.mean(1) - left) @ W.T
    found = fall(halves.test, halves.pushes(W), ablated)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_accuracies_weigh_groups_alike_and_documents_as_drawn():
    g = torch.Generator().manual_seed(0)
    truth = torch.rand(30, 2, generator=g) < 0.3
    said = torch.rand(30, 4, 2, generator=g) < 0.5
    weights = torch.randint(3, (5, 30), generator=g).double()
    groups = torch.stack([truth, ~truth], 1)
    found = group_accuracies((said == truth[:, None]).double(), groups, weights)
    for b, w in enumerate(weights):
        drawn = torch.repeat_interleave(torch.arange(30), w.long())
        for k in range(4):
            for c in range(2):
                brute = balanced_accuracy_score(truth[drawn, c], said[drawn, k, c])
                assert float(found[b, k, c]) == pytest.approx(brute)
