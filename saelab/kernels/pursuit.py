"""Matching pursuit and its gradient, row by row: `ops.pursuit` and `ops.unroll` have the reasons.

Scores are compared by their bits, read as integers: NaN then beats every number, as in torch's
maximum, and the search is compiled to SIMD, which the maximum of floats is not.
"""

import numba
import numpy as np

_FAST = {"contract"}
_SUM = {"reassoc", "contract", "nsz"}
_BLOCK = 1024
"""Scores that are brought up to date and searched together: they stay in the nearest cache."""


@numba.njit(nogil=True, cache=True)
def _key(bits, flip, keep):
    """Return an integer that grows with the score: `flip` orders negative ones, `keep` drops the
    sign."""
    return (bits ^ flip if bits < 0 else bits) & keep


@numba.njit(nogil=True, cache=True)
def _largest(bits, flip, keep):
    best = _key(bits[0], flip, keep)
    for i in range(bits.shape[0]):
        best = max(best, _key(bits[i], flip, keep))
    return best


@numba.njit(nogil=True, cache=True, fastmath=_FAST)
def _subtract(scores, neighbours, value):
    for i in range(scores.shape[0]):
        scores[i] -= value * neighbours[i]


@numba.njit(nogil=True, cache=True)
def pursue_rows(
    start, stop, scores, bits, gram, floor, energy, tol, flip, keep, nonneg, reuse, order, values
):
    """Pursue rows start … stop − 1: fill their `order` and `values`, and use up their `scores`.

    `bits` is the memory of `scores` (n, n_atoms) as integers; gram = atoms @ atoms.T. A row stops
    when its best score is within `floor`, or its energy within tol².
    """
    n_atoms, banned = scores.shape[1], 0.0 if keep > 0 else -np.inf
    for row in range(start, stop):
        left, value, atom = energy[row], scores[row, 0], 0
        for step in range(order.shape[1]):
            if tol > 0 and not left > tol * tol:
                break
            best, place = _key(bits[row, 0], flip, keep), -1
            for begin in range(0, n_atoms, _BLOCK):
                some = slice(begin, begin + _BLOCK)
                if step > 0:
                    _subtract(scores[row, some], gram[atom, some], value)
                if not reuse:
                    for old in order[row, :step]:
                        if begin <= old < begin + _BLOCK:
                            scores[row, old] = banned
                top = _largest(bits[row, some], flip, keep)
                if place < 0 or top > best:
                    best, place = top, begin
            atom = place
            while _key(bits[row, atom], flip, keep) != best:
                atom += 1
            value = scores[row, atom]
            if not floor[row] < (value if nonneg else abs(value)) < np.inf:
                break
            left -= value * value * (2 - gram[atom, atom])
            order[row, step], values[row, step] = atom, value


@numba.njit(nogil=True, cache=True, fastmath=_SUM)
def _dot(a, b, zero):
    total = zero
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@numba.njit(nogil=True, cache=True, fastmath=_FAST)
def _add(total, row, factor):
    for i in range(total.shape[0]):
        total[i] += factor * row[i]


@numba.njit(nogil=True, cache=True)
def back_rows(start, stop, atoms, order, weights, rho):
    """Go back through the steps of rows start … stop − 1: `weights` (gradients of the values)
    become those with all later steps' share; `rho` (of the residual), those of the row."""
    for row in range(start, stop):
        grad = rho[row]
        for step in range(order.shape[1] - 1, -1, -1):
            atom = order[row, step]
            if atom >= 0:
                weight = weights[row, step] - _dot(grad, atoms[atom], grad[0] - grad[0])
                weights[row, step] = weight
                _add(grad, atoms[atom], weight)


@numba.njit(nogil=True, cache=True, fastmath=_FAST)
def _accumulate(out, residual, grad, atom, value, weight):
    for i in range(out.shape[0]):
        residual[i] += value * atom[i]
        out[i] += weight * residual[i] - value * grad[i]
        grad[i] += weight * atom[i]


@numba.njit(nogil=True, cache=True)
def back_columns(start, stop, atoms, order, values, weights, residual, rho, out):
    """Add columns start … stop − 1 of the atoms' gradient to `out`: no two threads share one.

    `residual` and `rho` are those after the last step, `weights` are from `back_rows`.
    """
    r, grad = np.empty(stop - start, rho.dtype), np.empty(stop - start, rho.dtype)
    for row in range(order.shape[0]):
        r[:], grad[:] = residual[row, start:stop], rho[row, start:stop]
        for step in range(order.shape[1] - 1, -1, -1):
            atom = order[row, step]
            if atom >= 0:
                value, weight = values[row, step], weights[row, step]
                target, source = out[atom, start:stop], atoms[atom, start:stop]
                _accumulate(target, r, grad, source, value, weight)
