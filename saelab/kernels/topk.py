"""The k largest exact scores of each row, with few of them computed: `ops.select` has the reasons.

Scores come as the bits of bfloat16 numbers. All functions are exact in what they choose.
"""

import numba
import numpy as np

_FAST = {"reassoc", "contract", "nsz"}
SPARE = 8
"""Latents beyond k in the first look at a row."""


@numba.njit(nogil=True, cache=True, fastmath=_FAST)
def _bounds(bits, bias, spread, norm, signed, upper, tops):
    """Fill `upper` with what one row's exact scores cannot exceed, and `tops` with the largest
    bound of each group: the latents g, g + n_groups, g + 2 n_groups, …"""
    n_groups = tops.shape[0]
    tops[:] = -np.inf
    for start in range(0, bits.shape[0], n_groups):  # slices tell the compiler enough for SIMD
        some = slice(start, start + n_groups)
        scores, shift, error, out = bits[some], bias[some], spread[some], upper[some]
        for g in range(out.shape[0]):
            score = np.int32(np.int32(scores[g]) << np.int32(16)).view(np.float32)
            size = abs(score + shift[g]) if signed else score + shift[g]
            bound = size + abs(score) * np.float32(2**-8) + norm * error[g]
            out[g] = bound
            tops[g] = bound if bound > tops[g] else tops[g]


@numba.njit(nogil=True, cache=True)
def _kth_largest(values, k, work):
    """Return the k-th largest of `values`, which stay as they are."""
    n = values.shape[0]
    work[:n] = values
    low, high, place = 0, n - 1, k - 1
    while low < high:
        pivot = work[(low + high) >> 1]
        i, j = low, high
        while i <= j:
            while work[i] > pivot:
                i += 1
            while work[j] < pivot:
                j -= 1
            if i <= j:
                work[i], work[j] = work[j], work[i]
                i += 1
                j -= 1
        if place <= j:
            high = j
        elif place >= i:
            low = i
        else:
            break
    return work[place]


@numba.njit(nogil=True, cache=True, fastmath=_FAST)
def _dot(a, b):
    total = np.float32(0)
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@numba.njit(nogil=True, cache=True)
def _take(upper, tops, above, below, found, size):
    """Append the latents whose bound is in [above, below) to `found`; return their number."""
    for g in range(tops.shape[0]):
        if tops[g] >= above:
            for j in range(g, upper.shape[0], tops.shape[0]):
                if above <= upper[j] < below:
                    found[size] = j
                    size += 1
    return size


@numba.njit(nogil=True, cache=True)
def certified_rows(
    start, stop, x, W, bias, bits, spread, norms, k, signed, n_groups, indices, values, cost
):
    """Fill rows start … stop − 1 of `indices` and `values` with the k largest x Wᵀ + bias.

    bits (n, d_sae) int16 is x Wᵀ in bfloat16, off by at most norms_i · spread_j before rounding;
    cost (n): exact scores computed. A row that is not finite gets NaN at the first k latents.
    """
    d_sae = W.shape[0]
    upper, tops = np.empty(d_sae, np.float32), np.empty(n_groups, np.float32)
    found, work = np.empty(d_sae, np.int64), np.empty(d_sae, np.float32)
    exact, sizes = np.empty(d_sae, np.float32), np.empty(d_sae, np.float32)
    for row in range(start, stop):
        _bounds(bits[row], bias, spread, norms[row], signed, upper, tops)
        bound = _kth_largest(tops, min(k + SPARE, n_groups), work)
        kth, below = np.float32(np.nan), np.float32(np.inf)
        size = done = place = 0
        while True:
            size = _take(upper, tops, bound, below, found, size)
            for c in range(done, size):
                exact[c] = _dot(x[row], W[found[c]]) + bias[found[c]]
                sizes[c] = abs(exact[c]) if signed else exact[c]
            done = size
            if size < k:
                break
            kth = _kth_largest(sizes[:size], k, work)
            if not kth < bound:
                break
            bound, below = kth, bound
        cost[row] = size
        for equal in range(2):
            for c in range(size):
                if place < k and (sizes[c] == kth if equal else sizes[c] > kth):
                    indices[row, place], values[row, place] = found[c], exact[c]
                    place += 1
        if place < k:
            for c in range(k):
                indices[row, c], values[row, c] = c, np.nan


@numba.njit(nogil=True, cache=True, fastmath=_FAST)
def round_rows(start, stop, W, bits, norms, errors):
    """Round rows to bfloat16 bits; fill the norms of the rounded rows and of what was lost."""
    for row in range(start, stop):
        exact, number, out = W[row], W[row].view(np.int32), bits[row]
        size = lost = np.float32(0)
        for i in range(out.shape[0]):
            odd = (number[i] >> np.int32(16)) & np.int32(1)
            rounded = np.int32(number[i] + np.int32(0x7FFF) + odd) >> np.int32(16)
            out[i] = rounded
            back = np.int32(rounded << np.int32(16)).view(np.float32)
            error = exact[i] - back
            size += back * back
            lost += error * error
        norms[row], errors[row] = np.sqrt(size), np.sqrt(lost)


@numba.njit(nogil=True, cache=True)
def keep_largest(start, stop, pre, k, signed, z):
    """Fill z with the k largest of each row of pre where they are positive, or, `signed`, with
    the k of the largest size; 0 elsewhere. Of equal ones the first are kept; NaN counts as 0."""
    m = pre.shape[1]
    size = np.empty(m, dtype=np.float32)
    for row in range(start, stop):
        given, out = pre[row], z[row]
        n_positive = 0
        for j in range(m):
            value = abs(given[j]) if signed else given[j]
            size[j] = value if value > 0 else np.float32(0)
            n_positive += value > 0
        floor, spare = np.float32(0), m
        if n_positive > k:
            floor = np.partition(size, m - k)[m - k]
            spare = k
            for j in range(m):
                spare -= size[j] > floor
        for j in range(m):
            out[j] = 0
            if size[j] > floor:
                out[j] = given[j]
            elif size[j] == floor and floor > 0 and spare > 0:
                out[j] = given[j]
                spare -= 1
