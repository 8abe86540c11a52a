"""BoC affinity of four tokens with eight others at a time, in 16-bit integers: approximate, and many pairs a second.

Features become 16-bit integers. For integers there is no order of summation to keep, so that a sum is spread over the
lanes of a vector register as it comes and still has the same value on every machine; and a register holds twice as
many of them as of float32. With d = sum|a - b|, t = sum max(|a|, |b|) and c = max|a - b|, sum|a + b| = 2 t - d and

    BoC = (1 + c) / (1 + d / (2 t - d)) = (1 + c) (1 - d / (2 t)).

The compiler doesn't find this form in a plain loop (an eighth of the speed), hence the instructions are written out
for it, for vectors of any machine. Without compilation :func:`compare` is NumPy.
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

# Queries and candidates of one comparison, and the channels that lie side by side in a tile: one candidate's four
# channels are copied as one 64-bit word.
QUERIES = 4
CANDIDATES = 8
GROUP = 4
LANES = CANDIDATES * GROUP


def _compare_plain(queries, queries_abs, first, tile, tile_abs, unit, thresholds, values):
    # int64(int16[Q, C], int16[Q, C], intp, int16[C / 4, 32], int16[C / 4, 32], float32, float32[Q], float32[4, 8])
    found = 0
    split = (-1, CANDIDATES, GROUP)
    b = tile.reshape(split).transpose(1, 0, 2).reshape(CANDIDATES, -1).astype(np.int32)
    b_abs = tile_abs.reshape(split).transpose(1, 0, 2).reshape(CANDIDATES, -1).astype(np.int32)
    one = np.float32(1)
    for q in range(QUERIES):
        a = queries[first + q].astype(np.int32)
        difference = np.abs(a - b)
        d = difference.sum(axis=1).astype(np.float32)
        t = (2 * np.maximum(queries_abs[first + q].astype(np.int32), b_abs).sum(axis=1)).astype(np.float32)
        c = difference.max(axis=1).astype(np.float32)
        values[q] = (one + c * unit) * ((t - d) / np.maximum(t, one))
        for j in np.flatnonzero(values[q] > thresholds[first + q]):
            found |= 1 << (q * CANDIDATES + int(j))
    return found


@intrinsic
def _compare_compiled(typing_context, queries, queries_abs, first, tile, tile_abs, unit, thresholds, values):
    signature = types.int64(queries, queries_abs, first, tile, tile_abs, unit, thresholds, values)

    def generate(context, builder, signature, arguments):
        i8, i16, i32, i64, f32 = *(ir.IntType(bits) for bits in (8, 16, 32, 64)), ir.FloatType()
        words, lanes = ir.VectorType(i16, LANES), ir.VectorType(i32, CANDIDATES)
        pairs, quads = ir.VectorType(i32, LANES // 2), ir.VectorType(i64, CANDIDATES)
        floats = ir.VectorType(f32, CANDIDATES)

        def constant(kind, value):
            return ir.Constant(kind, [value] * kind.count)

        def array(place):
            return context.make_array(signature.args[place])(context, builder, arguments[place])

        def splat(scalar, count):
            kind = ir.VectorType(scalar.type, count)
            single = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(i32, 0))
            return builder.shuffle_vector(single, single, ir.Constant(ir.VectorType(i32, count), [0] * count))

        def largest(a, b):
            return builder.select(builder.icmp_signed(">", a, b), a, b)

        query, query_abs, tiles, tiles_abs = (array(place).data for place in (0, 1, 3, 4))
        limits, out = array(6).data, array(7).data
        channels = builder.extract_value(array(0).shape, 1)
        steps = builder.extract_value(array(3).shape, 0)
        start = builder.mul(arguments[2], channels)

        before = builder.block
        loop = builder.append_basic_block("channels")
        after = builder.append_basic_block("after")
        builder.branch(loop)
        builder.position_at_end(loop)
        step = builder.phi(i64)
        step.add_incoming(ir.Constant(i64, 0), before)
        sums = [[builder.phi(words) for _ in range(3)] for _ in range(QUERIES)]
        for one in sums:
            for total in one:
                total.add_incoming(constant(words, 0), before)

        def tile_row(base):
            pointer = builder.gep(base, [builder.mul(step, ir.Constant(i64, LANES))])
            return builder.load(builder.bitcast(pointer, words.as_pointer()), align=2)

        def four_channels(base, q):
            # The same four channels of a query in front of every candidate.
            offset = builder.add(start, builder.mul(channels, ir.Constant(i64, q)))
            offset = builder.add(offset, builder.mul(step, ir.Constant(i64, GROUP)))
            word = builder.load(builder.bitcast(builder.gep(base, [offset]), i64.as_pointer()), align=2)
            return builder.bitcast(splat(word, CANDIDATES), words)

        b, b_abs = tile_row(tiles), tile_row(tiles_abs)
        renewed = []
        for q in range(QUERIES):
            difference = builder.sub(four_channels(query, q), b)
            difference = largest(difference, builder.sub(constant(words, 0), difference))
            renewed.append(
                [
                    builder.add(sums[q][0], difference),
                    builder.add(sums[q][1], largest(four_channels(query_abs, q), b_abs)),
                    largest(difference, sums[q][2]),
                ]
            )
        following = builder.add(step, ir.Constant(i64, 1))
        step.add_incoming(following, loop)
        for one, new in zip(sums, renewed, strict=True):
            for total, value in zip(one, new, strict=True):
                total.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", following, steps), loop, after)
        builder.position_at_end(after)

        def fold(vector, combine):
            # Four 16-bit lanes of one candidate, all at least 0, into one of 32 bits.
            wide = builder.bitcast(vector, pairs)
            both = combine(builder.and_(wide, constant(pairs, 0xFFFF)), builder.lshr(wide, constant(pairs, 16)))
            wide = builder.bitcast(both, quads)
            return combine(builder.trunc(wide, lanes), builder.trunc(builder.lshr(wide, constant(quads, 32)), lanes))

        found = ir.Constant(i64, 0)
        unit_of_all = splat(arguments[5], CANDIDATES)
        one = constant(floats, 1.0)
        for q in range(QUERIES):
            d = builder.sitofp(fold(renewed[q][0], builder.add), floats)
            t = fold(renewed[q][1], builder.add)
            t = builder.add(t, t)
            # Two rows of zeros: 0 / 1.
            below = builder.sitofp(largest(t, constant(lanes, 1)), floats)
            t = builder.sitofp(t, floats)
            c = builder.sitofp(fold(renewed[q][2], largest), floats)
            value = builder.fmul(
                builder.fadd(one, builder.fmul(c, unit_of_all)), builder.fdiv(builder.fsub(t, d), below)
            )
            pointer = builder.gep(out, [ir.Constant(i64, q * CANDIDATES)])
            builder.store(value, builder.bitcast(pointer, floats.as_pointer()), align=4)
            limit = builder.gep(limits, [builder.add(arguments[2], ir.Constant(i64, q))])
            above = builder.fcmp_ordered(">", value, splat(builder.load(limit), CANDIDATES))
            bits = builder.zext(builder.bitcast(above, i8), i64)
            found = builder.or_(found, builder.shl(bits, ir.Constant(i64, q * CANDIDATES)))
        return found

    return signature, generate


if numba.config.DISABLE_JIT:
    compare = _compare_plain
else:
    compare = _compare_compiled
