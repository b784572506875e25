"""The evaluators of targeted perturbation: what they refuse, say, and keep."""

import pytest
import torch
from doubles import ArrayStore, Texts
from perturbed import COMBINATIONS, confounded, dictionary, labelled, table

from saelab.errors import ArtifactError, ConfigError, CorpusError
from saelab.evals.scr import ScrConfig, ScrEvaluator
from saelab.evals.tpp import TppConfig, TppEvaluator

SMALL = {"ns": [1, 2], "resamples": 10, "per_label": 5, "draws": 2}
SIGNALS = torch.eye(3).tolist()


def tpp(store, of=None, **changes):
    config = TppConfig.parse(SMALL | changes)
    return table(TppEvaluator(config, "site")(of or dictionary(torch.eye(3)), store))


def scr(store, of=None, **changes):
    attributes = {k: changes.pop(k) for k in ("pairs", "second", "pattern") if k in changes}
    config = ScrConfig.parse(SMALL | changes | {"attributes": attributes})
    return table(ScrEvaluator(config, "site")(of or dictionary(torch.eye(3)), store))


def crossed(**options):
    return confounded([1, 0, 0], [0, 1, 0.5], n=200, **options)


def test_labels_that_tpp_cannot_score_are_refused_with_what_to_do():
    store = labelled(SIGNALS, "abc", n=90)
    with pytest.raises(ConfigError, match=r"tpp.labels: no document is labelled 'd'; known: 'a'"):
        tpp(store, labels=["a", "b", "d"])
    with pytest.raises(ConfigError, match="tpp needs three labels or more with 5 documents"):
        tpp(labelled(SIGNALS[:2], "ab", n=60))
    with pytest.raises(ConfigError, match="only two have as many"):
        tpp(store, labels=["a", "b"])
    with pytest.raises(ConfigError, match="only 'a' has as many"):
        tpp(labelled(SIGNALS[:1], "a", n=60))
    with pytest.raises(ConfigError, match="none of 3 has as many"):
        tpp(store, per_label=30)
    store.labels[10:] = ["c" if label == "b" else label for label in store.labels[10:]]
    with pytest.raises(ConfigError, match=r"tpp.labels: b have fewer than 5"):
        tpp(store, labels=["a", "b", "c"])
    bare = ArrayStore({"site": torch.ones(64, 3)})
    del bare.n_documents
    with pytest.raises(ConfigError, match="label_field"):
        tpp(bare)


@pytest.mark.parametrize("score", [tpp, scr])
def test_dictionaries_that_cannot_be_ablated_are_refused(score):
    store = crossed() if score is scr else labelled(SIGNALS, "abc", n=90)
    with pytest.raises(ConfigError, match=r"ns: even the least number .* 4, .* the 3 that"):
        score(store, ns=[4, 8])
    with pytest.raises(ConfigError, match="ascend"):
        score(store, ns=[2, 1])
    with pytest.raises(ArtifactError, match="width 4"):
        score(store, dictionary(torch.eye(4)))
    elsewhere = dictionary(torch.eye(3))
    elsewhere.d_out = 5
    with pytest.raises(ArtifactError, match="maps width 3 to 5"):
        score(store, elsewhere)


def test_a_number_above_the_live_latents_ablates_what_there_is_and_says_so():
    found = tpp(labelled(SIGNALS, "abc", n=90), ns=[1, 500])
    assert found["dictionary", "tpp_ablated[n=500]"].value <= 3
    assert found["raw", "tpp_ablated[n=500]"].value <= 3
    assert found["dictionary", "tpp_ablated[n=1]"].value == 1


def test_attributes_that_scr_cannot_cross_are_refused_with_what_to_do():
    with pytest.raises(ConfigError, match=r"the label 'a' holds one.*attributes.pattern"):
        scr(labelled(SIGNALS, "abc", n=90))
    with pytest.raises(ConfigError, match=r"attributes.pairs: no document is labelled 'bb'"):
        scr(crossed(), pairs=[["a", "bb"]])
    with pytest.raises(ConfigError, match=r"attributes.second: no document is labelled 'male'"):
        scr(crossed(), second=["male", "x"])
    with pytest.raises(ConfigError, match=r"attributes.pairs: name two values, since there are 3"):
        scr(labelled(SIGNALS, ["a/x", "b/y", "c/x"], n=90))
    with pytest.raises(ConfigError, match=r"attributes.pairs: .* there are 0 \(no labels\)"):
        scr(labelled(SIGNALS, [None] * 3, n=60), pattern="x")
    with pytest.raises(ConfigError, match=r"each combination.* fewer of b/y"):
        scr(labelled(SIGNALS, ["a/x", "a/y", "b/x"], n=90), pairs=[["a", "b"]])
    for bad, match in (
        ({"pattern": "("}, "no regular expression"),
        ({"pattern": "x", "second": ["x", "y"]}, "not both"),
        ({"separator": ""}, "separator"),
    ):
        with pytest.raises(ConfigError, match=match):
            ScrConfig.parse({"attributes": bad})


@pytest.mark.parametrize("score", [tpp, scr])
def test_a_label_whose_documents_keep_no_row_is_named(score):
    store = crossed() if score is scr else labelled(SIGNALS, "abc", n=90)
    label, kept = store.labels[1], store._kept
    gone = torch.tensor([own == label for own in store.labels]).repeat_interleave(16)
    store._kept = lambda split: kept(split)[~gone[kept(split)]]
    with pytest.raises(CorpusError, match=label):
        score(store)


@pytest.mark.parametrize("score", [tpp, scr])
def test_scores_do_not_depend_on_how_rows_are_batched(score):
    store = crossed(noise=1.0) if score is scr else labelled(SIGNALS, "abc", n=90, noise=2.0)
    of = dictionary(torch.eye(3), kind="abs_topk")
    first, *others = (score(store, of, batch=size) for size in (5, 64, 100_000))
    for other in others:
        assert other.keys() == first.keys()
        for key, row in first.items():
            assert other[key].value == pytest.approx(row.value, abs=1e-9), key


def test_only_the_first_rows_of_each_document_count_if_so_asked():
    store = labelled(SIGNALS, "abc", n=90, noise=2.0)
    x = store._x["site"].reshape(90, 16, 3)[:, :6]
    cut, of = Texts(x.flatten(0, 1), store.labels, window=6), dictionary(torch.eye(3))
    expected, whole = tpp(cut, of), tpp(store, of)
    for size in (5, 1024):
        found = tpp(store, of, rows=6, batch=size)
        for key in (("probe", "tpp_accuracy"), ("dictionary", "tpp[n=1](a)")):
            assert found[key].value == expected[key].value != whole[key].value


@pytest.mark.parametrize("kind", [TppEvaluator, ScrEvaluator])
def test_what_is_kept_between_dictionaries_changes_no_number(kind):
    if kind is TppEvaluator:
        config, stores = TppConfig.parse(SMALL), [labelled(SIGNALS, "abc", n=90, noise=2.0)]
        stores.append(labelled(SIGNALS, "abc", n=90, noise=1.0, seed=1))
    else:
        config, stores = ScrConfig.parse(SMALL), [crossed(noise=1.0), crossed(seed=1)]
    shared = kind(config, "site")
    for store in (stores[0], stores[0], stores[1]):
        for W in (torch.eye(3), torch.ones(4, 3)):
            of = dictionary(W)
            assert list(shared(of, store)) == list(kind(config, "site")(of, store))


def test_only_the_labels_that_are_asked_for_are_scored():
    store = labelled([*SIGNALS, [1, 1, 1]], "abcd", n=120)
    found = tpp(store, labels=["a", "b", "c"])
    assert found["corpus", "tpp_labels"].value == 3
    assert found["corpus", "tpp_documents"].value == 90
    assert found["corpus", "tpp_documents_left_out"].value == 30
    assert ("dictionary", "tpp[n=1](d)") not in found


def test_pairs_are_scored_each_by_itself_and_their_mean_is_reported():
    names = [*COMBINATIONS, "c/x", "c/y"]
    signals = [[u, v, v] for u in (1, -1, 0) for v in (1, -1)]
    found = scr(labelled(signals, names, n=300), pairs=[["a", "b"], ["c", "b"]])
    scores = [found["dictionary", f"scr[n=1]({pair})"].value for pair in ("a or b", "c or b")]
    assert found["dictionary", "scr[n=1]"].value == pytest.approx(sum(scores) / 2)
    assert found["corpus", "scr_labels"].value == 6


@pytest.mark.parametrize("score", [tpp, scr])
def test_rows_have_units_versions_and_every_control(score):
    store = crossed() if score is scr else labelled(SIGNALS, "abc", n=90)
    found = score(store)
    name = score.__name__
    arms = {arm for arm, metric in found if metric == f"{name}[n=1]"}
    controls = {"random_latents", "raw", "pca", "random_directions", "shuffled_labels"}
    assert arms == {"dictionary", "mean_difference", "linear_probe", *controls}
    assert {row.evaluator for row in found.values()} == {name}
    for (arm, metric), row in found.items():
        assert row.unit and row.metric_version == 1 and row.n > 0
        own = arm in ("dictionary", "random_latents")
        assert row.encoder == ("own" if own else "none"), metric
    for arm in arms - {"dictionary"}:
        assert found["dictionary", f"{name}_over({arm})[n=1]"].replicates is None
        assert len(found[arm, f"{name}[n=1]"].replicates) == 10
