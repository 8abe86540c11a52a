"""Bray-Curtis over Chebyshev of a pair of tokens, of tiles of pairs, of listed pairs and of every pair.

With d = |u - v|, channel by channel, the affinity needs sum d, max d and sum |u + v|. Since
|u - v| + |u + v| = 2 max(|u|, |v|), the third follows from M = sum max(|u|, |v|), which is one operation less per
channel::

    BoC = (1 + max d) / (1 + sum d / sum |u + v|) = (1 + max d) (2 M - sum d) / (2 M)

Every function here adds the channels of a pair one after the other, from the first to the last, in float32 with plain
IEEE arithmetic, both sums in the same order. So all of them return the same bits for the same pair, in either order of
the pair, on any processor and any number of threads; copies have exactly 1, opposites (u = -v) and two rows of zeros
exactly 0. An affinity is off by a few float32 roundings of 1 + max d.

Tiles are computed by code that keeps all sums of a tile of pairs in vector registers over the whole loop of channels,
which no compiler makes from nested loops by itself. It is written as vectors of LLVM, which every processor gets in
registers of its own width, and again as NumPy for runs without compilation. Maxima of numbers that aren't negative
are taken as integers: the order is the same, and other units of the processor are busy with it.
"""

from __future__ import annotations

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sparsespec._kernels._compile import device, kernel

LANES = 16


def _wide_registers() -> bool:
    try:
        return bool(llvmlite.binding.get_host_cpu_features().get("avx512f"))
    except RuntimeError:
        return False


# A tile of the comparison of all tokens is ROWS tokens against COLUMNS others: three sums for every pair have to fit
# into the registers, beside the operands.
ROWS, VECTORS = (4, 2) if _wide_registers() else (2, 1)
COLUMNS = LANES * VECTORS
# A tile of the comparison within a window is LANES tokens side by side against SHIFTS neighbours of each.
SHIFTS = 3

# The index of a prange loop is unsigned, and unsigned with signed makes a float: hence np.intp around each.


@device()
def pair_affinity(features, i, j):
    # float32(float32[N, C], intp, intp): of two different tokens
    difference = np.float32(0.0)
    larger = np.float32(0.0)
    largest = np.float32(0.0)
    for c in range(features.shape[1]):
        a = features[i, c]
        b = features[j, c]
        d = abs(a - b)
        difference += d
        largest = d if d > largest else largest
        larger += max(abs(a), abs(b))
    both = larger + larger
    rest = both - difference
    if not rest > np.float32(0.0):
        return np.float32(0.0)
    return (np.float32(1.0) + largest) * (rest / both)


class _Vectors:
    """Vectors of LANES float32 in LLVM, as the two kinds of tiles need them."""

    single = ir.FloatType()
    whole = ir.IntType(32)
    floats = ir.VectorType(single, LANES)
    integers = ir.VectorType(whole, LANES)

    def __init__(self, context, builder, signature, arguments):
        self.builder = builder
        self.zero = ir.Constant(self.floats, [0.0] * LANES)
        self.one = ir.Constant(self.floats, [1.0] * LANES)
        self._fabs = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(self.floats, [self.floats]), f"llvm.fabs.v{LANES}f32"
        )
        self.values = [
            context.make_array(kind)(context, builder, value).data if isinstance(kind, types.Array) else value
            for kind, value in zip(signature.args, arguments, strict=True)
        ]

    def load(self, pointer, kind=None):
        return self.builder.load(self.builder.bitcast(pointer, (kind or self.floats).as_pointer()), align=4)

    def store(self, vector, pointer):
        self.builder.store(vector, self.builder.bitcast(pointer, vector.type.as_pointer()), align=4)

    def spread(self, scalar):
        undefined = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
        first = self.builder.insert_element(undefined, scalar, self.whole(0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(self.integers, [0] * LANES))

    def abs(self, vector):
        return self.builder.call(self._fabs, [vector])

    def largest(self, first, second):
        # Of numbers without a sign.
        a, b = (self.builder.bitcast(vector, self.integers) for vector in (first, second))
        return self.builder.bitcast(self.builder.select(self.builder.icmp_signed(">", a, b), a, b), self.floats)

    def sums(self):
        return [cgutils.alloca_once_value(self.builder, self.zero) for _ in range(3)]

    def add(self, sums, a, b, a_abs, b_abs):
        difference, larger, largest = sums
        builder = self.builder
        d = self.abs(builder.fsub(a, b))
        builder.store(builder.fadd(builder.load(difference), d), difference)
        builder.store(builder.fadd(builder.load(larger), self.largest(a_abs, b_abs)), larger)
        builder.store(self.largest(d, builder.load(largest)), largest)

    def affinity(self, sums):
        # NaN, which stands where there is no token, becomes 0.
        builder = self.builder
        difference, larger, largest = (builder.load(place) for place in sums)
        both = builder.fadd(larger, larger)
        rest = builder.fsub(both, difference)
        value = builder.fmul(builder.fadd(self.one, largest), builder.fdiv(rest, both))
        return builder.select(builder.fcmp_ordered(">", rest, self.zero), value, self.zero)


def _add_all_against_all(vectors, rows, columns, channels):
    # rows -> [channels, 2 ROWS]: values and magnitudes; columns -> [channels, COLUMNS]
    builder, whole = vectors.builder, channels.type
    sums = [[vectors.sums() for _ in range(VECTORS)] for _ in range(ROWS)]
    with cgutils.for_range(builder, channels) as loop:
        column = builder.gep(columns, [builder.mul(loop.index, whole(COLUMNS))])
        row = builder.gep(rows, [builder.mul(loop.index, whole(2 * ROWS))])
        b = [vectors.load(builder.gep(column, [whole(v * LANES)])) for v in range(VECTORS)]
        b_abs = [vectors.abs(vector) for vector in b]
        for r in range(ROWS):
            a = vectors.spread(builder.load(builder.gep(row, [whole(r)])))
            a_abs = vectors.spread(builder.load(builder.gep(row, [whole(ROWS + r)])))
            for v in range(VECTORS):
                vectors.add(sums[r][v], a, b[v], a_abs, b_abs[v])
    return [[vectors.affinity(sums[r][v]) for v in range(VECTORS)] for r in range(ROWS)]


if numba.config.DISABLE_JIT:

    def _affinities(a, b):
        # float32[..., LANES] from float32[C, ..., 1 or LANES] twice
        shape = np.broadcast_shapes(a.shape, b.shape)[1:]
        difference, larger, largest = (np.zeros(shape, np.float32) for _ in range(3))
        for x, y in zip(a, b, strict=True):
            d = np.abs(x - y)
            difference += d
            larger += np.maximum(np.abs(x), np.abs(y))
            largest = np.maximum(largest, d)
        both = larger + larger
        rest = both - difference
        with np.errstate(invalid="ignore"):
            return np.where(rest > 0, (1 + largest) * (rest / both), np.float32(0))

    def _of_tile(rows, quad, columns, panel):
        return _affinities(rows[quad, :, :ROWS, None], columns[panel][:, None, :])

    def tile_affinities(rows, quad, columns, panel, out):
        out[...] = _of_tile(rows, quad, columns, panel)

    def tile_hits(rows, quad, columns, panel, thresholds, out, hits):
        out[...] = _of_tile(rows, quad, columns, panel)
        of_rows = thresholds[quad * ROWS : quad * ROWS + ROWS, None]
        of_columns = thresholds[panel * COLUMNS : panel * COLUMNS + COLUMNS]
        lanes = np.arange(COLUMNS, dtype=np.uint64)
        hits[:] = ((out >= of_rows).astype(np.uint64) << lanes).sum(axis=1)
        hits[:] += ((out >= of_columns).astype(np.uint64) << (lanes + np.uint64(32))).sum(axis=1)
        return int(hits.any())

    def window_affinities(lines, here, there, stride, channels, out, slot):
        flat = lines.reshape(-1)
        step = np.arange(channels)[:, None] * stride + np.arange(LANES)
        for s in range(SHIFTS):
            out[slot + s] = _affinities(flat[here + step], flat[there + s + step])

    def count_at_least(keys, slots, least, counts):
        counts[:] = (keys[:slots] >= least).sum(axis=0)

    def lanes_at_least(keys, slots, least, out):
        out[:slots] = ((keys[:slots] >= least) << np.arange(LANES)).sum(axis=1)

    def lowest_bit(bits):
        return (int(bits) & -int(bits)).bit_length() - 1

else:

    @intrinsic
    def tile_affinities(_, rows, quad, columns, panel, out):
        # void(float32[Q, C, 2 ROWS], intp, float32[P, C, COLUMNS], intp, float32[ROWS, COLUMNS])
        signature = types.void(rows, types.intp, columns, types.intp, out)

        def generate(context, builder, signature, arguments):
            vectors = _Vectors(context, builder, signature, arguments)
            _tile(vectors, context, signature, arguments, vectors.values[4])
            return context.get_dummy_value()

        return signature, generate

    @intrinsic
    def tile_hits(_, rows, quad, columns, panel, thresholds, out, hits):
        # intp(..., float32[Q ROWS], float32[ROWS, COLUMNS], uint64[ROWS]): also which affinities reach the threshold
        # of the row, bits from 0, and which that of the column, bits from 32; not 0 if any does
        signature = types.intp(rows, types.intp, columns, types.intp, thresholds, out, hits)

        def generate(context, builder, signature, arguments):
            vectors = _Vectors(context, builder, signature, arguments)
            _, quad, _, panel, thresholds, out, hits = vectors.values
            found = _tile(vectors, context, signature, arguments, out)
            whole = quad.type
            of_rows = builder.gep(thresholds, [builder.mul(quad, whole(ROWS))])
            of_columns = builder.gep(thresholds, [builder.mul(panel, whole(COLUMNS))])
            columns = [vectors.load(builder.gep(of_columns, [whole(v * LANES)])) for v in range(VECTORS)]
            together = whole(0)
            for r in range(ROWS):
                row = vectors.spread(builder.load(builder.gep(of_rows, [whole(r)])))
                bits = whole(0)
                for v in range(VECTORS):
                    for threshold, place in ((row, v * LANES), (columns[v], 32 + v * LANES)):
                        reached = builder.fcmp_ordered(">=", found[r][v], threshold)
                        lanes = builder.zext(builder.bitcast(reached, ir.IntType(LANES)), whole)
                        bits = builder.or_(bits, builder.shl(lanes, whole(place)))
                builder.store(bits, builder.gep(hits, [whole(r)]))
                together = builder.or_(together, bits)
            return together

        return signature, generate

    @intrinsic
    def window_affinities(_, lines, here, there, stride, channels, out, slot):
        # void(float32[...], intp, intp, intp, intp, float32[P, LANES], intp): LANES tokens from `here`, channels
        # `stride` apart, against those from `there`, from `there + 1`, ..., into out[slot], out[slot + 1], ...
        signature = types.void(lines, types.intp, types.intp, types.intp, types.intp, out, types.intp)

        def generate(context, builder, signature, arguments):
            vectors = _Vectors(context, builder, signature, arguments)
            lines, here, there, stride, channels, out, slot = vectors.values
            whole = here.type
            sums = [vectors.sums() for _ in range(SHIFTS)]
            with cgutils.for_range(builder, channels) as loop:
                line = builder.gep(lines, [builder.mul(loop.index, stride)])
                a = vectors.load(builder.gep(line, [here]))
                a_abs = vectors.abs(a)
                for s in range(SHIFTS):
                    b = vectors.load(builder.gep(line, [builder.add(there, whole(s))]))
                    vectors.add(sums[s], a, b, a_abs, vectors.abs(b))
            for s in range(SHIFTS):
                place = builder.mul(builder.add(slot, whole(s)), whole(LANES))
                vectors.store(vectors.affinity(sums[s]), builder.gep(out, [place]))
            return context.get_dummy_value()

        return signature, generate

    @intrinsic
    def count_at_least(_, keys, slots, least, counts):
        # void(int32[P, LANES], intp, int32[LANES], int32[LANES]): in every lane
        signature = types.void(keys, types.intp, least, counts)

        def generate(context, builder, signature, arguments):
            vectors = _Vectors(context, builder, signature, arguments)
            keys, slots, least, counts = vectors.values
            floor = vectors.load(least, vectors.integers)
            total = cgutils.alloca_once_value(builder, ir.Constant(vectors.integers, [0] * LANES))
            with cgutils.for_range(builder, slots) as loop:
                pointer = builder.gep(keys, [builder.mul(loop.index, slots.type(LANES))])
                reached = builder.icmp_signed(">=", vectors.load(pointer, vectors.integers), floor)
                builder.store(builder.sub(builder.load(total), builder.sext(reached, vectors.integers)), total)
            vectors.store(builder.load(total), counts)
            return context.get_dummy_value()

        return signature, generate

    @intrinsic
    def lanes_at_least(_, keys, slots, least, out):
        # void(int32[P, LANES], intp, int32[LANES], uint16[P]): which lanes, a bit for each
        signature = types.void(keys, types.intp, least, out)

        def generate(context, builder, signature, arguments):
            vectors = _Vectors(context, builder, signature, arguments)
            keys, slots, least, out = vectors.values
            floor = vectors.load(least, vectors.integers)
            with cgutils.for_range(builder, slots) as loop:
                pointer = builder.gep(keys, [builder.mul(loop.index, slots.type(LANES))])
                reached = builder.icmp_signed(">=", vectors.load(pointer, vectors.integers), floor)
                builder.store(builder.bitcast(reached, ir.IntType(LANES)), builder.gep(out, [loop.index]))
            return context.get_dummy_value()

        return signature, generate

    @intrinsic
    def lowest_bit(_, bits):
        # intp(uint64): the number of the lowest bit that is set
        signature = types.intp(types.uint64)

        def generate(context, builder, signature, arguments):
            return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

        return signature, generate


def _tile(vectors, context, signature, arguments, out):
    # Affinities of a tile of all against all, as vectors and into `out`.
    builder = vectors.builder
    rows, quad, columns, panel = vectors.values[:4]
    whole = quad.type
    shape = context.make_array(signature.args[0])(context, builder, arguments[0]).shape
    channels = builder.extract_value(shape, 1)
    found = _add_all_against_all(
        vectors,
        builder.gep(rows, [builder.mul(builder.mul(quad, channels), whole(2 * ROWS))]),
        builder.gep(columns, [builder.mul(builder.mul(panel, channels), whole(COLUMNS))]),
        channels,
    )
    for r in range(ROWS):
        for v in range(VECTORS):
            vectors.store(found[r][v], builder.gep(out, [whole(r * COLUMNS + v * LANES)]))
    return found


@device()
def pack(features, panel, rows, columns):
    # void(float32[N, C], intp, float32[Q, C, 2 ROWS], float32[P, C, COLUMNS]): the tokens of one panel, for tiles
    size, channels = features.shape
    start = panel * COLUMNS
    for k in range(COLUMNS):
        i = start + k
        quad = i // ROWS
        r = i - quad * ROWS
        for c in range(channels):
            value = features[i, c] if i < size else np.float32(np.nan)
            columns[panel, c, k] = value
            rows[quad, c, r] = value
            rows[quad, c, ROWS + r] = abs(value)


@kernel(parallel=True)
def all_pairs(features, rows, columns, out):
    # void(float32[N, C], float32[Q, C, 2 ROWS], float32[P, C, COLUMNS], float32[N, N]): rows, columns: to work with
    size = features.shape[0]
    panels = columns.shape[0]
    for part in numba.prange(panels):
        pack(features, np.intp(part), rows, columns)
    # A panel is compared with the tokens before it: the first and the last panel together make an even load.
    for couple in numba.prange((panels + 1) // 2):
        tile = np.empty((ROWS, COLUMNS), np.float32)
        for end in range(2):
            panel = np.intp(couple) if end == 0 else panels - 1 - np.intp(couple)
            if end == 1 and panel == np.intp(couple):
                continue
            start = panel * COLUMNS
            stop = min(start + COLUMNS, size)
            for quad in range((stop + ROWS - 1) // ROWS):
                tile_affinities(rows, quad, columns, panel, tile)
                first = quad * ROWS
                last = min(first + ROWS, size)
                for i in range(first, last):
                    for j in range(max(start, i), stop):
                        out[i, j] = tile[i - first, j - start]
                for j in range(max(start, first), stop):
                    for i in range(first, min(j, last)):
                        out[j, i] = tile[i - first, j - start]
            for i in range(start, stop):
                out[i, i] = np.float32(1.0)


@kernel()
def listed_pairs(features, first, second, out):
    # void(float32[N, C], intp[E], intp[E], float64[E])
    for pair in range(first.size):
        i = first[pair]
        j = second[pair]
        out[pair] = pair_affinity(features, i, j) if i != j else np.float32(1.0)
