"""Recursive normalised cuts of one region of a sparse graph: many small Fiedler problems, solved where they arise."""

from __future__ import annotations

import numpy as np

from sparsespec._kernels._compile import kernel

# The null vector of the Laplacian is taken out by hand; the shift only has to keep the factorisation positive.
_SHIFT = 1e-7
_MAX_ITERATIONS = 60


@kernel(fastmath=True)
def _dot(a, b, n):  # float64[:], float64[:], int -> float64
    total = 0.0
    for i in range(n):
        total += a[i] * b[i]
    return total


@kernel(fastmath=True)
def _factor_band(band, first, n, width):  # float64[:, width + 1], int64[:] -> in place
    """Cholesky factor of a symmetric band matrix within its envelope; row i holds the columns i - width .. i."""
    for i in range(n):
        row = band[i]
        for j in range(first[i], i):
            start = max(first[i], first[j])
            total = row[j - i + width]
            left = row[start - i + width : j - i + width]
            right = band[j, start - j + width : width]
            for q in range(j - start):
                total -= left[q] * right[q]
            row[j - i + width] = total / band[j, width]
        diagonal = row[width]
        for q in range(first[i] - i + width, width):
            diagonal -= row[q] * row[q]
        row[width] = np.sqrt(max(diagonal, 1e-300))


@kernel(fastmath=True)
def _solve_band(band, first, n, width, x):  # float64[:] x in place
    for i in range(n):
        total = x[i]
        row = band[i]
        for j in range(first[i], i):
            total -= row[j - i + width] * x[j]
        x[i] = total / row[width]
    for i in range(n - 1, -1, -1):
        row = band[i]
        x[i] /= row[width]
        value = x[i]
        for j in range(first[i], i):
            x[j] -= row[j - i + width] * value


@kernel()
def _remove(x, basis, n):
    """Take the component along a unit vector out of x."""
    along = _dot(x, basis, n)
    for i in range(n):
        x[i] -= along * basis[i]


@kernel()
def _apply_laplacian(indptr, indices, data, tokens, local, inverse_root, n, x, out):
    for i in range(n):
        total = 0.0
        token = tokens[i]
        for e in range(indptr[token], indptr[token + 1]):
            j = local[indices[e]]
            if j >= 0:
                total += data[e] * inverse_root[j] * x[j]
        out[i] = x[i] - inverse_root[i] * total


@kernel()
def _fiedler(indptr, indices, data, tokens, local, degree, tolerance):
    """Two smallest nontrivial eigenvectors of a connected region's normalised Laplacian, by block inverse iteration.

    Returns (2, n) random-walk eigenvectors D^-1/2 u, of the first the eigenvalue and the residual ||L u - lambda u||,
    and how many iterations ran.
    """
    n = tokens.size
    inverse_root = np.empty(n)
    trivial = np.empty(n)
    volume = 0.0
    for i in range(n):
        volume += degree[i]
        inverse_root[i] = 1.0 / np.sqrt(degree[i])
    for i in range(n):
        trivial[i] = np.sqrt(degree[i] / volume)

    first = np.empty(n, np.int64)
    width = 0
    for i in range(n):
        first[i] = i
        token = tokens[i]
        for e in range(indptr[token], indptr[token + 1]):
            j = local[indices[e]]
            if j >= 0 and j < first[i]:
                first[i] = j
        width = max(width, i - first[i])
    band = np.zeros((n, width + 1))
    for i in range(n):
        band[i, width] = 1.0 + _SHIFT
        token = tokens[i]
        for e in range(indptr[token], indptr[token + 1]):
            j = local[indices[e]]
            if j >= 0 and j < i:
                band[i, j - i + width] = -data[e] * inverse_root[i] * inverse_root[j]
    _factor_band(band, first, n, width)

    # Position along the ordering is close to the smoothest vector of a long region; the second start has a share of
    # every eigenvector, and neither draws a random number.
    a, b = np.empty(n), np.empty(n)
    la, lb = np.empty(n), np.empty(n)
    for i in range(n):
        a[i] = (i - 0.5 * (n - 1)) / inverse_root[i]
        b[i] = np.cos(2.3 * i + 0.7) / inverse_root[i]
    iterations, value, error = 0, 0.0, 0.0
    for sweep in range(_MAX_ITERATIONS):
        iterations = sweep + 1
        _solve_band(band, first, n, width, a)
        _solve_band(band, first, n, width, b)
        _remove(a, trivial, n)
        norm = np.sqrt(_dot(a, a, n))
        if norm < 1e-200:
            break
        for i in range(n):
            a[i] /= norm
        _remove(a, trivial, n)
        size = np.sqrt(_dot(b, b, n))
        _remove(b, trivial, n)
        _remove(b, a, n)
        norm = np.sqrt(_dot(b, b, n))
        if norm < 1e-12 * size:
            # Two tokens have one nontrivial eigenvector.
            _apply_laplacian(indptr, indices, data, tokens, local, inverse_root, n, a, la)
            value = _dot(a, la, n)
            break
        for i in range(n):
            b[i] /= norm
        _remove(b, trivial, n)
        _remove(b, a, n)
        # Rayleigh-Ritz in the plane of the two.
        _apply_laplacian(indptr, indices, data, tokens, local, inverse_root, n, a, la)
        _apply_laplacian(indptr, indices, data, tokens, local, inverse_root, n, b, lb)
        aa, ab, bb = _dot(a, la, n), _dot(a, lb, n), _dot(b, lb, n)
        angle = 0.5 * np.arctan2(2.0 * ab, aa - bb) + 0.5 * np.pi
        c, s = np.cos(angle), np.sin(angle)
        residual = 0.0
        value = c * c * aa + 2.0 * c * s * ab + s * s * bb
        for i in range(n):
            low, low_l = c * a[i] + s * b[i], c * la[i] + s * lb[i]
            b[i] = -s * a[i] + c * b[i]
            a[i] = low
            residual += (low_l - value * low) ** 2
        error = np.sqrt(residual)
        if error <= tolerance * value or value < 1e-12:
            break
    vectors = np.empty((2, n))
    for i in range(n):
        vectors[0, i] = a[i] * inverse_root[i]
        vectors[1, i] = b[i] * inverse_root[i]
    return vectors, value, error, iterations


@kernel()
def _best_sweep(indptr, indices, data, tokens, local, degree, vector, inside):
    """Cut a region along the order of a vector where the normalised cut is smallest: value, order, how many before."""
    n = tokens.size
    order = np.argsort(vector, kind="mergesort")
    total = 0.0
    for i in range(n):
        total += degree[i]
        inside[i] = False
    cut, volume = 0.0, 0.0
    best, position = np.inf, 0
    for step in range(n - 1):
        i = order[step]
        token = tokens[i]
        for e in range(indptr[token], indptr[token + 1]):
            j = local[indices[e]]
            if j >= 0:
                if inside[j]:
                    cut -= data[e]
                else:
                    cut += data[e]
        inside[i] = True
        volume += degree[i]
        value = cut / volume + cut / max(total - volume, 1e-300)
        if value < best:
            best, position = value, step + 1
    return max(best, 0.0), order, position


@kernel()
def _best_of_sweeps(indptr, indices, data, tokens, local, degree, vectors):
    """Cut a region along whichever of the vectors' orders has the smallest normalised cut, as _best_sweep does."""
    inside = np.empty(tokens.size, np.bool_)
    value, order, position = _best_sweep(indptr, indices, data, tokens, local, degree, vectors[0], inside)
    for k in range(1, vectors.shape[0]):
        other, other_order, other_position = _best_sweep(
            indptr, indices, data, tokens, local, degree, vectors[k], inside
        )
        if other < value:
            value, order, position = other, other_order, other_position
    return value, order, position


@kernel()
def _order_by_component(indptr, indices, tokens, local, bounds):
    """Reorder sorted tokens so that each connected component is one sorted run; fill bounds with the runs' ends.

    Returns how many there are.
    """
    n = tokens.size
    for i in range(n):
        local[tokens[i]] = i
    component = np.full(n, -1, np.int64)
    queue = np.empty(n, np.int64)
    count = 0
    for start in range(n):
        if component[start] >= 0:
            continue
        component[start] = count
        queue[0] = start
        head, filled = 0, 1
        while head < filled:
            token = tokens[queue[head]]
            head += 1
            for e in range(indptr[token], indptr[token + 1]):
                j = local[indices[e]]
                if j >= 0 and component[j] < 0:
                    component[j] = count
                    queue[filled] = j
                    filled += 1
        bounds[count] = filled
        count += 1
    for i in range(n):
        local[tokens[i]] = -1
    # Sizes become ends; counting from the back fills each run from its end.
    for c in range(1, count):
        bounds[c] += bounds[c - 1]
    if count > 1:
        ordered = tokens.copy()
        for i in range(n - 1, -1, -1):
            bounds[component[i]] -= 1
            tokens[bounds[component[i]]] = ordered[i]
        for c in range(count - 1):
            bounds[c] = bounds[c + 1]
        bounds[count - 1] = n
    return count


@kernel()
def _enter(indptr, indices, data, mine, local):
    """Number a region's tokens in local, and sum the weights of each token's edges inside."""
    degree = np.zeros(mine.size)
    for i in range(mine.size):
        local[mine[i]] = i
    for i in range(mine.size):
        for e in range(indptr[mine[i]], indptr[mine[i] + 1]):
            if local[indices[e]] >= 0:
                degree[i] += data[e]
    return degree


@kernel()
def cut_region(indptr, indices, data, mine, local, tolerance):
    # int32[:], int32[:], float64[:], int32[:] sorted, int32[:] of -1, float
    # -> value, order, position, eigenvalue, residual, iterations
    """Smallest normalised cut of a connected region along either of its two smoothest eigenvectors.

    The tokens ``mine[order[:position]]`` are one side.
    """
    degree = _enter(indptr, indices, data, mine, local)
    vectors, eigenvalue, residual, ran = _fiedler(indptr, indices, data, mine, local, degree, tolerance)
    value, order, position = _best_of_sweeps(indptr, indices, data, mine, local, degree, vectors)
    for i in range(mine.size):
        local[mine[i]] = -1
    return value, order, position, eigenvalue, residual, ran


@kernel()
def sweep_region(indptr, indices, data, mine, local, vectors):
    # as cut_region, with (k, n) float64 random-walk eigenvectors from elsewhere -> value, order, position
    """Smallest normalised cut of a connected region along any of the given vectors."""
    degree = _enter(indptr, indices, data, mine, local)
    value, order, position = _best_of_sweeps(indptr, indices, data, mine, local, degree, vectors)
    for i in range(mine.size):
        local[mine[i]] = -1
    return value, order, position


@kernel()
def components(indptr, indices, tokens):
    # int32[:], int32[:], int32[:] sorted -> tokens, ends
    """Connected components of a region: its tokens, component by component and sorted in each, and where each ends."""
    ordered = tokens.copy()
    bounds = np.empty(tokens.size + 1, np.int64)
    local = np.full(indptr.size - 1, -1, np.int32)
    count = _order_by_component(indptr, indices, ordered, local, bounds)
    return ordered, bounds[:count]


@kernel()
def split_tree(indptr, indices, data, region, birth_of_region, largest_cut, tolerance):
    # int32[:], int32[:], float64[:], int32[:] sorted, floats
    # -> tokens, starts, ends, births, cuts, largest residual, iterations
    """All regions that recursive normalised cuts make of one region, for every threshold up to `largest_cut` at once.

    The regions are runs of one array of tokens, since every split only reorders its own run. A region is part of the
    partition at threshold t when birth <= t < cut: all cuts above it were made, its own is not.
    """
    size = region.size
    tokens = region.copy()
    local = np.full(indptr.size - 1, -1, np.int32)
    starts, ends = np.empty(2 * size, np.int64), np.empty(2 * size, np.int64)
    births, cuts = np.empty(2 * size), np.empty(2 * size)
    bounds = np.empty(size + 1, np.int64)
    regions, iterations, largest_residual = 0, 0, 0.0

    count = _order_by_component(indptr, indices, tokens, local, bounds)
    begin = 0
    for c in range(count):
        starts[regions], ends[regions], births[regions] = begin, bounds[c], birth_of_region
        regions += 1
        begin = bounds[c]

    node = 0
    while node < regions:
        start, end, birth = starts[node], ends[node], births[node]
        mine = tokens[start:end]
        n = end - start
        cuts[node] = np.inf
        if n >= 2:
            value, order, position, _, residual, ran = cut_region(indptr, indices, data, mine, local, tolerance)
            iterations += ran
            largest_residual = max(largest_residual, residual)
            cuts[node] = value
            if value <= largest_cut:
                kept = mine.copy()
                first_side = np.zeros(n, np.bool_)
                first_side[order[:position]] = True
                below, above = 0, position
                for i in range(n):
                    if first_side[i]:
                        mine[below] = kept[i]
                        below += 1
                    else:
                        mine[above] = kept[i]
                        above += 1
                for side in range(2):
                    left = start if side == 0 else start + position
                    right = start + position if side == 0 else end
                    part = tokens[left:right]
                    count = _order_by_component(indptr, indices, part, local, bounds)
                    begin = left
                    for c in range(count):
                        starts[regions], ends[regions] = begin, left + bounds[c]
                        births[regions] = max(birth, value)
                        regions += 1
                        begin = left + bounds[c]
        node += 1
    return tokens, starts[:regions], ends[:regions], births[:regions], cuts[:regions], largest_residual, iterations
