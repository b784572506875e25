"""Principled evaluations at both ends, on activations that are sums of what labels say."""

from dataclasses import replace

import pytest
import torch
from circuit_toys import BRANCH, FIRST, LAST, BareModel, linear_codes, linear_model
from doubles import WordTokenizer
from sklearn.metrics import f1_score
from torch import Tensor, nn

from saelab.circuits.attributes import (
    Attributes,
    Supervised,
    attributes_of,
    counterfactual,
    fit_features,
)
from saelab.circuits.bases import Basis, principal_directions
from saelab.circuits.coders import ByLabels
from saelab.circuits.label_rows import SUPERVISED
from saelab.circuits.predicates import (
    IN_SENTENCE,
    best_claims,
    best_unions,
    claims,
    f1,
    f1s,
    mean_f1,
    predicates,
    share_found,
    splitting,
    tallies,
)
from saelab.circuits.strata import portion
from saelab.circuits.supervised import SupervisedConfig, SupervisedEvaluation
from saelab.circuits.tasks import TaskData, draw
from saelab.circuits.vectors import Swap, choose_slots, in_every_layer, outcome, vectors
from saelab.errors import ArtifactError, ConfigError, TaskError
from saelab.models.hooks import Point
from saelab.types import SiteInfo

D, VOCAB, SITE, NEXT = 8, 12, "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
IOS, SUBJECTS = (2, 3, 4, 5), (6, 7, 8, 9)


class _Gather(nn.Module):
    """At each position, the sum of what all positions so far say, each through its own matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Parameter(torch.empty(5, D, D))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("npd,pde->npe", x, self.maps[: x.shape[1]]).cumsum(1)


def additive_model() -> BareModel:
    """x_end = Σ_p M_p E[token_p]; logits from a tanh of it, and so not linear.

    The second block does nothing.
    """
    block, idle = _Gather(), nn.Identity()
    readout = (nn.Linear(D, 32), nn.Tanh(), nn.Linear(32, VOCAB))
    network = nn.Sequential(nn.Embedding(VOCAB, D), block, idle, *readout)
    points = [
        Point(SiteInfo(site, D, layer, "resid"), module, "out")
        for layer, (site, module) in enumerate([(SITE, block), (NEXT, idle)])
    ]
    return BareModel("additive", network, points, D, VOCAB)


def prompts(model: BareModel, copies: int = 1) -> TaskData:
    """Every pair of a value of `io` and one of `subject`; right is the model's likeliest answer,
    wrong its least likely one."""
    pairs = [(io, s) for io in IOS for s in SUBJECTS for _ in range(copies)]
    clean = torch.tensor([[0, io, s, s, 1] for io, s in pairs])
    corrupted = torch.tensor([[0, io, s, io, 1] for io, s in pairs])
    logits = model.logits(clean)[:, -1]
    n = len(pairs)
    return TaskData(
        name="ioi", metric="logit_difference", clean=clean, corrupted=corrupted,
        unpredictable=corrupted, off_task=corrupted, lengths=torch.full((n,), 5),
        right=logits.argmax(1, keepdim=True), wrong=logits.argmin(1, keepdim=True),
        templates=torch.zeros(n, dtype=torch.int64),
        slots={s: torch.full((n,), i) for i, s in enumerate(("", "io", "s1", "s2", "end")) if s},
        attributes={
            "io": tuple(str(io) for io, _ in pairs), "subject": tuple(str(s) for _, s in pairs)
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return additive_model()


class Silent:
    """A dictionary that never says anything: every reconstruction is its bias."""

    def __init__(self, bias: Tensor) -> None:
        self.W_dec, self.b_dec, self.d_in, self.d_out, self.d_sae = torch.eye(D), bias, D, D, D

    def encode(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@pytest.fixture(scope="module")
def scores(model):
    fit, test = prompts(model, 2), prompts(model)
    config = SupervisedConfig(budgets=[1, 2, 2 * D], moved=0.9)
    evaluation = SupervisedEvaluation(model, SITE, fit, test, config, seed=1)
    x = evaluation.fit.x[:, 0]
    arms = {
        "basis": principal_directions(x),
        "silent": Silent(x.mean(0)),
        "off": Silent(x.mean(0) + 1),
    }
    rows = list(evaluation.rows(arms))
    assert evaluation.section.slots == ("end",)
    return {(row.arm, row.name): row for row in rows}, evaluation


# ------------------------------------------------------------------------------------- the two ends


def test_additive_activations_are_all_that_labels_say(scores):
    found, _ = scores
    for name in ("sufficiency", "necessity", "agreement[io, k=2]", "agreement[subject, k=2]",
                 "f1[io]@end", "f1[subject]@end", "found[io]@end", "parts[subject]@end",
                 "parts_recall[io]@end", "sufficiency[F1 ≥ 0.6]",
                 "necessity[F1 ≥ 0.6]"):  # fmt: skip
        assert found[SUPERVISED, name].value == pytest.approx(1, abs=1e-4), name
    for name in ("moved", f"moved[{SITE}]", f"moved[{NEXT}]"):
        assert found[SUPERVISED, name].value == pytest.approx(1, abs=1e-4)
        assert found[SUPERVISED, name].standard_error == pytest.approx(0, abs=1e-4)
    assert found[SUPERVISED, "latents[F1 ≥ 0.6]"].value == 8
    for name in ("io", "subject"):
        for what in ("agreement", "magnitude", "edit_score"):
            guided = found[SUPERVISED, f"{what}[{name}, F1, k=1]"]
            assert guided.value == found[SUPERVISED, f"{what}[{name}, k=2]"].value
        none = found["none", f"agreement[{name}]"].value
        assert found["silent", f"agreement[{name}, F1, k=4]"].value == none
    assert found[SUPERVISED, "norm[io]@end"].value > 0


def test_a_dictionary_without_error_is_sufficient_and_its_whole_edit_agrees(scores):
    found, _ = scores
    assert found["basis", "sufficiency"].value == pytest.approx(1, abs=1e-4)
    assert found["basis", "necessity"].value == pytest.approx(1, abs=1e-4)
    for attribute in ("io", "subject"):
        assert found["basis", f"agreement[{attribute}, k={2 * D}]"].value == 1
        assert found["basis", f"magnitude[{attribute}, k={2 * D}]"].value == pytest.approx(1)


def test_a_dictionary_that_says_nothing_has_nothing(scores):
    found, evaluation = scores
    ablated = float(evaluation.ablated.metric.sum() / evaluation.clean.metric.sum())
    assert found["silent", "sufficiency"].value == pytest.approx(ablated, abs=1e-4)
    assert found["silent", "necessity"].value == pytest.approx(0, abs=1e-4)
    assert found["silent", "f1[io]@end"].value == 0
    for attribute in ("io", "subject"):
        none = found["none", f"agreement[{attribute}]"].value
        assert none < 0.8
        assert found["silent", f"agreement[{attribute}, k=2]"].value == none
        assert found["silent", f"edit_score[{attribute}, k=2]"].value == 0
        assert found[SUPERVISED, f"edit_score[{attribute}, k=2]"].value == 1


def test_removing_no_latent_changes_nothing_whatever_the_bias(scores):
    found, _ = scores
    for arm in ("silent", "off"):
        assert found[arm, "latents[F1 ≥ 0.6]"].value == 0
        assert found[arm, "necessity[F1 ≥ 0.6]"].value == 0


def test_what_a_longer_attribute_hides_is_looked_for_in_every_dictionary(scores):
    found, _ = scores
    size = {a: found[SUPERVISED, f"norm[{a}]@end"].value for a in ("io", "subject")}
    shorter, longer = sorted(size, key=size.__getitem__)
    for arm in ("basis", "silent"):
        curve = [
            found[arm, f"f1[{shorter}]@end | α({longer})={a}"].value for a in ("1", "0.5", "0")
        ]
        assert curve[0] == found[arm, f"f1[{shorter}]@end"].value
        assert set(curve) == {0} or arm == "basis"
    names = [name for arm, name in found if " | α(" in name]
    assert len(names) == 3 * 5 and not any(f"f1[{longer}]" in name for name in names)


def test_the_labels_edit_takes_one_feature_out_and_puts_one_in_whatever_the_features(model):
    """Features of chance lead away from the patch, so any other edit would be nearer to it."""
    config = SupervisedConfig(budgets=[1], slots=["end"], least_gap=1e-9)
    evaluation = SupervisedEvaluation(model, SITE, prompts(model, 2), prompts(model), config)
    noise = torch.randn(8, D, generator=torch.Generator().manual_seed(5))
    features = Supervised(noise, evaluation.fit.x[:, 0].mean(0))
    evaluation.labels = ByLabels((features,))
    found = {row.name: row for row in evaluation.rows({}) if row.arm == SUPERVISED}
    test, columns = evaluation.test, evaluation.attributes.columns
    for name, changed in evaluation.edits.items():
        rows = range(len(test.data))
        was, now = (
            [columns.index((name, prompts.attributes[name][i])) for i in rows]
            for prompts in (test.data, changed.prompts.data)
        )
        x = test.x[:, 0] - noise[was] + noise[now]
        answer = outcome(model, test.data, SITE, ["end"], x[:, None]).answer
        said = test.table.float() @ noise
        share = (noise[was] * said).sum(1) / said.square().sum(1)
        assert found[f"agreement[{name}, k=2]"].value == (answer == changed.answer).double().mean()
        assert found[f"magnitude[{name}, k=2]"].value == pytest.approx(float(share.mean()))


def test_no_score_where_the_supervised_edit_adds_too_little(model):
    config = SupervisedConfig(budgets=[1], least_gap=1.0, slots=["end"])
    evaluation = SupervisedEvaluation(model, SITE, prompts(model, 2), prompts(model), config)
    assert not [row for row in evaluation.rows({}) if row.name.startswith("edit_score")]


# -------------------------------------------------------------------------------------- predicates


def test_f1_is_scikit_learns_and_unions_are_the_best_of_their_values():
    generator = torch.Generator().manual_seed(3)
    fires = torch.rand(40, 6, generator=generator) < 0.4
    values = torch.nn.functional.one_hot(torch.randint(5, (40,), generator=generator), 5).bool()
    table = f1(fires, values)
    unions = best_unions(fires, values, most=3)
    sums = tallies(fires[:, [0, 3]], values[:, [1, 4]]).sum(0, keepdim=True)
    pairs = [f1_score(values[:, 1], fires[:, 0]), f1_score(values[:, 4], fires[:, 3])]
    assert f1s(sums)[0].tolist() == pytest.approx(pairs)
    assert float(mean_f1(sums)) == pytest.approx(sum(pairs) / 2)
    assert float(share_found(sums)) == sum(pair >= 0.5 for pair in pairs) / 2
    for i in range(6):
        single = [f1_score(values[:, j], fires[:, i]) for j in range(5)]
        assert table[i].tolist() == pytest.approx(single)
        order = sorted(range(5), key=lambda j: -single[j])
        united = [f1_score(values[:, order[:n]].any(1), fires[:, i]) for n in (1, 2, 3)]
        assert float(unions.score[i]) == pytest.approx(max(united))
        members = values[:, unions.members[i]].any(1)
        assert f1_score(members, fires[:, i]) == pytest.approx(float(unions.score[i]))


def test_all_values_together_are_no_union():
    """A latent that always fires says nothing of which of two values there is."""
    values = torch.tensor([[True, False], [False, True]]).repeat(4, 1)
    always = torch.ones(8, 1, dtype=torch.bool)
    unions = best_unions(always, values)
    assert float(unions.score) == pytest.approx(2 / 3) and unions.members.sum() == 1


def test_claims_of_either_sign_are_chosen_on_one_half_and_scored_on_the_other():
    truth = torch.tensor([[True], [True], [False], [False]])
    z = torch.tensor([[-1.0, 1.0], [-2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    said = claims(z, signed=True)
    assert said.shape == (4, 4) and claims(z, signed=False).shape == (4, 2)
    best = best_claims(said, truth, said.flip(0), truth)
    assert best.claim.tolist() == [2]  # latent 0 below zero
    assert best.chosen.tolist() == [1] and best.score.tolist() == [0]


def test_a_value_in_three_parts_is_counted_as_split():
    table = torch.tensor([[True, False]] * 6 + [[False, True]] * 6)
    fires = torch.zeros(12, 4, dtype=torch.bool)
    for part in range(3):
        fires[2 * part : 2 * part + 2, part] = True
    fires[6:, 3] = True
    found = splitting(fires, table)
    assert (found.parts, found.recall) == (2.0, 1.0)
    none = splitting(fires[:, :0], table)
    assert (none.parts, none.recall) == (0.0, 0.0)


def test_predicates_join_values_with_those_of_one_attribute():
    columns = [("io", x) for x in "abc"] + [("order", "ABBA"), ("order", "BABA")]
    table = torch.tensor([[True, False, False, True, False], [False, True, False, False, True]])
    found = predicates(columns, table)
    assert list(found) == ["io", "order", "io ∧ order"]
    assert found["order"].tolist() == table[:, 3:].tolist()
    assert found["io ∧ order"].tolist() == [
        [True, False, False, False, False, False],
        [False, False, False, False, True, False],
    ]


def test_a_name_is_in_the_sentence_as_either_of_two_attributes():
    columns = [("io", "a"), ("io", "b"), ("subject", "b"), ("subject", "c")]
    table = torch.tensor([[True, False, False, True], [True, False, True, False]])
    assert predicates(columns, table)[IN_SENTENCE].tolist() == [[False], [True]]
    assert IN_SENTENCE not in predicates(columns[1:2], table[:, 1:2])


# ----------------------------------------------------------------------------- prompts and features


def test_counterfactuals_differ_in_one_attribute_only():
    tokenizer = WordTokenizer()
    data = draw("ioi", tokenizer, 16, seed=0)

    def text(prompts, row):
        return "".join(tokenizer.to_strings(prompts.clean[row, : prompts.lengths[row]].tolist()))

    for name in ("io", "subject", "order"):
        other = counterfactual(data, name, seed=0)
        again = counterfactual(data, name, seed=0)
        assert torch.equal(other.clean, again.clean)
        for row in range(len(data)):
            now = {key: values[row] for key, values in other.attributes.items()}
            before = {key: values[row] for key, values in data.attributes.items()}
            assert [key for key in now if now[key] != before[key]] == [name]
            assert (text(other, row).count(f" {now['io']}"), text(other, row).count(
                f" {now['subject']}")) == (1, 2)  # fmt: skip
            at_io, at_s1 = int(other.slots["io"][row]), int(other.slots["s1"][row])
            assert (at_io < at_s1) == (now["order"] == "ABBA")
            assert tokenizer.to_strings([int(other.clean[row, at_io])]) == [f" {now['io']}"]


def test_features_of_balanced_attributes_are_the_same_by_both_methods():
    table = Attributes({"a": ("0", "1"), "b": ("0", "1", "2")})
    of = {"a": list("000111"), "b": list("012012")}
    labels = table.table(of)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(4))
    means, squares = (fit_features(x, labels, m) for m in ("mean_features", "least_squares"))
    torch.testing.assert_close(means.code(labels).x_hat, squares.code(labels).x_hat)


def test_slots_are_chosen_by_patching_the_fewest_first(model):
    data = prompts(model)
    section = choose_slots(model, data, SITE, share=0.9)
    assert section.slots == ("end",) and section.moved == pytest.approx(1, abs=1e-4)
    with pytest.raises(ConfigError, match="together move 0%"):
        choose_slots(model, data, SITE, slots=["io"])
    x = vectors(model, data, SITE, ["s2", "end"])
    same = outcome(model, data, SITE, ["s2", "end"], x)
    torch.testing.assert_close(same.metric, outcome(model, data, SITE, ["end"]).metric)


def test_what_a_site_moves_is_what_its_part_of_the_logits_says():
    """In a linear model a branch moves what its own change adds to the logits."""
    linear = linear_model()
    generator = torch.Generator().manual_seed(0)
    clean, corrupted = (torch.randint(VOCAB - 1, (12, 5), generator=generator) for _ in range(2))
    logits = linear.logits(clean)[:, -1]
    data = replace(
        prompts(additive_model()).rows(torch.arange(12)), clean=clean, corrupted=corrupted,
        right=logits.argmax(1, keepdim=True), wrong=logits.argmin(1, keepdim=True),
    )  # fmt: skip
    swap = Swap(linear, data, ["s2", "end"])
    torch.testing.assert_close(swap.moved(LAST, ["end"]), swap.gaps, rtol=1e-4, atol=1e-4)
    assert not swap.moved(LAST, ["s2"]).any()
    branch = [linear.capture(tokens, [BRANCH])[BRANCH][:, -1] for tokens in (clean, corrupted)]
    change = (branch[0] - branch[1]) @ linear.network[-1].weight.T
    expected = (change.gather(1, data.right) - change.gather(1, data.wrong))[:, 0].double()
    torch.testing.assert_close(swap.moved(BRANCH, ["end"]), expected, rtol=1e-4, atol=1e-4)
    share = float(expected.sum() / swap.gaps.sum())
    assert swap.share(BRANCH, ["end"]) == pytest.approx(share, abs=1e-4)
    assert in_every_layer(linear, FIRST) == [FIRST, LAST]
    assert in_every_layer(linear, BRANCH) == [BRANCH]


def test_slots_are_chosen_on_fit_prompts_and_what_they_move_is_said_of_test_prompts(
    model, caplog, monkeypatch
):
    asked = []

    def choose(model, data, *args, **options):
        asked.append(data)
        return choose_slots(model, data, *args, **options)

    monkeypatch.setattr("saelab.circuits.supervised.choose_slots", choose)
    fit, test = prompts(model, 2), prompts(model, 4)
    config = SupervisedConfig(budgets=[1], slots=["s2", "end"], pairs=16)
    evaluation = SupervisedEvaluation(model, SITE, fit, test, config, seed=3)
    chosen = fit.rows(portion(fit.templates, 16, seed=3).nonzero()[:, 0])
    assert [data.clean.tolist() for data in asked] == [chosen.clean.tolist()]
    assert evaluation.section.slots == ("end",)
    swap = Swap(model, test, ["end"])
    row = next(row for row in evaluation.rows({}) if row.name == "moved")
    assert (row.n, row.value) == (64, pytest.approx(swap.share(SITE, ["end"])))
    assert not caplog.text
    evaluation.config = config.model_copy(update={"moved": 1.1})
    next(evaluation.rows({}))
    assert "on test prompts" in caplog.text


def test_slots_are_not_chosen_on_a_gap_within_noise(model):
    """Corrupted prompts are other clean ones: gaps of either sign."""
    data = prompts(model)
    same = replace(data, corrupted=data.clean)
    mixed = replace(data, corrupted=data.clean.roll(4, 0), wrong=data.right.roll(4, 0))
    noisy = replace(mixed, right=data.wrong)
    for within_noise in (same, noisy):
        with pytest.raises(TaskError, match="within noise"):
            choose_slots(model, within_noise, SITE)


def test_a_share_of_a_metric_within_noise_is_left_out(model, caplog):
    config = SupervisedConfig(budgets=[1], slots=["end"])
    evaluation = SupervisedEvaluation(model, SITE, prompts(model, 2), prompts(model), config)
    sign = torch.tensor([1.0, -1.0]).repeat(8).double()
    evaluation.clean = replace(evaluation.clean, metric=sign)
    evaluation.ablated = replace(evaluation.ablated, metric=sign - 1)
    names = {row.name for row in evaluation.rows({})}
    assert "necessity" in names and "necessity[F1 ≥ 0.6]" in names
    assert not {name for name in names if name.startswith("sufficiency")}
    evaluation.ablated = replace(evaluation.ablated, metric=torch.zeros(16).double())
    names = {row.name for row in evaluation.rows({})}
    assert "agreement[io, k=2]" in names
    assert not {name for name in names if name.startswith(("sufficiency", "necessity"))}
    assert caplog.text.count("sufficiency is left out") == 2
    assert caplog.text.count("necessity is left out") == 1


def test_bad_input_is_refused(model):
    data = draw("induction", WordTokenizer(), 4, seed=0)
    with pytest.raises(ConfigError, match="no attributes"):
        attributes_of(data)
    with pytest.raises(ConfigError, match="ioi: io, subject, order"):
        counterfactual(data, "io", seed=0)
    with pytest.raises(ConfigError, match="slot 'verb'"):
        vectors(model, prompts(model), SITE, ["verb"])
    fit = prompts(model, 2)
    evaluation = SupervisedEvaluation(
        model, SITE, fit, prompts(model), SupervisedConfig(slots=["end"], budgets=[1])
    )
    with pytest.raises(ArtifactError, match="width 9"):
        list(evaluation.rows({"odd": linear_codes(0, d=9)}))
    assert isinstance(principal_directions(torch.randn(9, 4)), Basis)
