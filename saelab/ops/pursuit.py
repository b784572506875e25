"""Greedy pursuit: each row as a sparse sum of atoms, one atom per step.

Every user of pursuit differs only in the switches of `pursue`:

    sign    the score of atom j is ⟨r, d_j⟩, r the row's residual. "abs" takes the largest |score|;
            "nonneg" the largest score, and stops when none is above zero; "raw" the largest score,
            also when it is negative
    refit   "mp" (matching pursuit) adds the score to the atom's coefficient; "omp" (orthogonal
            matching pursuit) refits all chosen coefficients by least squares; "gp" (gradient
            pursuit) moves them one step along the error's gradient, by the length that is best, and
            with "nonneg" cuts them at 0 (Blumensath and Davies 2008; as in inference-time
            optimisation)
    reuse   whether an atom may be chosen again; matching pursuit then sums its coefficients

With unit atoms, a matching-pursuit step by v leaves energy ‖r‖² − v² and r orthogonal to the atom.

A step needs only the scores, and with the atoms' Gram matrix G it changes them by − v · G[j]: one
row of G is read where the plain loop takes a product with all atoms. `kernels.pursuit` does that
for one row of x at a time, whose scores never leave the core's own cache, and where scores are
equal up to their rounding it asks the residual itself, in float64; the torch form here takes a few
rows together and leaves such ties as they fall. docs/methods/matching_pursuit.md has the times.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab import kernels
from saelab.errors import ShapeError
from saelab.ops.refit import Refit, Sign, gradient_step, least_squares
from saelab.ops.sparse import decode_ragged
from saelab.types import SparseLatents

GRAM_BYTES = 1 << 30
"""Largest Gram matrix of the atoms that is made."""
CHUNK_BYTES = 1 << 26
"""Working memory for the scores of one chunk of rows."""
BLOCK_SCORES = 1 << 15
"""Scores pursued at once by one CPU thread: they stay in its cache from step to step, and torch
does not split so few numbers over threads, which would wait for each other at every step."""
GRAM_PAYS = 1.3
"""The Gram matrix is made where atoms are fewer than this many times rows · k."""
GRAM_ROWS = 512
"""Rows of the Gram matrix made at once; what lies below them is copied from above the diagonal."""
NOISE = 16
"""A row stops when its best score is below this many rounding errors of its own norm."""


@dataclass(frozen=True)
class PursuitTrace:
    """What a pursuit did, in order: codes are sequential, so their first j steps mean something."""

    order: Int[Tensor, "n steps"]
    """Atom chosen at each step; −1 once the row has stopped."""
    coefficients: Float[Tensor, "n steps"]
    """mp: what each step added; omp, gp: the final coefficient of the atom chosen at that step."""
    codes: SparseLatents
    """Coefficients summed over repeats, indices ascending in each row."""
    residual: Float[Tensor, "n d"]
    n_steps: Int[Tensor, " n"]
    """Steps until the row stopped; at least the number of distinct atoms in its code."""


@dataclass(frozen=True)
class _Rule:
    sign: Sign
    refit: Refit
    reuse: bool
    tol: float


@torch.no_grad()
def pursue(
    x: Float[Tensor, "n d"],
    atoms: Float[Tensor, "n_atoms d"],
    k: int,
    *,
    sign: Sign = "abs",
    refit: Refit = "mp",
    reuse: bool = True,
    tol: float = 0.0,
    gram: Float[Tensor, "n_atoms n_atoms"] | None = None,
) -> PursuitTrace:
    """Pursue each row of `x` with up to `k` steps; rows do not influence each other.

    A row stops early when its residual norm is at most `tol`, when no score exceeds the rounding
    error of its own norm, or, for "nonneg", when no score is positive. Atoms are taken as they are:
    with norms other than 1, matching pursuit loses its energy law. `gram` = atoms @ atoms.T may be
    given to save making it on every call; without it, it is made when that pays and fits. Memory
    beyond the result is bounded. No gradient passes: `ops.unroll` has that. Raises ShapeError if
    k < 1, or for switches that clash.
    """
    _check(k, len(atoms), sign, refit)
    rule = _Rule(sign, refit, reuse and refit != "omp", tol)
    with torch.autocast(x.device.type, enabled=False):
        return _pursue(x, atoms, k, rule, gram)


def _pursue(x: Tensor, atoms: Tensor, k: int, rule: _Rule, gram: Tensor | None) -> PursuitTrace:
    if rule.refit == "mp" and gram is None and len(atoms) < GRAM_PAYS * len(x) * k:
        gram = gram_of(atoms)
    order = torch.full((len(x), k), -1, dtype=torch.int64, device=x.device)
    coefficients = x.new_zeros(len(x), k)
    chunk = max(1, CHUNK_BYTES // (x.element_size() * max(len(atoms), k * atoms.shape[1])))
    for start in range(0, len(x), chunk):
        rows = slice(start, start + chunk)
        if rule.refit == "mp" and gram is not None:
            chosen = _pursue_scores(x[rows], atoms, gram, k, rule)
        else:
            chosen = _pursue_residual(x[rows], atoms, k, rule)
        order[rows], coefficients[rows] = chosen
    codes = sum_repeats(order, coefficients, len(atoms))
    residual = x - decode_ragged(codes, atoms)
    return PursuitTrace(order, coefficients, codes, residual, (order >= 0).sum(1))


def gram_of(atoms: Float[Tensor, "n_atoms d"]) -> Float[Tensor, "n_atoms n_atoms"] | None:
    """Return atoms @ atoms.T, or None if it would take more than `GRAM_BYTES`."""
    n = len(atoms)
    if n**2 * atoms.element_size() > GRAM_BYTES:
        return None
    gram = atoms.new_empty(n, n)
    for start in range(0, n, GRAM_ROWS):
        stop = min(start + GRAM_ROWS, n)
        gram[start:stop, start:] = atoms[start:stop] @ atoms[start:].T
        gram[stop:, start:stop] = gram[start:stop, stop:].T
    return gram


def pursue_plainly(
    x: Float[Tensor, "n d"],
    atoms: Float[Tensor, "n_atoms d"],
    k: int,
    *,
    sign: Sign = "abs",
    refit: Refit = "mp",
    reuse: bool = True,
    tol: float = 0.0,
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """Return (order, coefficients) by the obvious loop over steps: the reference for `pursue`."""
    _check(k, len(atoms), sign, refit)
    return _pursue_residual(x, atoms, k, _Rule(sign, refit, reuse and refit != "omp", tol))


def _pursue_residual(
    x: Float[Tensor, "n d"], atoms: Float[Tensor, "n_atoms d"], k: int, rule: _Rule
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """Score every atom against the residual afresh at each step."""
    order = torch.full((len(x), k), -1, dtype=torch.int64, device=x.device)
    coefficients = x.new_zeros(len(x), k)
    banned = None if rule.reuse else torch.zeros(len(x), len(atoms), dtype=torch.bool).to(x.device)
    residual = x.clone()
    floor = _floor(x)
    goes = torch.ones_like(floor, dtype=torch.bool)
    for step in range(k):
        atom, score = _choose(residual @ atoms.T, rule.sign, banned)
        goes = goes & _goes(score, rule.sign, floor) & (residual.norm(dim=1) > rule.tol)
        order[:, step] = torch.where(goes, atom, -1)
        if rule.refit == "mp":
            coefficients[:, step] = torch.where(goes, score, 0)
            residual = residual - coefficients[:, step, None] * atoms[atom]
        elif rule.refit == "omp":
            support = order[:, : step + 1]
            coefficients[:, : step + 1], residual = least_squares(x, atoms, support)
        else:
            so_far = coefficients[:, : step + 1], residual
            now, residual = gradient_step(x, atoms, order[:, : step + 1], *so_far, rule.sign)
            coefficients[:, : step + 1] = now
        if banned is not None:
            banned.scatter_(1, atom[:, None], True)
        if not goes.any():
            break
    return order, coefficients


def _pursue_scores(
    x: Float[Tensor, "n d"],
    atoms: Float[Tensor, "n_atoms d"],
    gram: Float[Tensor, "n_atoms n_atoms"],
    k: int,
    rule: _Rule,
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """Keep the scores up to date instead of the residual: score ← score − v · gram[j]."""
    order = torch.full((len(x), k), -1, dtype=torch.int64, device=x.device)
    coefficients = x.new_zeros(len(x), k)
    scores, floor, energy = x @ atoms.T, _floor(x), x.square().sum(1)
    if compiled(x, atoms, gram):
        _run_kernel(x, atoms, scores, gram, floor, rule, order, coefficients)
        return order, coefficients

    def run(start: int) -> None:
        rows = slice(start, start + block)
        _step_block(
            scores[rows], gram, floor[rows], energy[rows], rule, order[rows], coefficients[rows]
        )

    if x.device.type == "cpu":
        block = max(1, BLOCK_SCORES // len(atoms))
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(run, range(0, len(x), block)))
    else:
        block = len(x)
        run(0)
    return order, coefficients


def compiled(*tensors: Tensor) -> bool:
    """Return whether the kernels take these tensors: numba is there, all on a CPU, of one float
    type."""
    kinds = {t.dtype for t in tensors}
    here = all(t.device.type == "cpu" for t in tensors) and kernels.name() == "numba"
    return here and kinds in ({torch.float32}, {torch.float64})


def _run_kernel(
    x: Float[Tensor, "n d"],
    atoms: Float[Tensor, "n_atoms d"],
    scores: Float[Tensor, "n n_atoms"],
    gram: Float[Tensor, "n_atoms n_atoms"],
    floor: Float[Tensor, " n"],
    rule: _Rule,
    order: Int[Tensor, "n k"],
    coefficients: Float[Tensor, "n k"],
) -> None:
    """Do as `_step_block` for all rows, and tell apart exactly what scores cannot tell apart."""
    from saelab.kernels.pursuit import pursue_rows

    table = scores.numpy()
    bits = table.view(np.int32 if table.itemsize == 4 else np.int64)
    largest, all_bits = bits.dtype.type(np.iinfo(bits.dtype).max), bits.dtype.type(-1)
    flip, keep = (bits.dtype.type(0), largest) if rule.sign == "abs" else (largest, all_bits)
    kernels.over_rows(
        pursue_rows,
        len(scores),
        *(x.contiguous().numpy(), atoms.contiguous().numpy(), table, bits),
        *(gram.contiguous().numpy(), floor.numpy(), float(rule.tol), flip, keep),
        *(rule.sign == "nonneg", rule.reuse, order.numpy(), coefficients.numpy()),
    )


def _step_block(
    scores: Float[Tensor, "n n_atoms"],
    gram: Float[Tensor, "n_atoms n_atoms"],
    floor: Float[Tensor, " n"],
    energy: Float[Tensor, " n"],
    rule: _Rule,
    order: Int[Tensor, "n k"],
    coefficients: Float[Tensor, "n k"],
) -> None:
    """Pursue a few rows, in place of their `scores`, `energy`, `order` and `coefficients`."""
    banned = None if rule.reuse else torch.zeros_like(scores, dtype=torch.bool)
    buffer, neighbours = torch.empty_like(scores), torch.empty_like(scores)
    norms = gram.diagonal()
    goes = torch.ones_like(floor, dtype=torch.bool)
    for step in range(order.shape[1]):
        atom, score = _choose(scores, rule.sign, banned, buffer)
        goes &= _goes(score, rule.sign, floor)
        if rule.tol > 0:
            goes &= energy > rule.tol**2
        value = score * goes
        order[:, step] = atom.masked_fill(~goes, -1)
        coefficients[:, step] = value
        torch.index_select(gram, 0, atom, out=neighbours)
        scores.addcmul_(neighbours, value[:, None].expand_as(neighbours), value=-1)
        if rule.tol > 0:
            energy -= value.square() * (2 - norms[atom])
        if banned is not None:
            banned.scatter_(1, atom[:, None], True)


def _choose(
    scores: Float[Tensor, "n n_atoms"],
    sign: Sign,
    banned: Bool[Tensor, "n n_atoms"] | None,
    buffer: Float[Tensor, "n n_atoms"] | None = None,
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Return each row's best atom and its score."""
    key = torch.abs(scores, out=buffer) if sign == "abs" else scores
    if banned is not None:
        key = key.masked_fill(banned, -torch.inf)
    best, atom = key.max(1)
    score = scores.gather(1, atom[:, None])[:, 0] if sign == "abs" else best
    return atom, score if banned is None else score.masked_fill(best == -torch.inf, 0)


def _goes(score: Float[Tensor, " n"], sign: Sign, floor: Float[Tensor, " n"]) -> Bool[Tensor, " n"]:
    return (score if sign == "nonneg" else score.abs()) > floor


def _floor(x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    return x.norm(dim=1) * (NOISE * torch.finfo(x.dtype).eps)


def sum_repeats(
    order: Int[Tensor, "n k"], coefficients: Float[Tensor, "n k"], n_atoms: int
) -> SparseLatents:
    """Return the codes of a pursuit: the coefficients of each row's atoms, summed over repeats.

    Differentiable in `coefficients`.
    """
    rows = torch.arange(len(order), device=order.device)[:, None].expand_as(order)
    used = order >= 0
    key, place = torch.unique(rows[used] * n_atoms + order[used], return_inverse=True)
    values = coefficients.new_zeros(len(key)).index_add_(0, place, coefficients[used])
    key, values = key[values != 0], values[values != 0]
    counts = torch.bincount(key // n_atoms, minlength=len(order))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return SparseLatents(offsets, key % n_atoms, values, n_atoms)


def _check(k: int, n_atoms: int, sign: Sign, refit: Refit) -> None:
    if k < 1 or not n_atoms:
        raise ShapeError(f"pursuit needs at least one step and one atom, got {k} and {n_atoms}.")
    if refit == "omp" and sign == "nonneg":
        raise ShapeError(
            "least squares does not keep coefficients non-negative: use sign='abs', or refit='mp'."
        )
