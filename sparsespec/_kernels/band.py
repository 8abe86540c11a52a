"""Cholesky factor of a symmetric band matrix in blocks of 8 x 8, and solves with it for two vectors at once.

A region of a token grid has a band of 5 to 20, where row-wise loops are all start and no run. Blocks of eight give
every loop a fixed length, one vector register of AVX-512 or two of AVX2, and a chain of dependent operations eight
times shorter. The three innermost steps are written in LLVM's vector types, since the loop vectoriser doesn't see
them; beside each stands the same in plain Python, which says what it computes.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from sparsespec._kernels._compile import device

BLOCK = 8
_AREA = BLOCK * BLOCK

_DOUBLE = ir.DoubleType()
_VECTOR = ir.VectorType(_DOUBLE, BLOCK)
_LANE = ir.IntType(32)


def _shuffle(builder, first, second, lanes):
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_LANE, BLOCK), list(lanes)))


def _splat(builder, vector, lane):
    return _shuffle(builder, vector, vector, [lane] * BLOCK)


def _fma(builder, total, left, right):
    # "contract" lets the two become one instruction where the processor has it.
    return builder.fadd(total, builder.fmul(left, right, flags=("contract",)), flags=("contract",))


def _load(builder, pointer, offset):
    place = builder.bitcast(builder.gep(pointer, [offset]), _VECTOR.as_pointer())
    return builder.load(place, align=8)


def _store(builder, vector, pointer, offset):
    place = builder.bitcast(builder.gep(pointer, [offset]), _VECTOR.as_pointer())
    builder.store(vector, place, align=8)


def _sums(builder, vectors):
    """Sum of each of eight vectors, as one vector."""
    plans = (([0, 8, 2, 10, 4, 12, 6, 14], 1), ([0, 1, 8, 9, 4, 5, 12, 13], 2), ([0, 1, 2, 3, 8, 9, 10, 11], 4))
    for lanes, step in plans:
        vectors = [
            builder.fadd(
                _shuffle(builder, first, second, lanes), _shuffle(builder, first, second, [q + step for q in lanes])
            )
            for first, second in zip(vectors[::2], vectors[1::2], strict=True)
        ]
    return vectors[0]


def _times(builder, pointer, offset, vector, total):
    """Add block times vector, the block by columns."""
    size = offset.type
    for k in range(BLOCK):
        column = _load(builder, pointer, builder.add(offset, size(BLOCK * k)))
        total = _fma(builder, total, column, _splat(builder, vector, k))
    return total


def _unpack(context, builder, signature, args):
    """Arrays become pointers to their data, integers the machine's."""
    out = []
    for kind, value in zip(signature.args, args, strict=True):
        if isinstance(kind, types.Array):
            out.append(context.make_array(kind)(context, builder, value).data)
        else:
            out.append(context.cast(builder, value, kind, types.intp))
    return out


def _zero():
    return ir.Constant(_VECTOR, [0.0] * BLOCK)


@intrinsic
def _multiply_vectors(typingctx, out, o, keep, left, at_left, right, at_right, count, stride):
    def generate(context, builder, signature, args):
        p, o, keep, left, at_left, right, at_right, count, stride = _unpack(context, builder, signature, args)
        size = o.type
        totals = [cgutils.alloca_once(builder, _VECTOR) for _ in range(BLOCK)]
        kept = builder.icmp_signed("!=", keep, size(0))
        with builder.if_else(kept) as (then, otherwise):
            with then:
                for c, total in enumerate(totals):
                    builder.store(_load(builder, p, builder.add(o, size(BLOCK * c))), total)
            with otherwise:
                for total in totals:
                    builder.store(_zero(), total)
        with cgutils.for_range(builder, count) as loop:
            step = builder.mul(loop.index, stride)
            a, b = builder.add(at_left, step), builder.add(at_right, step)
            sums = [builder.load(total) for total in totals]
            for k in range(BLOCK):
                column = _load(builder, left, builder.add(a, size(BLOCK * k)))
                row = _load(builder, right, builder.add(b, size(BLOCK * k)))
                row = builder.fsub(_zero(), row)
                sums = [_fma(builder, total, column, _splat(builder, row, c)) for c, total in enumerate(sums)]
            for total, value in zip(totals, sums, strict=True):
                builder.store(value, total)
        for c, total in enumerate(totals):
            _store(builder, builder.load(total), p, builder.add(o, size(BLOCK * c)))
        return context.get_dummy_value()

    return types.none(out, o, keep, left, at_left, right, at_right, count, stride), generate


@intrinsic
def _forward_vectors(typingctx, band, base, count, inverse, d, a, b, at):
    def generate(context, builder, signature, args):
        band, base, count, inverse, d, a, b, at = _unpack(context, builder, signature, args)
        size = at.type
        solved = [_times(builder, inverse, d, _load(builder, x, at), _zero()) for x in (a, b)]
        for x, value in zip((a, b), solved, strict=True):
            _store(builder, value, x, at)
        with cgutils.for_range_slice(builder, size(1), count, size(1), size) as (t, _):
            block = builder.add(base, builder.mul(t, size(_AREA)))
            row = builder.add(at, builder.mul(t, size(BLOCK)))
            for x, value in zip((a, b), solved, strict=True):
                _store(builder, _times(builder, band, block, value, _load(builder, x, row)), x, row)
        return context.get_dummy_value()

    return types.none(band, base, count, inverse, d, a, b, at), generate


@intrinsic
def _backward_vectors(typingctx, band, base, count, inverse, d, a, b, at):
    def generate(context, builder, signature, args):
        band, base, count, inverse, d, a, b, at = _unpack(context, builder, signature, args)
        size = at.type
        half = BLOCK // 2
        halves = []
        for first in (0, half):
            totals = [cgutils.alloca_once_value(builder, _zero()) for _ in range(BLOCK)]
            for total in totals:
                builder.store(_zero(), total)
            with cgutils.for_range_slice(builder, size(1), count, size(1), size) as (t, _):
                block = builder.add(base, builder.mul(t, size(_AREA)))
                row = builder.add(at, builder.mul(t, size(BLOCK)))
                rows = [_load(builder, x, row) for x in (a, b)]
                for c in range(half):
                    column = _load(builder, band, builder.add(block, size(BLOCK * (first + c))))
                    for which in range(2):
                        total = totals[half * which + c]
                        builder.store(_fma(builder, builder.load(total), column, rows[which]), total)
            halves.append(_sums(builder, [builder.load(total) for total in totals]))
        for x, lanes in ((a, [0, 1, 2, 3, 8, 9, 10, 11]), (b, [4, 5, 6, 7, 12, 13, 14, 15])):
            value = builder.fadd(_load(builder, x, at), _shuffle(builder, halves[0], halves[1], lanes))
            _store(builder, _times(builder, inverse, d, value, _zero()), x, at)
        return context.get_dummy_value()

    return types.none(band, base, count, inverse, d, a, b, at), generate


def multiply(out, o, keep, left, at_left, right, at_right, count, stride):
    """Out - sum of left right' over so many blocks, or without out; blocks lie by columns at the places given."""
    total = np.zeros((BLOCK, BLOCK))
    if keep:
        total += out[o : o + _AREA].reshape(BLOCK, BLOCK)
    for t in range(count):
        a = left[at_left + t * stride : at_left + t * stride + _AREA].reshape(BLOCK, BLOCK)
        b = right[at_right + t * stride : at_right + t * stride + _AREA].reshape(BLOCK, BLOCK)
        total -= b.T @ a
    out[o : o + _AREA] = total.ravel()


def forward_step(band, base, count, inverse, d, a, b, at):
    """Solve for the eight entries at `at`, and take them out of those below."""
    for x in (a, b):
        value = inverse[d : d + _AREA].reshape(BLOCK, BLOCK).T @ x[at : at + BLOCK]
        x[at : at + BLOCK] = value
        for t in range(1, count):
            block = band[base + t * _AREA : base + (t + 1) * _AREA].reshape(BLOCK, BLOCK)
            x[at + t * BLOCK : at + (t + 1) * BLOCK] += block.T @ value


def backward_step(band, base, count, inverse, d, a, b, at):
    """Take what is known below out of the eight entries at `at`, and solve for them."""
    for x in (a, b):
        value = x[at : at + BLOCK].copy()
        for t in range(1, count):
            block = band[base + t * _AREA : base + (t + 1) * _AREA].reshape(BLOCK, BLOCK)
            value += block @ x[at + t * BLOCK : at + (t + 1) * BLOCK]
        x[at : at + BLOCK] = inverse[d : d + _AREA].reshape(BLOCK, BLOCK).T @ value


@overload(multiply)
def _multiply(out, o, keep, left, at_left, right, at_right, count, stride):
    def run(out, o, keep, left, at_left, right, at_right, count, stride):
        _multiply_vectors(out, o, keep, left, at_left, right, at_right, count, stride)

    return run


@overload(forward_step)
def _forward_step(band, base, count, inverse, d, a, b, at):
    def run(band, base, count, inverse, d, a, b, at):
        _forward_vectors(band, base, count, inverse, d, a, b, at)

    return run


@overload(backward_step)
def _backward_step(band, base, count, inverse, d, a, b, at):
    def run(band, base, count, inverse, d, a, b, at):
        _backward_vectors(band, base, count, inverse, d, a, b, at)

    return run


@device()
def _factor_block(block, inverse, transposed):
    """Inverse of the Cholesky factor of one 8 x 8 block by columns, which is overwritten, and its transpose."""
    for c in range(BLOCK):
        scale = 1.0 / np.sqrt(max(block[BLOCK * c + c], 1e-300))
        for r in range(c, BLOCK):
            block[BLOCK * c + r] *= scale
        for k in range(c + 1, BLOCK):
            factor = block[BLOCK * c + k]
            for r in range(k, BLOCK):
                block[BLOCK * k + r] -= block[BLOCK * c + r] * factor
        inverse[BLOCK * c + c] = scale
    for c in range(BLOCK):
        for r in range(c):
            inverse[BLOCK * c + r] = 0.0
        for r in range(c + 1, BLOCK):
            total = 0.0
            for k in range(c, r):
                total -= block[BLOCK * k + r] * inverse[BLOCK * c + k]
            inverse[BLOCK * c + r] = total * inverse[BLOCK * r + r]
    for c in range(BLOCK):
        for r in range(BLOCK):
            transposed[BLOCK * r + c] = inverse[BLOCK * c + r]


@device()
def factor(band, first, blocks, wide, inverse, transposed):
    # float64[blocks * wide * 64], int64[blocks], int, int, float64[blocks * 64] twice -> in place
    """Cholesky factor of a symmetric positive definite matrix.

    Its block (J + t, J) lies at 64 (J wide + t), by columns. Block row I is zero left of column first[I], and block
    column J below row last[J]. Off the diagonal the band becomes minus the factor; inverse and transposed receive the
    inverses of the factor's diagonal blocks, and their transposes.
    """
    stride = (wide - 1) * _AREA
    for i in range(blocks):
        for j in range(first[i], i + 1):
            k = max(first[i], first[j])
            at = (j * wide + i - j) * _AREA
            multiply(
                band,
                at,
                1,
                band,
                (k * wide + i - k) * _AREA,
                band,
                (k * wide + j - k) * _AREA,
                j - k,
                stride,
            )
            if j < i:
                multiply(band, at, 0, band, at, inverse, j * _AREA, 1, 0)
            else:
                _factor_block(
                    band[at : at + _AREA],
                    inverse[i * _AREA : (i + 1) * _AREA],
                    transposed[i * _AREA : (i + 1) * _AREA],
                )


@device()
def solve(band, last, blocks, wide, inverse, transposed, a, b):
    # as left by factor; float64[8 blocks] a and b in place
    """Solve for two right hand sides at once."""
    for j in range(blocks):
        forward_step(band, j * wide * _AREA, last[j] - j + 1, inverse, j * _AREA, a, b, j * BLOCK)
    for j in range(blocks - 1, -1, -1):
        backward_step(band, j * wide * _AREA, last[j] - j + 1, transposed, j * _AREA, a, b, j * BLOCK)
