"""Task data that is made of bare token ids, for tests."""

import torch

from saelab.circuits.tasks import TaskData, draw
from saelab.models.handwired import WORDS, induction_model, inhibition_model


def random_pairs(model, n=6, *, metric="logit_difference", seed=0) -> TaskData:
    """Random prompts of 5 and 8 tokens, corrupted from position 3 on; the answers are those that
    the corruption moves most."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([5, 8]).repeat(n)[:n]
    clean, off_task = (torch.randint(3, model.d_vocab, (n, 8), generator=g) for _ in range(2))
    corrupted = clean.clone()
    corrupted[:, 3:] = torch.randint(3, model.d_vocab, (n, 5), generator=g)
    last = torch.arange(n), lengths - 1
    corrupted[last] = clean[last]
    pad = torch.arange(8) >= lengths[:, None]
    clean, corrupted, off_task = (x.masked_fill(pad, 0) for x in (clean, corrupted, off_task))
    moved = (model.logits(clean) - model.logits(corrupted))[last]
    return TaskData(
        name="random",
        metric=metric,
        clean=clean,
        corrupted=corrupted,
        unpredictable=corrupted,
        off_task=off_task,
        lengths=lengths,
        right=moved.topk(2).indices,
        wrong=(-moved).topk(1).indices,
        templates=torch.arange(n) % 2,
        slots={"middle": lengths - 2, "late": torch.where(lengths == 8, 6, -1), "end": lengths - 1},
        attributes={"kind": tuple("ab"[i % 2] for i in range(n))},
    )


def induction(n=12, *, sharpness=1e3, seed=0):
    """The hand-wired induction model and prompts for it."""
    model = induction_model(WORDS, sharpness=sharpness)
    return model, draw("induction", model, n, seed=seed)


def inhibition(n=12, *, seed=0):
    """The hand-wired inhibition model, and prompts A B B → A beside B A B → A."""
    model = inhibition_model(WORDS, at=2)
    g = torch.Generator().manual_seed(seed)
    a, b = torch.stack([torch.randperm(len(WORDS), generator=g)[:2] for _ in range(n)]).T
    third = (a + b + 1) % len(WORDS)
    order = (torch.arange(n) % 2 == 0)[:, None]
    names = torch.where(order, torch.stack([a, b], 1), torch.stack([b, a], 1))

    def prompt(last):
        return torch.cat([names, last[:, None]], 1)

    place = torch.where(order[:, 0], 0, 1)
    return model, TaskData(
        name="inhibition",
        metric="logit_difference",
        clean=prompt(b),
        corrupted=prompt(a),
        unpredictable=prompt(third),
        off_task=prompt(third).flip(1),
        lengths=torch.full((n,), 3),
        right=a[:, None],
        wrong=b[:, None],
        templates=torch.arange(n) % 2,
        slots={"io": place, "s1": 1 - place, "s2": torch.full((n,), 2), "end": torch.full((n,), 2)},
        attributes={"order": tuple("AB"[i % 2] for i in range(n))},
    )
