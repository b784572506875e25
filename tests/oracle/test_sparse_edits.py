"""Edits of few latents: against trying every latent, and where the answer is known."""

import pytest
import torch

from saelab.circuits.attributes import Coding
from saelab.circuits.sparse_edits import (
    NONE,
    greedy_edit,
    guided_edit,
    magnitude,
    weights,
    whole_edit,
)
from saelab.errors import ShapeError


def random_coding(generator, n=7, m=9, d=5):
    z = torch.randn(n, m, generator=generator)
    z = torch.where(torch.rand(n, m, generator=generator) < 0.5, 0, z)
    return Coding(z, torch.randn(m, d, generator=generator), torch.randn(d, generator=generator))


def slow_edit(z_s, z_t, W, goal, k):
    """One row, one latent at a time, every one whose code differs tried."""
    current, taken = torch.zeros_like(goal), []
    for _ in range(k):
        free = [i for i in range(len(W)) if i not in taken and z_s[i] != z_t[i]]
        if not free:
            break
        best = min(free, key=lambda i: float((goal - current - (z_t[i] - z_s[i]) * W[i]).norm()))
        current = current + (z_t[best] - z_s[best]) * W[best]
        taken.append(best)
    return current, taken


def test_greedy_edits_are_those_of_trying_every_latent():
    generator = torch.Generator().manual_seed(0)
    source = random_coding(generator)
    z = random_coding(generator).z
    target = Coding(
        torch.where(torch.rand(7, 9, generator=generator) < 0.3, source.z, z), source.W, source.b
    )
    goal = torch.randn(7, 5, generator=generator)
    for k, edit in enumerate(greedy_edit(source, target, goal, 6), 1):
        for row in range(7):
            change, taken = slow_edit(source.z[row], target.z[row], source.W, goal[row], k)
            torch.testing.assert_close(edit.change[row], change)
            assert [i for i in edit.latents[row].tolist() if i != NONE] == taken


def test_with_enough_latents_the_edit_is_the_difference_of_the_reconstructions():
    generator = torch.Generator().manual_seed(1)
    source = random_coding(generator)
    target = Coding(random_coding(generator).z, source.W, source.b)
    edit = greedy_edit(source, target, torch.randn(7, 5, generator=generator), 9)[-1]
    torch.testing.assert_close(edit.change, target.x_hat - source.x_hat)
    torch.testing.assert_close(magnitude(source, edit), torch.ones(7))


def test_a_latent_that_stays_as_it_is_is_never_taken():
    """The one latent that changes leads away from the goal, the other two would do no harm."""
    W, b = torch.eye(3), torch.zeros(3)
    source, target = (Coding(torch.tensor([[z, 1.0, 2.0]]), W, b) for z in (1.0, 0.0))
    for edit in greedy_edit(source, target, torch.tensor([[1.0, 0.0, 0.0]]), 2):
        assert edit.latents[0].tolist()[:1] == [0] and edit.change.tolist() == [[-1.0, 0.0, 0.0]]
        assert float(magnitude(source, edit)) == pytest.approx(1 / 6)
    whole = whole_edit(source, target)
    assert whole.latents.tolist() == [[0]] and whole.change.tolist() == [[-1.0, 0.0, 0.0]]


def test_the_whole_edit_is_the_greedy_one_with_enough_latents():
    generator = torch.Generator().manual_seed(6)
    source = random_coding(generator)
    target = Coding(random_coding(generator).z, source.W, source.b)
    whole, greedy = (
        whole_edit(source, target),
        greedy_edit(source, target, torch.randn(7, 5, generator=generator), 9)[-1],
    )
    torch.testing.assert_close(whole.change, greedy.change)
    torch.testing.assert_close(magnitude(source, whole), magnitude(source, greedy))


def slow_guided(source, target, about_source, about_target, k):
    """One row: the latents that fire, those with the best scores first."""
    change = torch.zeros(source.W.shape[1])
    taken = []
    for sign, coding, about in ((-1, source, about_source), (1, target, about_target)):
        fires = [i for i, score in enumerate(about.tolist()) if score > -float("inf")]
        for i in sorted(fires, key=lambda i: -float(about[i]))[:k]:
            change = change + sign * coding.z[0, i] * coding.W[i]
            taken += [i] if sign < 0 else []
    return change, taken


def test_guided_edits_exchange_the_latents_that_say_most():
    generator = torch.Generator().manual_seed(7)
    source = random_coding(generator)
    target = Coding(random_coding(generator).z, source.W, source.b)
    about = [
        torch.rand(7, 9, generator=generator).where(coding.z != 0, -torch.inf)
        for coding in (source, target)
    ]
    for k in (1, 3, 9):
        edit = guided_edit(source, target, *about, k)
        for i in range(7):
            row = [Coding(c.z[[i]], c.W, c.b) for c in (source, target)]
            change, taken = slow_guided(*row, about[0][i], about[1][i], k)
            torch.testing.assert_close(edit.change[i], change)
            assert [latent for latent in edit.latents[i].tolist() if latent != NONE] == taken
    torch.testing.assert_close(edit.change, target.x_hat - source.x_hat)


def test_weights_sum_to_one_and_an_empty_code_has_none():
    coding = random_coding(torch.Generator().manual_seed(2))
    torch.testing.assert_close(weights(coding).sum(1), torch.ones(7))
    empty = Coding(torch.zeros(2, 9), coding.W, coding.b)
    assert not weights(empty).any()
    with pytest.raises(ShapeError, match="coded alike"):
        greedy_edit(coding, empty, torch.zeros(7, 5), 1)
