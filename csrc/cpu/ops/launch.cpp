#include "launch.h"

#include <unistd.h>

namespace fused_resnet::cpu {

int64_t l2_bytes() {
    static const int64_t found = [] {
#ifdef _SC_LEVEL2_CACHE_SIZE
        if (const long size = sysconf(_SC_LEVEL2_CACHE_SIZE); size > 0) return size;
#endif
        return 1L << 20;  // the system does not say
    }();
    return found;
}

void set_norm(Affine& to, TensorList norm, const Tensor& y) {
    FR_CHECK(norm.size() == 2 || norm.size() == 3, "norm: expected [scale, shift] or [scale, shift, center]");
    const int64_t channels = y.size(1);
    const ScalarType dtype = wide(y);
    for (const Tensor& v : norm)
        FR_CHECK(v.sizes() == IntList(channels) && v.is_contiguous() && v.scalar_type() == dtype,
                 "norm: expected contiguous vectors of ", channels, " values in ", dtype, ", got ", v.sizes(), " in ",
                 v.scalar_type());
    to.scale = norm[0].data_ptr();
    to.shift = norm[1].data_ptr();
    if (norm.size() == 3) to.center = norm[2].data_ptr();
}

namespace {
// Blocks per chunk. Planes: kernels write sums[block] of a table [N, C].
int64_t chunk_of(const View& view) { return view.layout.plane ? view.layout.channels : chunk_rows(view.blocks); }
int64_t chunks_of(const View& view) { return (view.blocks + chunk_of(view) - 1) / chunk_of(view); }
}  // namespace

Partials::Partials(const View& view, int kinds, ScalarType dtype)
    : Sums(kinds, chunks_of(view), view.layout.channels, dtype),
      rows(view.blocks),
      chunk(chunk_of(view)),
      planes(view.layout.plane ? view.layout.channels : 0) {}

namespace {

// Adjacent channels that are added up together.
constexpr int64_t kColumns = 16;

template <class S>
Tensor sum_of(const Sums& s, int kind) {
    const int64_t C = s.channels;
    const Tensor to = empty({C}, {s.dtype});
    const S* const from = s.data.at<const S>() + kind * s.chunks * C;
    S* const sum = static_cast<S*>(to.data_ptr());
    parallel(0, (C + kColumns - 1) / kColumns, 4, [&](int64_t begin, int64_t end) {
        for (int64_t first = begin * kColumns; first < std::min(C, end * kColumns); first += kColumns) {
            const int64_t count = std::min(kColumns, C - first);
            double all[kColumns] = {};
            for (int64_t i = 0; i < s.chunks; i++)
                for (int64_t c = 0; c < count; c++) all[c] += from[i * C + first + c];
            for (int64_t c = 0; c < count; c++) sum[first + c] = S(all[c]);
        }
    });
    return to;
}

template <class S>
void merge(const Partials& p, int64_t plane, S* mean, S* var) {
    const int64_t C = p.channels, chunks = p.chunks;
    const S* means = p.data.at<const S>();
    const S* m2s = means + chunks * C;
    parallel(0, C, 64, [&](int64_t c0, int64_t c1) {
        for (int64_t c = c0; c < c1; c++) {
            Moments<S, S> all{0, 0, 0};
            for (int64_t i = 0; i < chunks; i++) {
                const int64_t count = plane ? plane : std::min(p.chunk, p.rows - i * p.chunk);
                all.merge({S(count), means[i * C + c], m2s[i * C + c]});
            }
            mean[c] = all.mean;
            var[c] = all.m2 / all.count;
        }
    });
}

}  // namespace

Tensor Sums::sum(int kind) const {
    return dtype == ScalarType::Double ? sum_of<double>(*this, kind) : sum_of<float>(*this, kind);
}

std::pair<Tensor, Tensor> Partials::moments(int64_t plane) const {
    const Tensor mean = empty({channels}, {dtype}), var = empty({channels}, {dtype});
    void *const to_mean = mean.data_ptr(), *const to_var = var.data_ptr();
    if (dtype == ScalarType::Double) merge(*this, plane, static_cast<double*>(to_mean), static_cast<double*>(to_var));
    else merge(*this, plane, static_cast<float*>(to_mean), static_cast<float*>(to_var));
    return {mean, var};
}

void run(Kernel kernel, const Args& args, const View& view) {
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, view.size()));
    parallel(0, view.blocks, grain, [&](int64_t b, int64_t e) { kernel(args, b, e); });
}

void add_to(const Tensor& to, const Tensor& from) {
    const Tensor summand = from.contiguous(format_of(to));
    const View view = View::of(to);
    Args a{};
    a.layout = view.layout;
    a.y_type = dtype_of(summand.scalar_type());
    a.other_type = dtype_of(to.scalar_type());
    a.y = summand.data_ptr();
    a.residual = a.out = to.data_ptr();
    run(table().convert, a, view);
}

void reduce(Kernel kernel, const Args& args, const Partials& partials, int64_t first, int64_t last) {
    if (partials.planes) {
        Args mine = args;
        partials.aim(mine, 0);
        parallel(0, partials.rows, 1, [&](int64_t b, int64_t e) { kernel(mine, b, e); });
        return;
    }
    parallel(first, last, 1, [&](int64_t i0, int64_t i1) {
        Args mine = args;
        for (int64_t i = i0; i < i1; i++) {
            partials.aim(mine, i);
            kernel(mine, i * partials.chunk, std::min(partials.rows, (i + 1) * partials.chunk));
        }
    });
}

}  // namespace fused_resnet::cpu
