"""Matching pursuit and its gradient, row by row: `ops.pursuit` and `ops.unroll` have the reasons.

Scores are compared by their bits, read as integers: NaN then beats every number, as in torch's
maximum, and the search is compiled to SIMD, which the maximum of floats is not.
"""

import numba
import numpy as np

_FAST = {"contract"}
_SUM = {"reassoc", "contract", "nsz"}
_BLOCK = 256
"""Scores that are brought up to date and searched together: they stay in the nearest cache."""


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
def _key(bits, flip, keep):
    """Return an integer that grows with the score: `flip` orders negative ones, `keep` drops the
    sign. Of a key it makes the bits of the score (or of its size) again."""
    return (bits ^ flip if bits < 0 else bits) & keep


@numba.njit(nogil=True, cache=True)
def _largest(bits, flip, keep):
    best = _key(bits[0], flip, keep)
    for i in range(bits.shape[0]):
        best = max(best, _key(bits[i], flip, keep))
    return best


@numba.njit(nogil=True, cache=True)
def _near(scores, tops, limit, absolute):
    """Return how many atoms reach `limit`, and the first of them."""
    count = first = 0
    for block in range(tops.shape[0]):
        if tops[block] >= limit:
            begin = block * _BLOCK
            for i, score in enumerate(scores[begin : begin + _BLOCK]):
                if (abs(score) if absolute else score) >= limit:
                    first = first if count > 0 else begin + i
                    count += 1
    return count, first


@numba.njit(nogil=True, cache=True)
def _settle(x, atoms, order, values, scores, limit, absolute):
    """Return the best of the atoms that reach `limit`, scored against the residual in float64."""
    residual = x.astype(np.float64)
    for step in range(order.shape[0]):
        _add(residual, atoms[order[step]], -np.float64(values[step]))
    best, chosen = -np.inf, 0
    for atom in range(scores.shape[0]):
        if (abs(scores[atom]) if absolute else scores[atom]) >= limit:
            score = _dot(residual, atoms[atom], 0.0)
            size = abs(score) if absolute else score
            if size > best:
                best, chosen = size, atom
    return chosen


@numba.njit(nogil=True, cache=True)
def pursue_rows(
    start, stop, x, atoms, scores, bits, gram, floor, tol, flip, keep, nonneg, reuse, order, values
):
    """Pursue rows start … stop − 1: fill their `order` and `values`, and use up their `scores`.

    `bits` is the memory of `scores` (n, n_atoms) as integers; gram = atoms @ atoms.T. A row stops
    when its best score is within `floor`, or its energy within tol². Scores within `floor` of the
    best are told apart exactly.
    """
    n_atoms, absolute, zero = scores.shape[1], keep > 0, scores[0, 0] - scores[0, 0]
    banned = 0.0 if absolute else -np.inf
    tops = np.empty(-(-n_atoms // _BLOCK), scores.dtype)
    top_bits = tops.view(bits.dtype)
    for row in range(start, stop):
        left, value, atom = _dot(x[row], x[row], zero), zero, 0
        for step in range(order.shape[1]):
            if tol > 0 and not left > tol * tol:
                break
            best, place = _key(bits[row, 0], flip, keep), -1
            for block in range(tops.shape[0]):
                begin = block * _BLOCK
                some = slice(begin, begin + _BLOCK)
                if step > 0:
                    _add(scores[row, some], gram[atom, some], -value)
                if not reuse:
                    for old in order[row, :step]:
                        if begin <= old < begin + _BLOCK:
                            scores[row, old] = banned
                top = _largest(bits[row, some], flip, keep)
                top_bits[block] = _key(top, flip, keep)
                if place < 0 or top > best:
                    best, place = top, block
            size = tops[place]
            if not floor[row] < (size if nonneg else abs(size)) < np.inf:
                break
            near, atom = _near(scores[row], tops, size - floor[row], absolute)
            if near > 1:
                past = order[row, :step], values[row, :step]
                limit = size - floor[row]
                atom = _settle(x[row], atoms, *past, scores[row], limit, absolute)
            value = scores[row, atom]
            left -= value * value * (2 - gram[atom, atom])
            order[row, step], values[row, step] = atom, value


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
