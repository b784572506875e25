"""Non-negative least squares, row by row: `ops.nnls` has the method and its reasons."""

import numba
import numpy as np

_SUM = {"reassoc", "contract", "nsz"}
_FAST = {"contract"}


@numba.njit(nogil=True, cache=True, fastmath=_SUM)
def _dot(a, b):
    total = 0.0
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@numba.njit(nogil=True, cache=True, fastmath=_FAST)
def _add(total, row, factor):
    for i in range(total.shape[0]):
        total[i] += factor * row[i]


@numba.njit(nogil=True, cache=True)
def _factor(factor, gram, support, begin, size, pivot):
    """Make rows begin … size − 1 of the support's Cholesky factor; return whether the last feature
    is independent of those before it."""
    independent = True
    for i in range(begin, size):
        row, mine = factor[i], gram[support[i]]
        for j in range(i):
            row[j] = (mine[support[j]] - _dot(row[:j], factor[j, :j])) / factor[j, j]
        left = mine[support[i]] - _dot(row[:i], row[:i])
        independent = left > pivot
        row[i] = np.sqrt(max(left, pivot))
    return independent


@numba.njit(nogil=True, cache=True)
def _solve(factor, size, scores, support, out):
    """Fill out[:size] with the least-squares coefficients of the support."""
    for i in range(size):
        out[i] = (scores[support[i]] - _dot(factor[i, :i], out[:i])) / factor[i, i]
    for i in range(size - 1, -1, -1):
        out[i] /= factor[i, i]
        _add(out[:i], factor[i, :i], -out[i])


@numba.njit(nogil=True, cache=True)
def _step_back(values, trial, support, size):
    """Go from `values` towards `trial` until the first of them is 0; drop what is 0. Return the
    new size, and the first place that changed."""
    alpha, worst = 1.0, -1
    for i in range(size):
        if trial[i] <= 0:
            ratio = values[i] / (values[i] - trial[i])
            if worst < 0 or ratio < alpha:
                alpha, worst = ratio, i
    first, kept = size, 0
    for i in range(size):
        value = values[i] + alpha * (trial[i] - values[i])
        if i == worst or (trial[i] <= 0 and value <= 0):
            first = min(first, i)
        else:
            values[kept], support[kept] = value, support[i]
            kept += 1
    return kept, first


@numba.njit(nogil=True, cache=True)
def _shrink(factor, gram, scores, pivot, support, values, trial, size):
    """Let features leave until least squares on the rest is positive; return how many stay."""
    while size > 0 and trial[:size].min() <= 0:
        size, first = _step_back(values, trial, support, size)
        _factor(factor, gram, support, first, size, pivot)
        _solve(factor, size, scores, support, trial)
    return size


@numba.njit(nogil=True, cache=True)
def nnls_rows(start, stop, scores, gram, floor, pivot, z):
    """Fill rows start … stop − 1 of z ≥ 0 with the minimum of zᵀ gram z / 2 − ⟨scores, z⟩.

    A feature enters while its part of the gradient exceeds `floor`; gram has ones, or a zero row,
    on its diagonal. A row whose floor is not finite becomes NaN.
    """
    n = gram.shape[0]
    factor, support = np.empty((n, n)), np.empty(n, np.int64)
    values, trial, slope = np.empty(n), np.empty(n), np.empty(n)
    out = np.empty(n, np.bool_)  # in the support, or barred until the support shrinks
    for row in range(start, stop):
        z[row] = 0
        if not floor[row] < np.inf:
            z[row] = np.nan
            continue
        size, out[:] = 0, False
        slope[:] = scores[row]
        for _ in range(10 * n):
            best, entry = floor[row], -1
            for j in range(n):
                if slope[j] > best and not out[j]:
                    best, entry = slope[j], j
            if entry < 0:
                break
            out[entry] = True
            support[size], values[size] = entry, 0.0
            if not _factor(factor, gram, support, size, size + 1, pivot):
                continue
            size += 1
            _solve(factor, size, scores[row], support, trial)
            if trial[size - 1] <= 0:  # by rounding
                size -= 1
                continue
            if trial[:size].min() <= 0:
                size = _shrink(factor, gram, scores[row], pivot, support, values, trial, size)
                out[:] = False
                for i in range(size):
                    out[support[i]] = True
            values[:size] = trial[:size]
            slope[:] = scores[row]
            for i in range(size):
                _add(slope, gram[support[i]], -values[i])
        for i in range(size):
            z[row, support[i]] = values[i]
