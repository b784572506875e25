"""Labelled documents, the probing and concepts evaluators, and supervised directions."""

from dataclasses import replace

import pytest
import torch
from doubles import ArrayStore, Texts

from saelab import dictionaries
from saelab.dictionaries.supervised import Supervised
from saelab.errors import ArtifactError, ConfigError, CorpusError
from saelab.evals.concepts import ConceptsConfig, ConceptsEvaluator
from saelab.evals.labelled import Measured
from saelab.evals.probing import ProbingConfig, ProbingEvaluator
from saelab.labels import labelled_documents, word_shares

SITE, WINDOW = "site", 16
PROBING = ProbingConfig(ks=(1, 2), resamples=50, per_label=5, words=20)
CONCEPTS = ConceptsConfig(resamples=50, per_label=5, words=20)


class Reads(dictionaries.topk.TopK):
    """A dictionary whose latents are the coordinates, of either sign."""

    def __init__(self, d):
        config = dictionaries.config_class("topk").parse(
            {"type": "topk", "d_in": d, "d_sae": d, "k": d}
        )
        super().__init__(config)

    def encode_sparse(self, x):
        from saelab.types import SparseLatents

        return SparseLatents.from_dense(x)

    def encode(self, x):
        return x


def world(*, n=300, d=6, classes=3, shuffled=False, sign=1.0, noise=0.2, seed=0):
    """Documents of 16 rows; one row in four of class c has a large coordinate c."""
    g = torch.Generator().manual_seed(seed)
    of = torch.arange(n) % classes
    x = noise * torch.randn(n, WINDOW, d, generator=g).abs()
    for number, c in enumerate(of.tolist()):
        x[number, ::4, c] += sign * 3
    if shuffled:
        of = of[torch.randperm(n, generator=g)]
    return Texts(x.flatten(0, 1), [f"class {c}" for c in of.tolist()])


def table(rows):
    return {(row.arm, row.name): row for row in rows}


def probing(store, config=PROBING, dictionary=None):
    return table(ProbingEvaluator(config, SITE)(dictionary or Reads(store.width(SITE)), store))


def concepts(store, config=CONCEPTS, dictionary=None):
    return table(ConceptsEvaluator(config, SITE)(dictionary or Reads(store.width(SITE)), store))


# ------------------------------------------------------------------------------------------- labels


def test_parts_are_disjoint_complete_and_of_the_stores_split():
    store = world()
    found = labelled_documents(store, "halves", at_most=None, per_class=5)
    numbers = torch.cat([part.documents for part in found.parts.values()])
    assert numbers.sort().values.tolist() == list(range(300))
    assert all(n % 5 != 4 for n in found.parts["train"].documents.tolist())
    for part in found.parts.values():
        assert part.documents.tolist() == sorted(part.documents.tolist())
        labels = [store.labels[n] for n in part.documents.tolist()]
        assert [found.classes[c] for c in part.targets.int().argmax(1).tolist()] == labels


def test_no_film_lies_in_two_parts():
    store = world()
    store.films = [f"film {n % 5}-{n // 30}" for n in range(300)]  # six texts each, of one split
    found = labelled_documents(store, "halves", at_most=None, per_class=5)
    films = [{store.films[n] for n in p.documents.tolist()} for p in found.parts.values()]
    assert sum(map(len, films)) == len(set.union(*films)) == 50
    assert all(films)
    few = labelled_documents(store, "halves", at_most=30, per_class=2)
    for part, whole in few.parts.items():
        assert set(whole.documents.tolist()) <= set(found.parts[part].documents.tolist())


def test_fewer_documents_are_the_same_ones_whatever_else_the_store_holds():
    small, large = world(n=300), world(n=600)
    few = [
        labelled_documents(s, "train", at_most=None, per_class=5).parts["train"].documents
        for s in (small, large)
    ]
    chosen = labelled_documents(large, "train", at_most=100, per_class=5).parts["train"].documents
    assert len(chosen) == 100 and len(few[0]) < len(few[1])
    again = labelled_documents(large, "split", at_most=100, per_class=5).parts["train"].documents
    assert torch.equal(chosen, again)


def test_rare_labels_and_documents_without_one_are_left_out_and_counted():
    store = world()
    store.labels[:4] = ["rare"] * 4
    store.labels[10:13] = [None] * 3
    found = labelled_documents(store, "split", at_most=None, per_class=5)
    assert found.classes == ("class 0", "class 1", "class 2")
    assert (found.classes_left_out, found.documents_left_out) == (1, 7)


def test_what_cannot_be_told_apart_is_refused_with_what_to_do():
    one = world(classes=1)
    with pytest.raises(ConfigError, match="only 'class 0' has"):
        labelled_documents(one, "split", at_most=None, per_class=5)
    one.labels = [None] * 300
    with pytest.raises(ConfigError, match="label_field"):
        labelled_documents(one, "split", at_most=None, per_class=5)
    bare = ArrayStore({SITE: torch.ones(64, 2)})
    del bare.n_documents
    with pytest.raises(ConfigError, match="label_field"):
        labelled_documents(bare, "split", at_most=1, per_class=2)
    packed = world()
    packed.document = lambda number: replace(world().document(number), group=max(0, number - 1))
    with pytest.raises(ConfigError, match="packing: document"):
        labelled_documents(packed, "split", at_most=None, per_class=5)
    with pytest.raises(ArtifactError, match="width 4"):
        probing(world(), dictionary=Reads(4))


def test_a_label_whose_documents_keep_no_row_is_named():
    store = world()
    gone = torch.tensor([label == "class 1" for label in store.labels]).repeat_interleave(WINDOW)
    kept = store._kept
    store._kept = lambda split: kept(split)[~gone[kept(split)]]
    with pytest.raises(CorpusError, match="class 1"):
        probing(store)
    with pytest.raises(CorpusError, match="'class 1' keeps a row at site"):
        supervised("mean_difference", store)


@pytest.mark.parametrize("score", [probing, concepts])
def test_only_the_labels_asked_for_are_scored_and_told_apart(score):
    store, config = world(), {probing: PROBING, concepts: CONCEPTS}[score]
    asked = config.model_copy(update={"labels": ("class 0", "class 2")})
    name = score.__name__
    rows = score(store, asked)
    assert rows["corpus", f"{name}_labels"].value == 2
    assert rows["corpus", f"{name}_documents"].value == 200
    assert rows["corpus", f"{name}_documents_left_out"].value == 100
    told = {n.partition("(")[2] for arm, n in rows if arm == "dictionary" and "(class" in n}
    assert told == {"class 0)", "class 2)"}
    for labels, message in (
        (("class 0", "clas 1"), rf"{name}.labels: no document is labelled 'clas 1'.*'class 1'"),
        (("class 0",), "only 'class 0' has"),
    ):
        with pytest.raises(ConfigError, match=message):
            score(store, config.model_copy(update={"labels": labels}))
    store.labels[10:] = [f"class {n % 2}" for n in range(290)]
    with pytest.raises(ConfigError, match=rf"{name}.labels: class 2 have fewer than 5 documents"):
        score(store, config.model_copy(update={"labels": ("class 0", "class 1", "class 2")}))


def test_words_are_the_commonest_of_training_texts_and_shares_of_a_text():
    words, shares = word_shares({"train": ("a cat cat ran", "the cat"), "test": ("Cat! dog",)}, 2)
    assert words == ("cat", "ran")
    torch.testing.assert_close(shares["train"], torch.tensor([[2 / 3, 1 / 3], [0.5, 0]]))
    torch.testing.assert_close(shares["test"], torch.tensor([[0.5, 0]]))
    words, shares = word_shares({"train": ("", "1"), "test": ("x",)}, 5)
    assert words == () and shares["test"].shape == (1, 0)


# ------------------------------------------------------------------------------------------ probing


def test_a_perfect_latent_makes_a_perfect_one_sparse_probe():
    found = probing(world())
    for metric in ("probe_accuracy", "probe_auc"):
        for how in ("max", "mean"):
            row = found["dictionary", f"{metric}[k=1,{how}]"]
            assert row.value == 1 and row.standard_error == 0
            assert found["dictionary", f"{metric}[k=1,{how}](class 2)"].value == 1
            assert found["raw", f"{metric}[all,{how}]"].value == 1
            assert found["dictionary", f"{metric}_over(raw)[k=1,{how}]"].value == 0
    assert found["bag_of_words", "probe_auc[k=1,max]"].value < 1
    assert found["corpus", "probing_labels"].value == 3
    assert found["corpus", "probing_documents"].value == 300
    assert {row.evaluator for row in found.values()} == {"probing"}


def test_shuffled_labels_leave_every_probe_at_chance():
    found = probing(world(n=1500, shuffled=True), replace_config(PROBING, resamples=200))
    for arm, kind in (("dictionary", "k=1,max"), ("dictionary", "k=2,mean"), ("raw", "all,max")):
        for metric in ("probe_accuracy", "probe_auc"):
            row = found[arm, f"{metric}[{kind}]"]
            assert row.standard_error > 0.005
            assert abs(row.value - 0.5) < 4 * row.standard_error


def test_words_that_name_the_label_are_read_perfectly():
    store = world(shuffled=True)
    store.texts = [f"some words and {label.replace(' ', '')}" for label in store.labels]
    found = probing(store)
    assert found["bag_of_words", "probe_accuracy[k=1,max]"].value == 1
    lead = found["dictionary", "probe_accuracy_over(bag_of_words)[k=1,max]"]
    assert lead.value == found["dictionary", "probe_accuracy[k=1,max]"].value - 1


@pytest.mark.parametrize("arm", ["mean_difference", "linear_probe"])
def test_a_labels_own_direction_is_a_probe_on_one_column(arm):
    found = probing(world())
    for pool in ("max", "mean"):
        assert found[arm, f"probe_auc[k=1,{pool}]"].value == pytest.approx(1)
        assert found["dictionary", f"probe_auc_over({arm})[k=1,{pool}]"].value == pytest.approx(0)
        assert (arm, f"probe_auc[k=2,{pool}]") not in found
    chance = probing(world(shuffled=True))
    assert chance[arm, "probe_auc[k=1,max]"].value == pytest.approx(0.5, abs=0.12)
    other = probing(world(), PROBING.model_copy(update={"ks": (2,)}))
    assert (arm, "probe_auc[k=1,max]") in other
    assert ("dictionary", f"probe_auc_over({arm})[k=2,max]") not in other


def test_negative_codes_count_where_two_sides_do():
    store = world(sign=-1)
    two = probing(store)
    one = probing(store, replace_config(PROBING, sides="one"))
    assert two["dictionary", "probe_accuracy[k=1,max]"].value == 1
    assert one["dictionary", "probe_accuracy[k=1,max]"].value < 0.9


@pytest.mark.parametrize("score", [probing, concepts])
def test_scores_do_not_depend_on_how_rows_are_batched(score):
    config = replace_config(PROBING if score is probing else CONCEPTS, per_label=2)
    store = world(n=150, noise=2.0)
    first, *others = (score(store, replace_config(config, batch=b)) for b in (5, 64, 100_000))
    for other in others:
        assert other.keys() == first.keys()
        for key, row in first.items():
            assert other[key].value == pytest.approx(row.value, abs=1e-9), key
            assert other[key].standard_error == pytest.approx(row.standard_error, abs=1e-9)


@pytest.mark.parametrize("kind", [ProbingEvaluator, ConceptsEvaluator])
def test_what_is_kept_between_dictionaries_changes_no_number(kind):
    config = PROBING if kind is ProbingEvaluator else CONCEPTS
    config = replace_config(config, resamples=5, per_label=2)
    store, other = world(n=120, noise=2.0), world(n=120, noise=1.0, seed=3)
    shared = kind(config, SITE)
    for each in (store, store, other):
        assert list(shared(Reads(6), each)) == list(kind(config, SITE)(Reads(6), each))


# ----------------------------------------------------------------------------------------- concepts


def test_a_perfect_latent_is_found_and_detects_perfectly():
    found = concepts(world())
    for arm in ("dictionary", "raw", "mean_difference", "linear_probe"):
        row = found[arm, "concept_auc[max]"]
        assert row.value == 1 and row.standard_error == 0
        assert found[arm, "concept_auc[mean](class 1)"].value == 1
        assert found[arm, "snmf_score"].value > 0.3
        assert found[arm, "snmf_clamped"].value == 0
        assert found[arm, "snmf_positive"].value == 1
    for c in range(3):
        assert found["dictionary", f"concept_latent[max](class {c})"].value == c
    assert found["dictionary", "concept_candidates[max]"].value == 12
    assert found["mean_difference", "concept_candidates[max]"].value == 2
    assert found["dictionary", "concept_auc_over(raw)[max]"].value == 0
    assert found["bag_of_words", "concept_auc[max]"].value < 1
    assert ("bag_of_words", "snmf_score") not in found


def test_a_negative_latent_is_found_as_its_opposite():
    store = world(sign=-1)
    found = concepts(store)
    assert found["dictionary", "concept_auc[max]"].value == 1
    assert found["dictionary", "concept_latent[max](class 1)"].unit == "latent, opposite"
    assert found["dictionary", "snmf_score"].value > 0.3
    one = concepts(store, replace_config(CONCEPTS, sides="one"))
    assert one["dictionary", "concept_auc[max]"].value < 0.9
    assert one["dictionary", "concept_candidates[max]"].value == 6


def test_the_best_of_many_is_at_chance_under_shuffled_labels():
    store = world(n=1500, d=40, shuffled=True)
    found = concepts(store, replace_config(CONCEPTS, resamples=200))
    for arm in ("dictionary", "random_directions", "mean_difference", "linear_probe"):
        for how in ("max", "mean"):
            row = found[arm, f"concept_auc[{how}]"]
            assert abs(row.value - 0.5) < 4 * row.standard_error
            assert 0.005 < row.standard_error < 0.1
    score = found["dictionary", "snmf_score"]
    assert abs(score.value) < 4 * score.standard_error


def test_random_directions_of_each_kind_stand_beside_a_latent():
    found = concepts(world())
    assert found["covariance_directions", "concept_candidates[max]"].value == 12
    assert found["shuffled_labels", "concept_candidates[max]"].value == 40  # 20 a label, two sides
    for arm in ("covariance_directions", "shuffled_labels"):
        for metric in ("snmf_score", "concept_auc[mean]", "concept_auc[max](class 2)"):
            assert (arm, metric) in found
        assert ("dictionary", f"concept_auc_over({arm})[max]") in found
    # variance along a single axis: all draws lie along it, so that only its label is told
    g = torch.Generator().manual_seed(0)
    store = world(noise=1e-3)
    x = store._x[SITE]
    x[:, 1:] *= 1e-3
    alone = concepts(store, dictionary=Reads(6))
    assert alone["covariance_directions", "concept_auc[max](class 0)"].value == 1
    noise = Texts(torch.randn(300 * WINDOW, 6, generator=g), world().labels)
    for arm in ("covariance_directions", "shuffled_labels"):
        row = concepts(noise, replace_config(CONCEPTS, resamples=200))[arm, "concept_auc[mean]"]
        assert abs(row.value - 0.5) < 4 * row.standard_error


def test_drawn_candidates_are_as_many_for_every_arm():
    config = replace_config(CONCEPTS, candidates=4)
    found = concepts(world(), config)
    for arm in ("dictionary", "raw", "random_directions", "covariance_directions"):
        assert found[arm, "concept_candidates[max]"].value == 8
    assert found == concepts(world(), config)


def test_the_snmf_score_is_the_log_ratio_of_mean_largest_cosines_clamped():
    n = 200
    x = torch.zeros(n, WINDOW, 3)
    x[..., 2] = 1
    of = torch.arange(n) % 2
    x[of == 0, 3, 0] = 1
    store = Texts(x.flatten(0, 1), ["a" if c == 0 else "b" for c in of.tolist()])
    found = concepts(store)
    # documents of a: largest cosine with the first axis is 1/√2; of b it is 0, raised to .001
    expected = torch.tensor(0.5**0.5 / 1e-3).log()
    assert found["raw", "snmf_score(a)"].value == pytest.approx(float(expected), abs=1e-5)
    assert found["raw", "snmf_clamped"].value > 0
    # b has no axis: what is chosen for it lies along neither, both means are raised, and log 1 = 0
    assert found["raw", "snmf_positive"].value == 0.5
    assert ("raw", "snmf_positive(a)") not in found


def test_a_share_above_zero_leaves_out_what_a_resample_does_not_know():
    drawn = torch.tensor([[1.0, -1.0, 0.0], [torch.nan, -2.0, 3.0], [1.0, 1.0, 1.0]])
    found = Measured(torch.tensor([0.2, -0.1, 0.0]), drawn).positive.mean
    torch.testing.assert_close(found.values, torch.tensor([1 / 3]))
    torch.testing.assert_close(found.replicates[:, 0], torch.tensor([1 / 3, 1 / 2, 1]))


# --------------------------------------------------------------------------------------- supervised


def supervised(method, store, d_sae=3):
    made = dictionaries.create(
        {"type": "supervised", "d_in": store.width(SITE), "d_sae": d_sae, "method": method}
    )
    assert isinstance(made, Supervised)
    state = made.start(store, torch.Generator().manual_seed(0))
    again = made.restore(store, state.tensors())
    while not state.done:
        state = made.advance(store, state)
    assert torch.equal(made.advance(store, again).directions, state.directions)
    assert torch.equal(made.restore(store, state.tensors()).directions, state.directions)
    assert made.advance(store, state) is state
    made.finish(state)
    return made


@pytest.mark.parametrize("method", ["mean_difference", "mean_features", "linear_probe"])
def test_supervised_directions_detect_their_labels_in_order(method):
    store = world()
    made = supervised(method, store)
    torch.testing.assert_close(made.W_dec.norm(dim=1), torch.ones(3))
    assert made.W_dec.argmax(1).tolist() == [0, 1, 2]
    lesson = made.start(store, torch.Generator())
    assert 0 < lesson.loss < 0.1
    assert made.start(world(shuffled=True), torch.Generator()).loss > 0.9
    found = concepts(store, dictionary=made)
    assert found["dictionary", "concept_auc[max]"].value == 1
    assert found["dictionary", "concept_latent[max](class 2)"].value == 2


def test_mean_features_rebuild_document_means_and_equal_least_squares():
    store = world(noise=0.0, d=3)
    made = supervised("mean_features", store)
    same = supervised("least_squares", store)
    torch.testing.assert_close(made.W_dec, same.W_dec)
    means = store.rows(SITE, torch.arange(store.n_rows)).reshape(300, WINDOW, 3).mean(1)
    train = torch.arange(300) % 5 != 4
    torch.testing.assert_close(made.b_dec, means[train].mean(0))
    codes = made.encode(means)
    assert (codes.argmax(1) == torch.arange(300) % 3).all()


def test_another_number_of_labels_is_refused_and_the_right_one_named():
    with pytest.raises(ConfigError, match="set d_sae to 3"):
        supervised("mean_difference", world(), d_sae=4)


def replace_config(config, **changes):
    return type(config).parse(config.plain() | changes)
