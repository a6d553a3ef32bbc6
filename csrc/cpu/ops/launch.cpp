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

Tensor empty_like(const Tensor& t, at::ScalarType dtype) {
    return at::empty(t.sizes(), t.options().dtype(dtype).memory_format(format_of(t)));
}

void set_norm(Affine& to, at::TensorList norm, const Tensor& y) {
    TORCH_CHECK(norm.size() == 2 || norm.size() == 3, "norm: expected [scale, shift] or [scale, shift, center]");
    for (const Tensor& v : norm)
        TORCH_CHECK(v.is_contiguous() && v.scalar_type() == wide(y) && v.dim() == 1 && v.size(0) == y.size(1),
                    "norm: expected contiguous vectors of ", y.size(1), " values in ", wide(y), ", got ", v.sizes(),
                    " in ", v.scalar_type());
    to.scale = norm[0].data_ptr();
    to.shift = norm[1].data_ptr();
    if (norm.size() == 3) to.center = norm[2].data_ptr();
}

Act act_of(int64_t index) {
    TORCH_CHECK(index >= 0 && index <= static_cast<int64_t>(Act::hardswish), "act: no activation ", index);
    return static_cast<Act>(index);
}

Partials::Partials(const View& view, int kinds, at::ScalarType dtype)
    : rows(view.blocks),
      chunk(view.layout.plane ? 1 : chunk_rows(view.blocks)),
      planes(view.layout.plane ? view.layout.channels : 0) {
    const int64_t C = view.layout.channels;
    const int64_t chunks = planes ? rows / C : (rows + chunk - 1) / chunk;
    data = at::empty({kinds, chunks, C}, at::TensorOptions().dtype(dtype));
}

void Partials::aim(Args& args, int64_t i) const {
    // with planes, kernels write sums[block] of a [N, C] table
    for (int64_t k = 0; k < data.size(0); k++)
        args.sums[k] = bytes(data, (k * chunks() + (planes ? 0 : i)) * data.size(2));
}

template <class S>
static void merge(const Partials& p, int64_t plane, S* mean, S* var) {
    const int64_t C = p.data.size(2), chunks = p.chunks();
    const S* means = static_cast<const S*>(p.data.data_ptr());
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

std::pair<Tensor, Tensor> Partials::moments(int64_t plane) const {
    Tensor mean = at::empty({data.size(2)}, data.options()), var = at::empty_like(mean);
    if (data.scalar_type() == at::kDouble) merge(*this, plane, mean.data_ptr<double>(), var.data_ptr<double>());
    else merge(*this, plane, mean.data_ptr<float>(), var.data_ptr<float>());
    return {mean, var};
}

void run(Kernel kernel, const Args& args, const View& view) {
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, view.size()));
    parallel(0, view.blocks, grain, [&](int64_t b, int64_t e) { kernel(args, b, e); });
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
