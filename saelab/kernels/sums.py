"""Sums of rows picked by sparse codes; `ops.sparse` has the torch forms."""

import numba
import numpy as np

_FAST = {"reassoc", "contract", "nsz"}


@numba.njit(nogil=True, cache=True, fastmath=_FAST)
def picked_products(start, stop, x, W, starts, indices, out):
    """Fill out[e] = ⟨x_i, W[indices[e]]⟩ for the entries e of rows start … stop − 1."""
    for row in range(start, stop):
        given = x[row]
        for e in range(starts[row], starts[row + 1]):
            direction = W[indices[e]]
            total = np.float32(0)
            for i in range(given.shape[0]):
                total += given[i] * direction[i]
            out[e] = total


@numba.njit(nogil=True, cache=True, fastmath=_FAST)
def weighted_sums(start, stop, table, starts, picks, weights, out):
    """Fill out[r] = Σ_e weights[e] · table[picks[e]] over the entries of each row."""
    for row in range(start, stop):
        total = out[row]
        total[:] = 0
        for e in range(starts[row], starts[row + 1]):
            source, weight = table[picks[e]], weights[e]
            for i in range(total.shape[0]):
                total[i] += weight * source[i]


@numba.njit(nogil=True, cache=True)
def transpose(starts, indices, values, out_starts, out_rows, out_values):
    """Turn codes by row into codes by latent, rows ascending; out_starts (d_sae + 1) holds 0."""
    n_rows, d_sae = starts.shape[0] - 1, out_starts.shape[0] - 1
    for e in range(starts[n_rows]):
        out_starts[indices[e] + 1] += 1
    for latent in range(d_sae):
        out_starts[latent + 1] += out_starts[latent]
    place = out_starts[:-1].copy()
    for row in range(n_rows):
        for e in range(starts[row], starts[row + 1]):
            at = place[indices[e]]
            out_rows[at], out_values[at] = row, values[e]
            place[indices[e]] = at + 1


@numba.njit(nogil=True, cache=True)
def count_above(start, stop, scores, floor, counts):
    """Fill counts[i] with the number of scores of row i that exceed their column's floor."""
    for row in range(start, stop):
        given, n = scores[row], 0
        for j in range(given.shape[0]):
            n += given[j] > floor[j]
        counts[row] = n


@numba.njit(nogil=True, cache=True)
def fill_above(start, stop, scores, floor, starts, indices, values):
    """Write where these scores are, and what they are, from entry starts[i] on."""
    for row in range(start, stop):
        given, place = scores[row], starts[row]
        for j in range(given.shape[0]):
            if given[j] > floor[j]:
                indices[place], values[place] = j, given[j]
                place += 1
