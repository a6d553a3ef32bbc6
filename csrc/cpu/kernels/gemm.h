// C[M, N] (+)= A[M, K] B[K, N] in float, a tile of C at a time.
// Tile: kGemmRows x kGemmColumns sums in registers while kGemmDepth of K pass; meanwhile a panel of B, kGemmColumns
// wide, stays in L1 and the rows of A in L2. Traffic per kGemmDepth of K: A once, B once per call, C read and written
// once. An element of C adds its products in the order of K, whatever the range of a call. Source: Goto & van de Geijn,
// Anatomy of High-Performance Matrix Multiplication (ACM TOMS 34, 2008), section 4.
#pragma once

#include "vectors.h"

namespace {

// The sums, a row of B and an element of A take the registers.
constexpr int kGemmRows = FR_REGISTERS >= 32 ? 14 : 6, kGemmVectors = 2, kGemmColumns = kGemmVectors * kLanes;
// A panel of B takes half of an L1 of 32 or 48 KiB.
constexpr int64_t kGemmDepth = FR_VECTOR_BYTES == 64 ? 192 : 256;
// From one copied tile of A to the next: an odd number of cache lines, or the tiles would share some sets of the cache.
constexpr int64_t kGemmTile = kGemmRows * kGemmDepth + 16;
static_assert(kGemmTile / 16 % 2 && kGemmBlock % kGemmRows == 0 && kGemmBlock / kGemmRows * kGemmTile <= kGemmScratch);

typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourIndices __attribute__((vector_size(16)));

FR_INLINE Four load_four(const float* p) {
    Four v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

// f(std::integral_constant<int, n>) for 1 <= n <= N.
template <int N, class F>
FR_INLINE void by_count(int64_t n, F f) {
    if constexpr (N > 1)
        if (n < N) return by_count<N - 1>(n, f);
    f(std::integral_constant<int, N>{});
}

// R rows of a panel, of which `columns` are stored: c (+)= a b over `depth`.
template <int R>
void gemm_tile(const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t depth, float* c, int64_t c_row,
               int64_t columns, bool accumulate) {
    F32 sum[R][kGemmVectors];
    unrolled<R>([&](auto i) __attribute__((always_inline)) {
        unrolled<kGemmVectors>([&](auto v) __attribute__((always_inline)) { sum[i][v] = F32{}; });
        __builtin_prefetch(c + i * c_row);
    });
    for (int64_t k = 0; k < depth; k++, a += a_depth, b += kGemmColumns) {
        F32 here[kGemmVectors];
        unrolled<kGemmVectors>([&](auto v)
                                   __attribute__((always_inline)) { here[v] = load<F32>(b + v * kLanes, kLanes); });
        unrolled<R>([&](auto i) __attribute__((always_inline)) {
            const F32 value = a[i * a_row] - F32{};  // minus 0 is nothing, plus 0 is an addition
            unrolled<kGemmVectors>([&](auto v) __attribute__((always_inline)) { sum[i][v] += value * here[v]; });
        });
    }
    unrolled<R>([&](auto i) __attribute__((always_inline)) {
        float* to = c + i * c_row;
        if (columns == kGemmColumns) {
            unrolled<kGemmVectors>([&](auto v) __attribute__((always_inline)) {
                const F32 z = accumulate ? load<F32>(to + v * kLanes, kLanes) + sum[i][v] : sum[i][v];
                store(to + v * kLanes, z, kLanes);
            });
        } else {
            float row[kGemmColumns];
            __builtin_memcpy(row, sum[i], sizeof row);
            for (int64_t j = 0; j < columns; j++) to[j] = accumulate ? to[j] + row[j] : row[j];
        }
    });
}

// Tiles [depth, kGemmRows], kGemmTile apart, from a[i, k] at i * row + k * column.
void gemm_pack_a(const float* a, int64_t row, int64_t column, int64_t rows, int64_t depth, float* to) {
    for (int64_t k = 0; k < depth; k++, a += column, to += kGemmRows) {
        int64_t i = 0;
        if (row == 1)
            for (; i + kGemmRows <= rows; i += kGemmRows)
                __builtin_memcpy(to + i / kGemmRows * kGemmTile, a + i, kGemmRows * sizeof(float));
        for (; i < rows; i++) to[i / kGemmRows * kGemmTile + i % kGemmRows] = a[i * row];
    }
}

// Rows [begin, end) of a C whose panels [first, last) are wanted; `scratch` holds kGemmScratch values.
void gemm_any(const Gemm& g, float* scratch, int64_t begin, int64_t end, int64_t first, int64_t last) {
    if (g.depth == 0 && !g.accumulate)
        for (int64_t i = begin; i < end; i++)
            for (int64_t j = first * kGemmColumns; j < last * kGemmColumns && j < g.columns; j++)
                g.c[i * g.c_row + j] = 0;
    for (int64_t top = begin; top < end; top += kGemmBlock) {
        const int64_t bottom = top + kGemmBlock < end ? top + kGemmBlock : end;
        for (int64_t k = 0; k < g.depth; k += kGemmDepth) {
            const int64_t depth = g.depth - k < kGemmDepth ? g.depth - k : kGemmDepth;
            const float* a = g.a + top * g.a_row + k * g.a_depth;
            int64_t a_row = g.a_row, a_depth = g.a_depth, a_tile = kGemmRows * g.a_row;
            if (a_depth != 1) {  // rows of A lie across memory: the block is copied, its tiles one after the other
                a_row = 1, a_depth = kGemmRows, a_tile = kGemmTile;
                gemm_pack_a(a, g.a_row, g.a_depth, bottom - top, depth, scratch);
                a = scratch;
            }
            for (int64_t p = first; p < last; p++) {
                const float* b = g.b + (p * g.depth + k) * kGemmColumns;
                const int64_t column = p * kGemmColumns,
                              columns = g.columns - column < kGemmColumns ? g.columns - column : kGemmColumns;
                for (int64_t i = top; i < bottom; i += kGemmRows)
                    by_count<kGemmRows>(
                        bottom - i < kGemmRows ? bottom - i : kGemmRows, [&](auto rows) __attribute__((always_inline)) {
                            gemm_tile<rows>(a + (i - top) / kGemmRows * a_tile, a_row, a_depth, b, depth,
                                            g.c + i * g.c_row + column, g.c_row, columns, g.accumulate || k > 0);
                        });
            }
        }
    }
}

// Rows of B that are packed together: those of all panels lie in L1.
constexpr int64_t kPackRows = 32;

// to[j][i] = from[i][j], 4 x 4
FR_INLINE void transpose_4x4(const float* from, int64_t row, float* to, int64_t to_row) {
    const Four a = load_four(from), b = load_four(from + row), c = load_four(from + 2 * row),
               d = load_four(from + 3 * row);
    const FourIndices low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, first = {0, 1, 4, 5}, second = {2, 3, 6, 7};
    const Four ab = __builtin_shuffle(a, b, low), cd = __builtin_shuffle(c, d, low);
    const Four ab2 = __builtin_shuffle(a, b, high), cd2 = __builtin_shuffle(c, d, high);
    const Four rows[4] = {__builtin_shuffle(ab, cd, first), __builtin_shuffle(ab, cd, second),
                          __builtin_shuffle(ab2, cd2, first), __builtin_shuffle(ab2, cd2, second)};
    for (int i = 0; i < 4; i++) __builtin_memcpy(to + i * to_row, &rows[i], sizeof(Four));
}

void gemm_pack_any(const GemmPack& q, int64_t begin, int64_t end, int64_t first, int64_t last) {
    for (int64_t top = begin; top < end; top += kPackRows) {
        const int64_t bottom = top + kPackRows < end ? top + kPackRows : end;
        for (int64_t p = first; p < last; p++) {
            const int64_t column = p * kGemmColumns,
                          columns = q.columns - column < kGemmColumns ? q.columns - column : kGemmColumns;
            float* to = q.to + (p * q.depth + top) * kGemmColumns;
            const float* from = q.from + top * q.row + column * q.column;
            int64_t k = top;
            if (columns == kGemmColumns && q.column == 1) {
                for (; k < bottom; k++, to += kGemmColumns, from += q.row)
                    __builtin_memcpy(to, from, kGemmColumns * sizeof(float));
            } else if (columns == kGemmColumns && q.row == 1) {
                for (; k + 4 <= bottom; k += 4, to += 4 * kGemmColumns, from += 4)
                    for (int64_t j = 0; j < kGemmColumns; j += 4)
                        transpose_4x4(from + j * q.column, q.column, to + j, kGemmColumns);
            }
            for (; k < bottom; k++, to += kGemmColumns, from += q.row)
                for (int64_t j = 0; j < kGemmColumns; j++) to[j] = j < columns ? from[j * q.column] : 0;
        }
    }
}

}  // namespace
