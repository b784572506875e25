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
