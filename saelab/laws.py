"""The laws that every type of dictionary obeys, to be held against a type of your own.

    from saelab import laws

    laws.broken(lambda: laws.ready("my_type"))    # {}, or what was seen, by the law that is broken

A law takes a function that makes a dictionary *ready to code*: initialised, calibrated, its biases
off zero. Each law makes one or more of its own, so the function has to give equal ones. `ready`
makes them from a registered type's `example()`, but for solved types, which need a store.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from saelab import dictionaries
from saelab.dictionaries.base import BaseDictionary
from saelab.errors import ConfigError, ShapeError
from saelab.protocols import GradientTrained, Solved, Streamed
from saelab.types import Batch

Make = Callable[[], BaseDictionary]
"""Makes a dictionary that is ready to code, each time an equal one."""
Law = Callable[[Make], None]
"""Raises AssertionError where it is broken."""
_N = 40


def broken(make: Make) -> dict[str, str]:
    """Return what was seen of each law that does not hold; empty if all do.

    What the type itself raises is a broken law too: laws only ask for what types have to offer.
    """
    found = {}
    for law in LAWS:
        try:
            law(make)
        except Exception as error:
            found[law.__name__] = f"{type(error).__name__}: {error}".strip(": ")
    return found


def ready(name: str, seed: int = 0) -> BaseDictionary:
    """Return a registered type's example as after training: initialised, biases off zero,
    calibrated. Raises ConfigError for a solved type, which has to be given a store."""
    dictionary = dictionaries.create(dictionaries.config_class(name).example())
    if isinstance(dictionary, Solved):
        raise ConfigError(
            f"{name} is found by iterations over a store, and laws bring none: solve one, and give "
            "laws a function that returns it"
        )
    generator = torch.Generator().manual_seed(seed)
    rows = some_rows(dictionary.d_in, 2, 256)
    if isinstance(dictionary, GradientTrained):
        dictionary.init_(rows, generator)
    if isinstance(dictionary, Streamed):
        dictionary.begin_(rows.mean(0), rows, len(rows))
        dictionary.partial_fit(batch_of(rows))
    return settled_(dictionary, generator)


def settled_(dictionary: BaseDictionary, generator: torch.Generator) -> BaseDictionary:
    """Move a dictionary's biases off zero, calibrate it, and return it."""
    with torch.no_grad():
        for parameter in dictionary.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.rand(parameter.shape, generator=generator))
    if isinstance(dictionary, GradientTrained):
        dictionary.calibrate([batch_of(some_rows(dictionary.d_in, 9, 4000))])
    return dictionary


def some_rows(d_in: int, seed: int = 1, n: int = _N) -> Float[Tensor, "n d_in"]:
    """Return seeded normal rows, not centred."""
    return 2 * torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed)) + 0.5


def batch_of(x: Float[Tensor, "n d_in"]) -> Batch:
    """Return rows as a batch: eight to a document, with a gradient."""
    number = torch.arange(len(x))
    return Batch(x, x, number, number // 8, grad=torch.sin(3 * x))


# ---------------------------------------------------------------------------------------- the laws


def rows_law(make: Make) -> None:
    """Other rows change no bit at equal batch size, and at most 1e-5 at another."""
    d = make()
    x = some_rows(d.d_in)
    z = d.encode(x)
    other = some_rows(d.d_in, 3)
    other[7] = x[7]
    assert torch.equal(d.encode(other)[7], z[7]), "a row's code depends on the other rows"
    torch.testing.assert_close(d.encode(x[:3]), z[:3], atol=1e-5, rtol=1e-5)


def affine_law(make: Make) -> None:
    """decode(z) is z @ W_dec + b_dec, and reconstruct adds offset − b_dec to it."""
    d = make()
    z = some_rows(d.d_sae)
    torch.testing.assert_close(d.decode(z), z @ d.W_dec + d.b_dec)
    x = some_rows(d.d_in)
    expected = d.decode(d.encode(x)) + d.offset(x) - d.b_dec
    torch.testing.assert_close(d.reconstruct(x), expected, atol=1e-5, rtol=1e-5)


def pure_law(make: Make) -> None:
    """Encode, decode and loss change no weight, gradient, grad mode or global randomness."""
    for training in (True, False):
        d = make().train(training)
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
                    assert torch.equal(first, second), "the same batch had two losses"
                assert torch.is_grad_enabled() == grad, "the grad mode was changed"
            assert torch.equal(random, torch.get_rng_state()), "global randomness was used"
        assert d.training == training, "the training mode was changed"
        assert _same(before, d.state_dict()), "a weight was changed"
        assert all(p.grad is None for p in d.parameters()), "a gradient was left"


def round_trip_law(make: Make) -> None:
    """What is loaded encodes bit-identically, and saving it again writes the same bytes."""
    d = make()
    with tempfile.TemporaryDirectory() as folder:
        first, second = (Path(folder) / name for name in "ab")
        d.save(first)
        loaded = dictionaries.load(first)
        loaded.save(second)
        x = some_rows(d.d_in)
        assert torch.equal(loaded.encode(x), d.encode(x)), "the loaded one has other codes"
        assert loaded.config == d.config, f"{d.config} was loaded as {loaded.config}"
        for file in first.iterdir():
            assert file.read_bytes() == (second / file.name).read_bytes(), f"{file.name} differs"


def sparse_law(make: Make) -> None:
    """encode_sparse is encode, without stored zeros or repeats, and decodes to the same."""
    d = make()
    x = some_rows(d.d_in)
    latents, z = d.encode_sparse(x), d.encode(x)
    assert torch.equal(latents.dense(), z), "the ragged codes are others"
    assert torch.equal(latents.l0(), (z != 0).sum(-1)), "an index stands twice in a row"
    assert (latents.values != 0).all(), "a zero is stored"
    torch.testing.assert_close(d.decode(latents), d.decode(z), atol=1e-5, rtol=1e-5)


def budget_law(make: Make) -> None:
    """No row exceeds l0_bound; a type without one but with a k has it as mean on new rows."""
    d = make()
    l0 = (d.encode(some_rows(d.d_in, n=4000)) != 0).sum(-1)
    if d.l0_bound is not None:
        assert 0 < l0.max() <= d.l0_bound, f"a row has {l0.max()} latents of {d.l0_bound}"
    elif "k" in type(d.config).model_fields:
        mean, k = float(l0.float().mean()), d.config.plain()["k"]
        assert abs(mean - k) <= 0.05 * k, f"rows have {mean:.3g} latents on average, not {k}"


def shape_law(make: Make) -> None:
    """Any leading axes, also none and none at all; another width is refused by name."""
    d = make()
    x = some_rows(d.d_in, n=12)
    for lead in ((), (12,), (3, 4), (2, 1, 6), (0,), (2, 0)):
        part = x[0] if lead == () else x[: torch.Size(lead).numel()].reshape(*lead, d.d_in)
        z = d.encode(part)
        assert z.shape == (*lead, d.d_sae), f"codes of {tuple(part.shape)} are {tuple(z.shape)}"
        for out in (d.decode(z), d.offset(part), d.reconstruct(part)):
            assert out.shape == (*lead, d.d_out), f"{tuple(part.shape)} became {tuple(out.shape)}"
    assert d.decode(d.encode_sparse(x[:0])).shape == (0, d.d_out), "no rows became some"
    torch.testing.assert_close(d.encode(x.reshape(3, 4, -1)), d.encode(x).reshape(3, 4, -1))
    _refuses(lambda: d.encode(some_rows(d.d_in + 1)), d.d_in)
    _refuses(lambda: d.decode(some_rows(d.d_sae + 1)), d.d_sae)


def _refuses(call: Callable[[], object], width: int) -> None:
    """Want a ShapeError that names the right width."""
    said = ""
    try:
        call()
    except ShapeError as error:
        said = str(error)
    assert said, f"rows of width {width + 1} are taken for {width}; raise ShapeError"
    assert str(width) in said, f"a wrong width is refused without naming {width}: {said}"


def dtype_law(make: Make) -> None:
    """Results have the weights' dtype and device, whatever x has."""
    d = make()
    x = some_rows(d.d_in)
    for weights in (torch.float32, torch.float64):
        d = d.to(weights)
        for dtype in (torch.float16, torch.float32, torch.float64):
            z = d.encode(x.to(dtype))
            ragged, x_hat = d.encode_sparse(x.to(dtype)).values, d.reconstruct(x.to(dtype))
            for came in (z, ragged, x_hat):
                assert came.dtype == weights, f"{dtype} rows gave {came.dtype}, not {weights}"
            assert z.device == d.W_dec.device, f"codes lie on {z.device}"


def scale_law(make: Make) -> None:
    """fold(s).encode(x) is encode(s·x)/s; folding changes nothing given, and 1 is identity."""
    d = make()
    before = {k: v.clone() for k, v in d.state_dict().items()}
    x = some_rows(d.d_in)
    for s in (0.25, 1.7, 30.0):
        folded = dictionaries.fold(d, s)
        torch.testing.assert_close(folded.encode(x), d.encode(s * x) / s, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            folded.reconstruct(x), d.reconstruct(s * x) / s, atol=1e-5, rtol=1e-5
        )
    assert torch.equal(dictionaries.fold(d, 1.0).encode(x), d.encode(x)), "folding 1 changes codes"
    assert _same(before, d.state_dict()), "folding changed the dictionary itself"


def signed_law(make: Make) -> None:
    """A latent fires where z ≠ 0, and the loss of a row-wise type counts so."""
    d = make()
    if not isinstance(d, GradientTrained) or d.l0_bound is None:
        return
    x = some_rows(d.d_in)
    z = d.encode(x)
    loss = d.loss(batch_of(x), 0.5, torch.zeros(d.d_sae, dtype=torch.bool))
    fired, seen = set(loss.fired.tolist()), set((z != 0).any(0).nonzero()[:, 0].tolist())
    assert fired == seen, f"the loss and the codes differ in latents {sorted(fired ^ seen)}"
    torch.testing.assert_close(loss.l0, (z != 0).sum(-1).float().mean())


def gradient_law(make: Make) -> None:
    """With its support held fixed, encode is differentiable in x."""
    d = make().double()
    x = some_rows(d.d_in, n=4).double()
    probe = torch.randn(4, d.d_in, generator=torch.Generator().manual_seed(5)).double()
    step = 1e-6
    near = [d.encode(x + s * step * probe) for s in (-1, 1)]
    support = d.encode(x) != 0
    calm = ((near[0] != 0) == support).all(-1) & ((near[1] != 0) == support).all(-1)
    assert calm.any(), "a step of 1e-6 changes the support of every row"
    x.requires_grad_()
    weight = torch.randn(d.d_sae, generator=torch.Generator().manual_seed(6)).double()
    (grad,) = torch.autograd.grad((d.encode(x) @ weight).sum(), x)
    finite = (near[1] - near[0]) @ weight / (2 * step)
    torch.testing.assert_close((grad * probe).sum(-1)[calm], finite[calm], atol=1e-6, rtol=1e-5)


def revive_law(make: Make) -> None:
    """Resampling points the given latents at the given rows and leaves all else as it was."""
    d = make()
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
        kept = torch.equal(new[others], old[others]) if per_latent else torch.equal(new, old)
        assert kept, f"{key} of other latents was changed"
    assert torch.isfinite(d.encode(some_rows(d.d_in))).all(), "codes are not finite afterwards"


def _same(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return all(torch.equal(before[key], value) for key, value in after.items())


LAWS: tuple[Law, ...] = (
    rows_law, affine_law, pure_law, round_trip_law, sparse_law, budget_law, shape_law, dtype_law,
    scale_law, signed_law, gradient_law, revive_law,
)  # fmt: skip
"""All laws, each with a docstring that says it."""
