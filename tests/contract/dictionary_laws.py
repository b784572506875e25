"""The laws of ARCHITECTURE.md for one type: each is a function of a registry name."""

from pathlib import Path

import pytest
import torch
from doubles import ArrayStore
from torch import Tensor

from saelab import dictionaries
from saelab.dictionaries.base import BaseDictionary
from saelab.errors import ShapeError
from saelab.protocols import GradientTrained, Solved, Streamed
from saelab.types import Batch

N = 40


def some_rows(d_in: int, seed: int = 1, n: int = N) -> Tensor:
    return 2 * torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed)) + 0.5


def ready(name: str, seed: int = 0) -> BaseDictionary:
    """Return a dictionary as after training: initialised or solved, biases moved, calibrated."""
    dictionary = dictionaries.create(dictionaries.config_class(name).example())
    generator = torch.Generator().manual_seed(seed)
    if isinstance(dictionary, GradientTrained):
        dictionary.init_(some_rows(dictionary.d_in, 2, 256), generator)
    if isinstance(dictionary, Solved):
        store = ArrayStore({"site": some_rows(dictionary.d_in, 2, 256)})
        state = dictionary.start(store, generator)
        while not state.done:
            state = dictionary.advance(store, state)
        dictionary.finish(state)
    if isinstance(dictionary, Streamed):
        rows = some_rows(dictionary.d_in, 2, 256)
        dictionary.begin_(rows.mean(0), rows, len(rows))
        dictionary.partial_fit(batch_of(rows))
    with torch.no_grad():
        for parameter in dictionary.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.rand(parameter.shape, generator=generator))
    if isinstance(dictionary, GradientTrained):
        dictionary.calibrate([batch_of(some_rows(dictionary.d_in, 9, 4000))])
    return dictionary


def batch_of(x: Tensor) -> Batch:
    number = torch.arange(len(x))
    return Batch(x, x, number, number // 8, grad=torch.sin(3 * x))


def rows_law(name: str) -> None:
    """Other rows change no bit at equal batch size, and at most 1e-5 at another."""
    d = ready(name)
    x = some_rows(d.d_in)
    z = d.encode(x)
    other = some_rows(d.d_in, 3)
    other[7] = x[7]
    assert torch.equal(d.encode(other)[7], z[7])
    torch.testing.assert_close(d.encode(x[:3]), z[:3], atol=1e-5, rtol=1e-5)


def affine_law(name: str) -> None:
    """decode(z) is z @ W_dec + b_dec, and reconstruct adds offset − b_dec to it."""
    d = ready(name)
    z = some_rows(d.d_sae)
    torch.testing.assert_close(d.decode(z), z @ d.W_dec + d.b_dec)
    x = some_rows(d.d_in)
    expected = d.decode(d.encode(x)) + d.offset(x) - d.b_dec
    torch.testing.assert_close(d.reconstruct(x), expected, atol=1e-5, rtol=1e-5)


def pure_law(name: str) -> None:
    """Encode, decode and loss change no weight, gradient, grad mode or global randomness."""
    for training in (True, False):
        d = ready(name).train(training)
        before = {k: v.clone() for k, v in d.state_dict().items()}
        x = some_rows(d.d_in)
        for grad in (True, False):
            random = torch.get_rng_state()
            with torch.set_grad_enabled(grad):
                d.decode(d.encode(x))
                d.reconstruct(x)
                d.encode_sparse(x)
                if isinstance(d, GradientTrained):
                    dead = torch.zeros(d.d_sae, dtype=torch.bool)
                    dead[:4] = True
                    first, second = (d.loss(batch_of(x), 0.5, dead).total for _ in range(2))
                    assert torch.equal(first, second)
                assert torch.is_grad_enabled() == grad
            assert torch.equal(random, torch.get_rng_state())
        assert d.training == training
        assert all(torch.equal(before[k], v) for k, v in d.state_dict().items())
        assert all(p.grad is None for p in d.parameters())


def round_trip_law(name: str, folder: Path) -> None:
    """What is loaded encodes bit-identically, and saving it again writes the same bytes."""
    d = ready(name)
    d.save(folder / "a")
    loaded = dictionaries.load(folder / "a")
    loaded.save(folder / "b")
    x = some_rows(d.d_in)
    assert torch.equal(loaded.encode(x), d.encode(x))
    assert loaded.config == d.config
    for file in (folder / "a").iterdir():
        assert file.read_bytes() == (folder / "b" / file.name).read_bytes()


def sparse_law(name: str) -> None:
    """encode_sparse is encode, without stored zeros or repeats, and decodes to the same."""
    d = ready(name)
    x = some_rows(d.d_in)
    latents, z = d.encode_sparse(x), d.encode(x)
    assert torch.equal(latents.dense(), z)
    assert torch.equal(latents.l0(), (z != 0).sum(-1))
    assert (latents.values != 0).all()
    torch.testing.assert_close(d.decode(latents), d.decode(z), atol=1e-5, rtol=1e-5)


def budget_law(name: str) -> None:
    """No row exceeds l0_bound; a type without one but with a k has it as mean on new rows."""
    d = ready(name)
    l0 = (d.encode(some_rows(d.d_in, n=4000)) != 0).sum(-1)
    if d.l0_bound is not None:
        assert 0 < l0.max() <= d.l0_bound
    elif hasattr(d.config, "k"):
        assert float(l0.float().mean()) == pytest.approx(d.config.k, rel=0.05)


def shape_law(name: str) -> None:
    """Any leading axes, also none and none at all; another width is refused by name."""
    d = ready(name)
    x = some_rows(d.d_in, n=12)
    for lead in ((), (12,), (3, 4), (2, 1, 6), (0,), (2, 0)):
        part = x[0] if lead == () else x[: torch.Size(lead).numel()].reshape(*lead, d.d_in)
        assert d.encode(part).shape == (*lead, d.d_sae)
        assert d.decode(d.encode(part)).shape == (*lead, d.d_out)
        assert d.offset(part).shape == (*lead, d.d_out)
        assert d.reconstruct(part).shape == (*lead, d.d_out)
    assert d.decode(d.encode_sparse(x[:0])).shape == (0, d.d_out)
    torch.testing.assert_close(d.encode(x.reshape(3, 4, -1)), d.encode(x).reshape(3, 4, -1))
    with pytest.raises(ShapeError, match=str(d.d_in)):
        d.encode(some_rows(d.d_in + 1))
    with pytest.raises(ShapeError, match=str(d.d_sae)):
        d.decode(some_rows(d.d_sae + 1))


def dtype_law(name: str) -> None:
    """Results have the weights' dtype and device, whatever x has."""
    d = ready(name)
    x = some_rows(d.d_in)
    for weights in (torch.float32, torch.float64):
        d = d.to(weights)
        for dtype in (torch.float16, torch.float32, torch.float64):
            z = d.encode(x.to(dtype))
            assert z.dtype == d.encode_sparse(x.to(dtype)).values.dtype == weights
            assert d.reconstruct(x.to(dtype)).dtype == weights
            assert z.device == d.W_dec.device


def scale_law(name: str) -> None:
    """fold(s).encode(x) is encode(s·x)/s; folding changes nothing given, and 1 is identity."""
    d = ready(name)
    before = {k: v.clone() for k, v in d.state_dict().items()}
    x = some_rows(d.d_in)
    for s in (0.25, 1.7, 30.0):
        folded = dictionaries.fold(d, s)
        torch.testing.assert_close(folded.encode(x), d.encode(s * x) / s, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            folded.reconstruct(x), d.reconstruct(s * x) / s, atol=1e-5, rtol=1e-5
        )
    assert torch.equal(dictionaries.fold(d, 1.0).encode(x), d.encode(x))
    assert all(torch.equal(before[k], v) for k, v in d.state_dict().items())


def signed_law(name: str) -> None:
    """A latent fires where z ≠ 0, and the loss of a row-wise type counts so."""
    d = ready(name)
    if not isinstance(d, GradientTrained) or d.l0_bound is None:
        return
    x = some_rows(d.d_in)
    z = d.encode(x)
    loss = d.loss(batch_of(x), 0.5, torch.zeros(d.d_sae, dtype=torch.bool))
    assert set(loss.fired.tolist()) == set((z != 0).any(0).nonzero()[:, 0].tolist())
    torch.testing.assert_close(loss.l0, (z != 0).sum(-1).float().mean())


def gradient_law(name: str) -> None:
    """With its support held fixed, encode is differentiable in x."""
    d = ready(name).double()
    x = some_rows(d.d_in, n=4).double()
    probe = torch.randn(4, d.d_in, generator=torch.Generator().manual_seed(5)).double()
    step = 1e-6
    near = [d.encode(x + s * step * probe) for s in (-1, 1)]
    support = d.encode(x) != 0
    calm = ((near[0] != 0) == support).all(-1) & ((near[1] != 0) == support).all(-1)
    assert calm.any()
    x.requires_grad_()
    weight = torch.randn(d.d_sae, generator=torch.Generator().manual_seed(6)).double()
    (grad,) = torch.autograd.grad((d.encode(x) @ weight).sum(), x)
    finite = (near[1] - near[0]) @ weight / (2 * step)
    torch.testing.assert_close((grad * probe).sum(-1)[calm], finite[calm], atol=1e-6, rtol=1e-5)


def revive_law(name: str) -> None:
    """Resampling points the given latents at the given rows and leaves all else as it was."""
    d = ready(name)
    if not isinstance(d, GradientTrained) or type(d).revive_ is GradientTrained.revive_:
        return
    before = {k: v.clone() for k, v in d.state_dict().items()}
    ids, rows = torch.tensor([11, 3, 6]), some_rows(d.d_in, 4, 3)
    d.revive_(ids, rows)
    away = rows - d.b_dec
    torch.testing.assert_close(d.W_dec[ids], away / away.norm(dim=1, keepdim=True))
    others = [i for i in range(d.d_sae) if i not in ids.tolist()]
    for key, old in before.items():
        new = d.state_dict()[key]
        per_latent = old.ndim > 0 and len(old) == d.d_sae
        assert torch.equal(new[others], old[others]) if per_latent else torch.equal(new, old)
    assert torch.isfinite(d.encode(some_rows(d.d_in))).all()


LAWS = (
    rows_law, affine_law, pure_law, sparse_law, budget_law, shape_law, dtype_law, scale_law,
    signed_law, gradient_law, revive_law,
)  # fmt: skip
