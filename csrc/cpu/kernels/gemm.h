// C[M, N] (+)= A[M, K] B[K, N], sums in float, a tile of C at a time.
// Operands are read as words of 32 bits: a float, or two bfloat16 of adjacent K; below, depth is counted in words.
// Tile: kGemmRows x kGemmColumns sums in registers while kGemmDepth of K pass; meanwhile a panel of B, kGemmColumns
// wide, stays in L1 or L2 (a step reads 128 bytes of it in 28 cycles) and the rows of A in L2. Traffic per kGemmDepth
// of K: A once, B once per call, C read and written once. An element of C adds its products in the order of K, whatever
// the range of a call. Source: Goto & van de Geijn, Anatomy of High-Performance Matrix Multiplication (ACM TOMS 34,
// 2008), section 4.
#pragma once

#include "activations.h"
#include "words.h"

namespace {

// The sums, a row of B and an element of A take the registers.
constexpr int kGemmRows = FR_REGISTERS >= 32 ? 14 : 6, kGemmVectors = 2, kGemmColumns = kGemmVectors * kLanes;
constexpr int64_t kGemmDepth = kMostGemmDepth;
// From one copied tile of A to the next: an odd number of cache lines, or the tiles would share some sets of the cache.
constexpr int64_t kGemmTile = kGemmRows * kGemmDepth + 16;
static_assert(kGemmTile / 16 % 2 && kGemmBlock % kGemmRows == 0 && kGemmBlock / kGemmRows * kGemmTile <= kGemmScratch);

// Lines at this distance share a set of L1, because a way is a page on x86.
constexpr int64_t kWayBytes = 4096;

// Words and bytes of a cache line, and rows of the result that are fetched per line of A.
constexpr int kLineWords = 16, kLineBytes = 64, kRowsAhead = 4;

typedef uint32_t Four __attribute__((vector_size(16)));

FR_INLINE Four load_four(const void* p) {
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

// Where the sums of a tile go in the place of c: shift and a residual are added, and results outside [floor, ceiling]
// become the nearer bound.
template <class O>
struct Finish {
    const float* shift;
    const O* residual;
    O* out;
    int64_t residual_row, out_row;
    float floor, ceiling;
};

// R rows of a panel, of which `columns` are stored: c (+)= a b over `depth` elements; a word of a every a_word. Rows
// from `ahead` on, ahead_row apart, are fetched into L2. post: null where the sums are stored as they are.
template <class T, class O, int R>
void gemm_tile(const T* a, int64_t a_row, int64_t a_word, const T* b, int64_t depth, float* c, int64_t c_row,
               int64_t columns, bool accumulate, const T* ahead, int64_t ahead_row, const Finish<O>* post) {
    using Words = typename Word<T>::vector;
    F32 sum[R][kGemmVectors];
    unrolled<R>([&](auto i) __attribute__((always_inline)) {
        unrolled<kGemmVectors>([&](auto v) __attribute__((always_inline)) { sum[i][v] = F32{}; });
    });
    const auto add = [&](auto elements) __attribute__((always_inline)) {
        Words here[kGemmVectors];
        unrolled<kGemmVectors>([&](auto v) __attribute__((always_inline)) {
            __builtin_memcpy(&here[v], b + v * kLanes * kWord<T>, sizeof(Words));
        });
        unrolled<R>([&](auto i) __attribute__((always_inline)) {
            typename Word<T>::type word{};
            __builtin_memcpy(&word, a + i * a_row, elements * sizeof(T));
            const Words value = word - Words{};  // minus 0 is nothing, plus 0 is an addition
            unrolled<kGemmVectors>(
                [&](auto v) __attribute__((always_inline)) { sum[i][v] = Word<T>::add(sum[i][v], value, here[v]); });
        });
    };
    const auto step = [&]() __attribute__((always_inline)) {
        add(std::integral_constant<int, kWord<T>>{});
        a += a_word, b += kGemmColumns * kWord<T>;
    };
    // Fetches while a line of each row of a is read: a line of each row ahead, and first some rows of the result. All
    // at once would wait for each other.
    const char* written = post ? reinterpret_cast<const char*>(post->out) : reinterpret_cast<const char*>(c);
    const int64_t written_row = post ? post->out_row * int64_t(sizeof(O)) : c_row * int64_t(sizeof(float));
    const int64_t written_bytes = kGemmColumns * int64_t(post ? sizeof(O) : sizeof(float));
    int rows_left = R;
    for (; depth >= kLineWords * kWord<T>; depth -= kLineWords * kWord<T>, ahead += kLineWords * kWord<T>) {
        if (rows_left > 0) {
            rows_left -= kRowsAhead;
            for (int i = 0; i < kRowsAhead; i++, written += written_row)
                for (int64_t j = 0; j < written_bytes; j += kLineBytes) __builtin_prefetch(written + j, 1);
        }
        const T* line = ahead;
        for (int k = 0; k < kLineWords; k++, line += ahead_row) {
            __builtin_prefetch(line, 0, 2);
            step();
        }
    }
    for (; depth >= kWord<T>; depth -= kWord<T>) step();
    if constexpr (kWord<T> > 1)
        if (depth) by_count<kWord<T> - 1>(depth, add);
    const auto finish = [&](auto posted, auto width) __attribute__((always_inline)) {
        const F32 floor = splat<F32>(posted ? post->floor : 0), ceiling = splat<F32>(posted ? post->ceiling : 0);
        unrolled<R>([&](auto i) __attribute__((always_inline)) {
            unrolled<kGemmVectors>([&](auto v) __attribute__((always_inline)) {
                const int at = v * kLanes, n = width(v);
                float* const to = c + i * c_row + at;
                if (n <= 0) return;
                F32 z = accumulate ? load<F32>(to, n) + sum[i][v] : sum[i][v];
                if constexpr (posted) {
                    z = z + load<F32>(post->shift + at, n) + load<F32>(post->residual + i * post->residual_row + at, n);
                    z = z < floor ? floor : z;  // NaN stays
                    z = z > ceiling ? ceiling : z;
                    store(post->out + i * post->out_row + at, z, n);
                } else {
                    store(to, z, n);
                }
            });
        });
    };
    const auto stored = [&](auto posted) __attribute__((always_inline)) {
        if (columns == kGemmColumns) return finish(posted, [](int) __attribute__((always_inline)) { return kLanes; });
        finish(posted, [&](int v) __attribute__((always_inline)) {
            const int n = int(columns) - v * kLanes;
            return n < kLanes ? n : kLanes;
        });
    };
    if (post) stored(std::true_type{});
    else stored(std::false_type{});
}

// A vector of words; the elements of each are below each other in rows that are `row` apart.
template <class T>
FR_INLINE void interleave(const T* from, int64_t row, T* to) {
    U32 words{};
    unrolled<kWord<T>>([&](auto e) __attribute__((always_inline)) {
        std::conditional_t<kWord<T> == 1, U32, U16> elements;
        __builtin_memcpy(&elements, from + e * row, sizeof elements);
        words |= __builtin_convertvector(elements, U32) << uint32_t(8 * sizeof(T) * e);
    });
    __builtin_memcpy(to, &words, sizeof words);
}

// Tiles [words, kGemmRows] of words, kGemmTile words apart, from a[i, k] at i * row + k * column; of `rows` that are
// wanted and `present` that may be read.
template <class T>
void gemm_pack_a(const T* a, int64_t row, int64_t column, int64_t rows, int64_t present, int64_t depth, T* to) {
    // whole vectors: what is written past a tile's rows is written again with the next word, or lies between tiles
    constexpr int64_t kVectors = (kGemmRows + kLanes - 1) / kLanes * kLanes;
    static_assert(kVectors - kGemmRows <= kGemmTile - kGemmRows * kGemmDepth);
    for (int64_t k = 0; k < depth; k += kWord<T>, a += kWord<T> * column, to += kGemmRows * kWord<T>) {
        int64_t i = 0;
        if (row == 1 && k + kWord<T> <= depth)
            for (; i < rows && i + kVectors <= present; i += kGemmRows)
                for (int64_t v = 0; v < kVectors; v += kLanes)
                    interleave(a + i + v, column, to + (i / kGemmRows * kGemmTile + v) * kWord<T>);
        for (; i < rows; i++)
            for (int64_t e = 0; e < kWord<T>; e++)
                to[(i / kGemmRows * kGemmTile + i % kGemmRows) * kWord<T> + e] =
                    k + e < depth ? a[i * row + e * column] : T{};
    }
}

// Values [k, k + depth) of row i of the patches of elements S.
template <class S, class T>
void gather_patch(const Patches& q, int64_t i, int64_t k, int64_t depth, T* to) {
    const int64_t pixels = q.out_height * q.out_width, top = i % pixels / q.out_width * q.stride[0] - q.padding[0],
                  left = i % q.out_width * q.stride[1] - q.padding[1];
    const int64_t line = q.width * q.channels;
    const S* const image = static_cast<const S*>(q.x) + i / pixels * (q.height * line);
    // what a row of the kernel sees lies together, if the row is not dilated
    const int64_t together = q.dilation[1] == 1 ? q.kernel[1] : 1, run = together * q.channels,
                  runs = q.kernel[1] / together;
    for (int64_t n; depth > 0; k += n, to += n, depth -= n) {
        const int64_t r = k / run;
        const int64_t h = top + r / runs * q.dilation[0], w = left + r % runs * q.dilation[1];
        n = run - k % run < depth ? run - k % run : depth;
        const int64_t start = w * q.channels + k % run;  // of the run in its line
        int64_t low = n, high = n;                       // the values that lie in the image
        if (h >= 0 && h < q.height) {
            low = start >= 0 ? 0 : -start < n ? -start : n;
            high = line - start >= n ? n : line - start < low ? low : line - start;
        }
        __builtin_memset(to, 0, low * sizeof(T));
        copy_values(image + h * line + start + low, high - low, to + low);
        __builtin_memset(to + high, 0, (n - high) * sizeof(T));
    }
}

// out = act(c + shift (+ residual)) of rows [row, row + rows) and columns [column, column + columns), which start at c.
template <class O>
void gemm_act(const Args& a, const float* c, int64_t c_row, int64_t row, int64_t rows, int64_t column,
              int64_t columns) {
    const F32 p = splat<F32>(a.act_param);
    const float* const shift = static_cast<const float*>(a.norm.shift) + column;
    Chosen(a.act).with([&](auto k) __attribute__((always_inline)) {
        for (int64_t i = 0; i < rows; i++) {
            const int64_t at = (row + i) * a.layout.channels + column;
            by_lanes(columns, [&](int64_t j, auto n) __attribute__((always_inline)) {
                F32 z = load<F32>(c + i * c_row + j, n) + load<F32>(shift + j, n);
                if (a.residual) z = z + load<F32>(static_cast<const O*>(a.residual) + at + j, n);
                store(static_cast<O*>(a.out) + at + j, k.forward(z, p), n);
            });
        }
    });
}
// Whether an activation only bounds its results.
FR_INLINE bool bounds(Act act) { return act == Act::identity || act == Act::relu || act == Act::relu6; }

// What becomes of the tile at (row, column), if the activation only bounds it.
template <class O>
FR_INLINE Finish<O> finish_of(const Args& a, int64_t row, int64_t column) {
    static const O kZeros[kGemmColumns] = {};
    const int64_t at = row * a.layout.channels + column;
    const float* const shift = static_cast<const float*>(a.norm.shift) + column;
    const O* const residual = static_cast<const O*>(a.residual);
    O* const out = static_cast<O*>(a.out) + at;
    const float floor = a.act == Act::identity ? -__builtin_inff() : 0;
    const float ceiling = a.act == Act::relu6 ? 6 : __builtin_inff();
    if (!residual) return {shift, kZeros, out, 0, a.layout.channels, floor, ceiling};
    return {shift, residual + at, out, a.layout.channels, a.layout.channels, floor, ceiling};
}

// S: the elements of A, and of what the epilogue reads and writes.
template <class T, class S>
void gemm_multiply(const Gemm& g, float* scratch, int64_t begin, int64_t end, int64_t first, int64_t last) {
    if (g.depth == 0 && !g.accumulate)
        for (int64_t i = begin; i < end; i++)
            for (int64_t j = first * kGemmColumns; j < last * kGemmColumns && j < g.columns; j++)
                g.c[i * g.c_row + j] = 0;
    const int64_t slice = kGemmDepth * kWord<T>;
    const bool bounded = g.epilogue && bounds(g.epilogue->act);
    const int64_t sums_row = odd_lines((last - first) * kGemmColumns);
    const auto block = [&](int64_t top, int64_t k) {
        const int64_t bottom = top + kGemmBlock < end ? top + kGemmBlock : end;
        int64_t depth = g.depth - k < slice ? g.depth - k : slice;
        const bool finishes = g.epilogue && k + depth == g.depth;
        const S* const from = g.patches ? nullptr : static_cast<const S*>(g.a) + top * g.a_row + k * g.a_depth;
        const T* a = reinterpret_cast<const T*>(from);
        int64_t a_row = g.a_row, a_word = kWord<T>, a_tile = kGemmRows * g.a_row;
        T* const copy = reinterpret_cast<T*>(scratch);
        const auto copied = [&](auto row) {
            for (int64_t i = 0; i < bottom - top; i++) row(i, copy + i * slice);
            a = copy, a_row = slice, a_tile = kGemmRows * slice;
        };
        const auto tiles = [&](const T* from, int64_t row, int64_t column, int64_t present) {
            gemm_pack_a(from, row, column, bottom - top, present, depth, copy);
            a = copy, a_row = kWord<T>, a_word = kGemmRows * kWord<T>, a_tile = kGemmTile * kWord<T>;
            depth = whole_words<T>(depth);
        };
        if (g.patches && g.transposed) {
            T* const rows = reinterpret_cast<T*>(scratch + kGemmScratch);
            for (int64_t i = 0; i < depth; i++)
                gather_patch<S>(*g.patches, g.a_start + k + i, top, bottom - top, rows + i * kGemmBlock);
            tiles(rows, 1, kGemmBlock, kGemmBlock);
        } else if (g.patches) {
            copied([&](int64_t i, T* to) { gather_patch<S>(*g.patches, top + i, k, depth, to); });
        } else if constexpr (!std::is_same_v<S, T>) {
            copied([&](int64_t i, T* to) { copy_values(from + i * g.a_row, depth, to); });
        } else if (g.a_depth != 1) {  // rows of A lie across memory: the block is copied, its tiles one after the other
            tiles(a, g.a_row, g.a_depth, g.rows - top);
        } else if (g.a_row * sizeof(T) % kWayBytes == 0) {  // a tile's rows share a set of L1, which has fewer ways
            copied([&](int64_t i, T* to) { copy_values(from + i * g.a_row, depth, to); });
        }
        // without c the sums are in scratch until the epilogue
        float* const c = g.c ? g.c + top * g.c_row + first * kGemmColumns : scratch + kGemmScratch;
        const int64_t c_row = g.c ? g.c_row : sums_row;
        // A panel stays in L1 while the rows of the block pass. A tile fetches the next one's rows while they are read
        // for the first time, and otherwise a part of the next panel.
        const int64_t panel = whole_words<T>(g.depth) * kGemmColumns, size = depth * kGemmColumns;
        const int64_t line = kLineWords * kWord<T>;
        const auto tile_at = [&](int64_t i, int64_t p, int64_t part) __attribute__((always_inline)) {
            const T* const b = static_cast<const T*>(g.b) + k * kGemmColumns;
            const T* const tile = a + (i - top) / kGemmRows * a_tile;
            const int64_t column = p * kGemmColumns;
            const int64_t columns = g.columns - column < kGemmColumns ? g.columns - column : kGemmColumns;
            const int64_t height = bottom - i < kGemmRows ? bottom - i : kGemmRows;
            const bool rows_ahead = a != copy && p == first, panel_ahead = p + 1 < last && part < size;
            const T* const ahead = rows_ahead ? tile + a_tile : panel_ahead ? b + (p + 1) * panel + part : tile;
            const int64_t ahead_row = rows_ahead ? a_row : panel_ahead ? line : 0;
            float* const sums = c + (i - top) * c_row + (p - first) * kGemmColumns;
            Finish<S> post;
            if (finishes && bounded) {
                post = finish_of<S>(*g.epilogue, i, column);
                for (int64_t r = 0; r < height && post.residual_row; r++)
                    for (int64_t j = 0; j < kGemmColumns; j += kLineBytes / int64_t(sizeof(S)))
                        __builtin_prefetch(post.residual + r * post.residual_row + j);
            }
            by_count<kGemmRows>(height, [&](auto rows) __attribute__((always_inline)) {
                gemm_tile<T, S, rows>(tile, a_row, a_word, b + p * panel, depth, sums, c_row, columns,
                                      g.accumulate || k > 0, ahead, ahead_row, finishes && bounded ? &post : nullptr);
            });
            if (finishes && !bounded) gemm_act<S>(*g.epilogue, sums, c_row, i, height, column, columns);
        };
        for (int64_t p = first; p < last; p++)
            for (int64_t i = top, part = 0; i < bottom; i += kGemmRows, part += (depth / line + kLineWords - 1) * line)
                tile_at(i, p, part);
    };
    // the smaller one of B and C is passed again and again
    if (g.c && end - begin < g.depth)
        for (int64_t k = 0; k < g.depth; k += slice)
            for (int64_t top = begin; top < end; top += kGemmBlock) block(top, k);
    else
        for (int64_t top = begin; top < end; top += kGemmBlock)
            for (int64_t k = 0; k < g.depth; k += slice) block(top, k);
}

// Rows of B that are packed together: those of all panels lie in L1.
constexpr int64_t kPackRows = 32;

// to[j][i] = from[i][j], 4 x 4 words at distances in words of T
template <class T>
FR_INLINE void transpose_4x4(const T* from, int64_t row, T* to, int64_t to_row) {
    const Four a = load_four(from), b = load_four(from + row), c = load_four(from + 2 * row),
               d = load_four(from + 3 * row);
    const Four low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, first = {0, 1, 4, 5}, second = {2, 3, 6, 7};
    const Four ab = __builtin_shuffle(a, b, low), cd = __builtin_shuffle(c, d, low);
    const Four ab2 = __builtin_shuffle(a, b, high), cd2 = __builtin_shuffle(c, d, high);
    const Four rows[4] = {__builtin_shuffle(ab, cd, first), __builtin_shuffle(ab, cd, second),
                          __builtin_shuffle(ab2, cd2, first), __builtin_shuffle(ab2, cd2, second)};
    for (int i = 0; i < 4; i++) __builtin_memcpy(to + i * to_row, &rows[i], sizeof(Four));
}

template <class T>
void gemm_pack(const GemmPack& q, int64_t begin, int64_t end, int64_t first, int64_t last) {
    for (int64_t top = begin; top < end; top += kPackRows) {
        const int64_t bottom = top + kPackRows < end ? top + kPackRows : end;
        for (int64_t p = first; p < last; p++) {
            const int64_t column = p * kGemmColumns,
                          columns = q.columns - column < kGemmColumns ? q.columns - column : kGemmColumns;
            T* to = static_cast<T*>(q.to) + (p * whole_words<T>(q.depth) + top) * kGemmColumns;
            const T* from = static_cast<const T*>(q.from) + (top - q.first) * q.row + column * q.column;
            int64_t k = top;
            const auto pass = [&](int64_t words) {
                k += words * kWord<T>, from += words * kWord<T> * q.row, to += words * kWord<T> * kGemmColumns;
            };
            if (columns == kGemmColumns && q.column == 1) {
                for (; k + kWord<T> <= bottom; pass(1))
                    for (int64_t j = 0; j < kGemmColumns; j += kLanes) interleave(from + j, q.row, to + j * kWord<T>);
            } else if (columns == kGemmColumns && q.row == 1) {
                for (; k + 4 * kWord<T> <= bottom; pass(4))
                    for (int64_t j = 0; j < kGemmColumns; j += 4)
                        transpose_4x4(from + j * q.column, q.column, to + j * kWord<T>, kGemmColumns * kWord<T>);
            }
            for (; k < bottom; pass(1))
                for (int64_t j = 0; j < kGemmColumns; j++)
                    for (int64_t e = 0; e < kWord<T>; e++)
                        to[j * kWord<T> + e] = j < columns && k + e < bottom ? from[e * q.row + j * q.column] : T{};
        }
    }
}

template <class T, class S = T>
constexpr GemmKernel kGemmKernel = {kGemmRows, kGemmColumns, int(kWord<T>), gemm_multiply<T, S>, gemm_pack<T>};

}  // namespace
