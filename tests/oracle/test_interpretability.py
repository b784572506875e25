"""What latents say of the attributes of drawn prompts, whose templates come in turn."""

from unittest import mock

import pytest
import torch
from doubles import WordTokenizer

from saelab.circuits import examples
from saelab.circuits.attributes import attributes_of, fit_features
from saelab.circuits.coders import ByLabels, Labelled
from saelab.circuits.interpretability import Interpretability
from saelab.circuits.label_rows import SUPERVISED
from saelab.circuits.tasks import draw

NAMES = ("Ann", "Bob", "Cid", "Dan", "Eve", "Flo", "Gus", "Hal")


@pytest.fixture(scope="module")
def of_labels():
    """Prompts of eight names, and the labels' own features on random vectors."""
    with mock.patch.object(examples, "_NAMES", NAMES):
        data = draw("ioi", WordTokenizer(), 320, seed=0)
    attributes = attributes_of(data)
    table = attributes.table(data.attributes)
    x = torch.randn(len(data), 1, 12, generator=torch.Generator().manual_seed(0))
    labels = ByLabels((fit_features(x[:, 0], table, "mean_features"),))
    return Interpretability(
        attributes, Labelled(data, x, table), ("end",), labels, [1.0, 0.0], 0.6, seed=0
    )


def test_labels_say_all_of_every_attribute_of_drawn_prompts(of_labels):
    coder = of_labels.labels
    said = of_labels.claims(coder)
    found = {row.name: row for row in of_labels.rows(SUPERVISED, coder, said)}
    for attribute in ("io", "subject", "order"):
        for what in ("f1", "found", "parts", "parts_recall"):
            assert found[f"{what}[{attribute}]@end"].value == 1, (what, attribute)
    assert of_labels.interpretable(coder, said)[0].all()


def test_rows_say_on_how_many_prompts_and_how_surely(of_labels):
    coder = of_labels.labels
    rows = {row.name: row for row in of_labels.rows(SUPERVISED, coder, of_labels.claims(coder))}
    assert {row.n for name, row in rows.items() if not name.startswith("norm")} == {160}
    assert {row.n for name, row in rows.items() if name.startswith("norm")} == {320}
    assert rows["f1[order]@end"].standard_error == 0
    joined = rows["f1[io ∧ order]@end"]
    assert 0.5 < joined.value < 0.8 and 0 < joined.standard_error < 0.05
    assert rows["f1[in sentence]@end"].standard_error > 0
    assert "f1[∪ order]@end" not in rows and rows["f1[∪ io]@end"].value == 1


def test_a_claim_about_a_value_is_looked_up_for_each_prompts_own_value(of_labels):
    prompts, coder = of_labels.prompts, of_labels.labels
    said, z = of_labels.claims(coder)[0], prompts.table[:5].float()
    guide = of_labels.guide("io", said)
    about = of_labels.about("io", guide, prompts.table[:5], z, signed=False)
    own = of_labels.attributes.of("io")
    for row in range(5):
        best = int(prompts.table[row, own].int().argmax())
        assert int(about[row].argmax()) == own[best] and float(about[row].max()) == 1
        assert torch.equal(about[row].isfinite(), prompts.table[row])
    both = of_labels.guide("io", torch.cat([said, ~said], 1))
    turned = of_labels.about("io", both, prompts.table[:5], -z, signed=True)
    assert torch.equal(turned.isfinite(), prompts.table[:5])
    assert float(turned.max()) < 1


def test_one_name_in_two_orders_is_a_predicate_of_its_own(of_labels):
    """Codes that fire for one name in one order, and for it anywhere in the sentence."""
    joined, mentioned = (of_labels.predicates[kind] for kind in ("io ∧ order", "in sentence"))
    rows = {row.name: row for row in of_labels.rows("codes", of_labels.labels, [joined])}
    assert rows["f1[io ∧ order]@end"].value == 1 and rows["f1[io]@end"].value < 1
    rows = {row.name: row for row in of_labels.rows("codes", of_labels.labels, [mentioned])}
    assert rows["f1[in sentence]@end"].value == 1 and rows["f1[subject]@end"].value < 1
