"""Labelled documents with planted signals, and dictionaries that read them: for perturbation."""

import torch
from doubles import Texts

from saelab import dictionaries

WINDOW = 16
COMBINATIONS = ("a/x", "a/y", "b/x", "b/y")


def dictionary(W, *, kind="topk"):
    """A dictionary that keeps all its codes x Wᵀ: of either sign, or the positive ones."""
    W = torch.as_tensor(W).float()
    config = {"type": kind, "d_in": W.shape[1], "d_sae": len(W), "k": len(W)}
    made = dictionaries.create(config)
    with torch.no_grad():
        for own, value in ((made.W_dec, W), (made.W_enc, W), (made.b_enc, 0), (made.b_dec, 0)):
            own.copy_(torch.as_tensor(value))
    return made


def labelled(signals, names, *, n=200, noise=0.1, seed=0):
    """Documents of each class in turn: one row in four holds its signal, all hold noise."""
    g = torch.Generator().manual_seed(seed)
    signals = torch.tensor(signals).float()
    of = torch.arange(n) % len(signals)
    x = noise * torch.randn(n, WINDOW, signals.shape[1], generator=g)
    x[:, ::4] += 4 * signals[of][:, None]
    return Texts(x.flatten(0, 1), [names[c] for c in of.tolist()])


def table(rows):
    return {(row.arm, row.name): row for row in rows}


def confounded(first, second, *, n=400, noise=0.1, seed=0):
    """Documents of two attributes, each with its signal, of either sign."""
    signals = [
        [u * s + v * t for s, t in zip(first, second, strict=True)]
        for u in (1, -1)
        for v in (1, -1)
    ]
    return labelled(signals, COMBINATIONS, n=n, noise=noise, seed=seed)
