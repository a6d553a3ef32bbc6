// Convolutions between their BatchNorms. 1x1 convolutions of channels_last tensors are matrix products. They run a
// slice of rows at a time, so that the passes over their operands and results find these in cache. The other
// convolutions are ATen's (oneDNN), with separate passes before and after them.
#include "ops.h"

namespace fused_resnet::cpu {

namespace {

// Bytes of both operands per slice of rows. The number of rows is a multiple of the reductions' chunk.
constexpr int64_t kSlice = 16 << 20;
// Bytes of Winograd's transforms per slice of tiles; with at least this many tiles per thread each thread has its own
// slices; with at least this many channels the algorithm pays.
constexpr int64_t kWinogradSlice = 2 << 20;
constexpr int64_t kWinogradTiles = 32;
constexpr int64_t kWinogradChannels = 64;
// The transformed weights are larger than the weights. With at least this many pixels over all images it pays to read
// them (in inference), or to make them in every step (in training). Three basic blocks of 256 channels on one thread
// took these multiples of the time with oneDNN's convolutions: frozen 2.3 at 16 pixels and 1.3 at 64, in training 1.5
// and 1.3. At 256 pixels they took 0.6 and 0.95 of plain PyTorch's time.
constexpr int64_t kWinogradPixels = 128, kWinogradPixelsInTraining = 256;
// With at least this many output pixels, tiles of 4x4 pay for their larger transform of weights that change every step.
constexpr int64_t kLargeTiles = 4096;

int64_t slice_rows(int64_t channels, int64_t element_size) {
    const int64_t rows = kSlice / (channels * element_size);
    return std::max<int64_t>(kChunkRows, rows / kChunkRows * kChunkRows);
}

bool is_gemm(const Tensor& x, const Tensor& weight, IntList stride, IntList padding, int64_t groups) {
    return weight.size(2) == 1 && weight.size(3) == 1 && groups == 1 && padding[0] == 0 && padding[1] == 0 &&
           format_of(x) == at::MemoryFormat::ChannelsLast;
}

// [M, C], the same memory as a channels_last [N, C, H, W]
Tensor rows_of(const Tensor& t) { return t.permute({0, 2, 3, 1}).view({-1, t.size(1)}); }

// Some rows of a channels_last tensor, as a kernel takes them.
struct Rows {
    const Tensor& t;
    int64_t first;
    char* data() const { return bytes(t, first * t.size(1)); }
};

Layout rows_layout(int64_t channels) { return {channels, 0}; }

Args prologue_args(const Tensor& x, at::TensorList prologue, int64_t act, double act_param) {
    Args a{};
    a.layout = rows_layout(x.size(1));
    a.y_type = dtype_of(x.scalar_type());
    a.act = act_of(act);
    a.act_param = act_param;
    set_norm(a.norm, prologue, x);
    return a;
}

// Rows [first, first + n) of act(s x + t), or of x in another dtype, in `scratch`; x's own rows if there is nothing to
// do.
Tensor operand(const Tensor& x, const Tensor& x2d, Args& pre, bool prologue, Tensor& scratch, at::ScalarType compute,
               int64_t first, int64_t n) {
    if (!prologue && x.scalar_type() == compute) return x2d.narrow(0, first, n);
    const Tensor to = scratch.narrow(0, 0, n);
    if (!prologue) return to.copy_(x2d.narrow(0, first, n));
    pre.y = Rows{x, first}.data();
    pre.out = to.data_ptr();
    pre.other_type = dtype_of(compute);
    run(table().bn_act, pre, {pre.layout, n});
    return to;
}

Tensor strided(const Tensor& x, IntList stride) {
    if (stride[0] == 1 && stride[1] == 1) return x;
    return x.slice(2, 0, std::nullopt, stride[0]).slice(3, 0, std::nullopt, stride[1]).contiguous(at::MemoryFormat::ChannelsLast);
}

std::tuple<Tensor, Tensor, Tensor> gemm_stats(const Tensor& x, const Tensor& weight, at::TensorList prologue, int64_t act,
                                              double act_param, bool stats, at::ScalarType compute) {
    const int64_t C = x.size(1), K = weight.size(0), M = x.numel() / C;
    const at::ScalarType dtype = x.scalar_type();
    const Tensor y = at::empty({x.size(0), K, x.size(2), x.size(3)}, x.options().memory_format(at::MemoryFormat::ChannelsLast));
    const Tensor x2d = rows_of(x), y2d = rows_of(y), wt = weight.view({K, C}).to(compute).t();
    const int64_t slice = std::min(M, slice_rows(C + K, y.element_size()));
    const auto options = x.options().dtype(compute);
    Tensor scratch = at::empty({slice, C}, options), result = dtype == compute ? Tensor() : at::empty({slice, K}, options);
    Args pre{};
    if (!prologue.empty()) pre = prologue_args(x, prologue, act, act_param);
    Args post{};
    post.layout = rows_layout(K);
    post.y_type = dtype_of(compute);
    post.other_type = dtype_of(dtype);
    Partials partials({post.layout, M}, 2, wide(x));
    for (int64_t m = 0; m < M; m += slice) {
        const int64_t n = std::min(slice, M - m);
        const Tensor a = operand(x, x2d, pre, !prologue.empty(), scratch, compute, m, n);
        Tensor out = dtype == compute ? y2d.narrow(0, m, n) : result.narrow(0, 0, n);
        at::mm_out(out, a, wt);
        if (dtype == compute && !stats) continue;
        // the kernel counts rows from the tensor's start
        post.y = static_cast<const char*>(out.data_ptr()) - m * K * out.element_size();
        post.out = dtype == compute ? nullptr : y.data_ptr();
        reduce(table().moments, post, partials, m / kChunkRows, (m + n + kChunkRows - 1) / kChunkRows);
    }
    if (!stats) return {y, Tensor(), Tensor()};
    auto [mean, var] = partials.moments(0);
    return {y, mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gemm_backward(const Tensor& dz, const Tensor& y, at::TensorList coef,
                                                         const Tensor& x, at::TensorList prologue, int64_t act,
                                                         double act_param, const Tensor& weight, bool need_input,
                                                         bool need_weight, const OptTensor& add, at::ScalarType compute) {
    const int64_t C = x.size(1), K = weight.size(0), M = x.numel() / C;
    const auto options = x.options().dtype(compute);
    const Tensor w = weight.view({K, C}).to(compute), x2d = rows_of(x);
    const int64_t slice = std::min(M, slice_rows(2 * (C + K), w.element_size()));
    const bool epilogue = !prologue.empty();
    Tensor scratch = at::empty({slice, C}, options), dy_scratch = at::empty({slice, K}, options);

    Args form{};  // dy from (dz, y)
    form.layout = rows_layout(K);
    form.y_type = dtype_of(y.scalar_type());
    form.other_type = dtype_of(compute);
    form.grad_type = dtype_of(dz.scalar_type());
    for (size_t i = 0; i < std::min<size_t>(3, coef.size()); i++) form.coef[i] = coef[i].data_ptr();
    if (coef.size() == 4) form.norm.center = coef[3].data_ptr();

    Args pre{};
    if (epilogue) pre = prologue_args(x, prologue, act, act_param);
    Partials partials({rows_layout(C), M}, 2, wide(x));
    Tensor dx, dx2d, da_scratch, dw;
    const at::ScalarType dx_dtype = epilogue ? compute : x.scalar_type();
    const bool accumulate = add && dx_dtype == compute && add->scalar_type() == compute && !add->is_alias_of(dz);
    if (need_input) {
        dx = accumulate ? *add : empty_like(x, dx_dtype);
        dx2d = rows_of(dx);
        if (dx_dtype != compute) da_scratch = at::empty({slice, C}, options);
    }
    if (need_weight) dw = at::empty({K, C}, options);
    const Tensor add2d = add ? rows_of(*add) : Tensor();
    for (int64_t m = 0; m < M; m += slice) {
        const int64_t n = std::min(slice, M - m);
        Tensor dy = dy_scratch.narrow(0, 0, n);
        form.y = Rows{y, m}.data();
        form.grad = Rows{dz, m}.data();
        form.out = dy.data_ptr();
        run(table().bn_backward, form, {form.layout, n});
        if (need_weight) {
            const Tensor a = operand(x, x2d, pre, epilogue, scratch, compute, m, n);
            if (m == 0) at::mm_out(dw, dy.t(), a);
            else at::addmm_out(dw, dw, dy.t(), a);
        }
        if (!need_input) continue;
        Tensor to = dx2d.narrow(0, m, n);
        Tensor da = da_scratch.defined() ? da_scratch.narrow(0, 0, n) : to;
        if (accumulate) {
            at::addmm_out(to, to, dy, w);
            continue;
        }
        at::mm_out(da, dy, w);
        if (epilogue) {
            Args back = pre;
            back.y = x.data_ptr();
            back.other_type = dtype_of(compute);
            back.grad = back.out = dx.data_ptr();
            reduce(table().bn_act_backward, back, partials, m / kChunkRows, (m + n + kChunkRows - 1) / kChunkRows);
        } else if (add) {
            at::add_out(to, da, add2d.narrow(0, m, n));
        } else if (da_scratch.defined()) {
            to.copy_(da);
        }
    }
    if (need_weight) dw = dw.view(weight.sizes());
    if (!need_input || !epilogue) return {dx, dw, Tensor(), Tensor()};
    return {dx, dw, partials.sum(0), partials.sum(1)};
}

// 3x3, stride 1, channels_last, and so wide that four ninths of the multiplications outweigh the transforms.
bool is_winograd(const Tensor& x, const Tensor& weight, IntList stride, IntList padding, IntList dilation, int64_t groups,
                 int64_t pixels = kWinogradPixelsInTraining) {
    return weight.size(2) == 3 && weight.size(3) == 3 && groups == 1 && stride[0] == 1 && stride[1] == 1 &&
           dilation[0] == 1 && dilation[1] == 1 && padding[0] == padding[1] && padding[0] <= 2 &&
           std::min(weight.size(0), weight.size(1)) >= kWinogradChannels && x.size(2) >= 4 && x.size(3) >= 4 &&
           x.numel() >= pixels * x.size(1) && x.is_contiguous(at::MemoryFormat::ChannelsLast);
}

// The transformed weights [(tile + 2)^2, K, C].
Tensor winograd_weight(const Tensor& weight, bool flip, int tile) {
    const Tensor w = weight.to(at::kFloat).contiguous(at::MemoryFormat::ChannelsLast);
    const int64_t K = w.size(0), C = w.size(1);
    const Tensor u = at::empty({(tile + 2) * (tile + 2), K, C}, w.options().memory_format(at::MemoryFormat::Contiguous));
    const float* from = w.const_data_ptr<float>();
    float* to = u.mutable_data_ptr<float>();
    parallel(0, K, 4, [&](int64_t b, int64_t e) { table().winograd_weight(tile, from, to, K, C, flip, b, e); });
    return u;
}

// out = conv3x3(the input that `in` describes), by products with u [(tile + 2)^2, C, K]; `post` describes the epilogue.
// Each thread takes slices of tiles from the input's transform to the output's. With too few tiles, each thread takes
// some of the products of all tiles instead; otherwise every thread would read the weights.
void winograd(Args in, const Tensor& x, const Tensor& u, Args post, const Tensor& out, int64_t padding) {
    const int64_t products = u.size(0), C = u.size(1), K = u.size(2);
    const int tile = products == 36 ? 4 : 2;
    Winograd q{};
    q.tile = tile;
    q.height = x.size(2), q.width = x.size(3), q.out_height = out.size(2), q.out_width = out.size(3);
    q.tiles_h = (q.out_height + tile - 1) / tile, q.tiles_w = (q.out_width + tile - 1) / tile;
    q.padding = padding;
    const int64_t tiles = x.size(0) * q.tiles_h * q.tiles_w, threads = at::get_num_threads();
    const int64_t takers = tiles >= kWinogradTiles * threads ? threads : 1;
    // so many tiles that the weights are not read more often than the transforms
    const int64_t most = std::max(kWinogradSlice / (4 * products * (C + K)), C * K / (C + K));
    // a multiple of the takers, so that all have the same amount of work
    const int64_t slices = (tiles + most * takers - 1) / (most * takers) * takers, slice = (tiles + slices - 1) / slices;
    const auto options = x.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous);
    const Tensor v = at::empty({takers, products * slice * C}, options), m = at::empty({takers, products * slice * K}, options);
    parallel_aten(0, takers, 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++)
            for (int64_t j = i; j < slices; j += takers) {
                Winograd part = q;
                part.first = j * slice;
                part.count = std::min(slice, tiles - part.first);
                if (part.count <= 0) continue;
                const int64_t end = part.first + part.count;
                const Tensor left = v[i].narrow(0, 0, products * part.count * C), right = m[i].narrow(0, 0, products * part.count * K);
                Tensor product = right.view({products, part.count, K});
                float *left_data = left.mutable_data_ptr<float>(), *right_data = right.mutable_data_ptr<float>();
                // with several takers these loops run in the taker's thread
                parallel(part.first, end, 8, [&](int64_t b, int64_t e) { table().winograd_input(in, part, left_data, b, e); });
                at::bmm_out(product, left.view({products, part.count, C}), u);
                parallel(part.first, end, 8, [&](int64_t b, int64_t e) { table().winograd_output(post, part, right_data, b, e); });
            }
    });
}

int tile_for(const Tensor& out) { return out.numel() / out.size(1) >= kLargeTiles ? 4 : 2; }

// Args of a raw tensor without a norm
Args raw_args(const Tensor& t) {
    Args a{};
    a.layout = rows_layout(t.size(1));
    a.y_type = a.other_type = dtype_of(t.scalar_type());
    a.y = t.data_ptr();
    return a;
}

// The output tensor of a 3x3 convolution of x at stride 1.
Tensor winograd_output(const Tensor& x, int64_t channels, int64_t padding) {
    return at::empty({x.size(0), channels, x.size(2) + 2 * padding - 2, x.size(3) + 2 * padding - 2},
                     x.options().memory_format(at::MemoryFormat::ChannelsLast));
}

// The Args that write act(. (+ residual)) to y.
Args epilogue_args(const Tensor& y, int64_t act, double act_param, const OptTensor& residual) {
    Args a = raw_args(y);
    a.out = y.data_ptr();
    a.act = act_of(act);
    a.act_param = act_param;
    if (residual) {
        TORCH_CHECK(residual->sizes() == y.sizes() && residual->scalar_type() == y.scalar_type() &&
                        residual->is_contiguous(at::MemoryFormat::ChannelsLast),
                    "residual: expected the output's shape, dtype and layout");
        a.residual = residual->data_ptr();
    }
    return a;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> conv_stats(const Tensor& x, const Tensor& weight, IntList stride, IntList padding,
                                              IntList dilation, int64_t groups, at::TensorList prologue, int64_t act,
                                              double act_param, bool stats, at::ScalarType compute, bool gemm) {
    if (gemm && is_gemm(x, weight, stride, padding, groups))
        return gemm_stats(strided(x, stride), weight, prologue, act, act_param, stats, compute);
    if (gemm && compute == at::kFloat && is_winograd(x, weight, stride, padding, dilation, groups)) {
        const Tensor y = winograd_output(x, weight.size(0), padding[0]);
        Args in = prologue.empty() ? raw_args(x) : prologue_args(x, prologue, act, act_param), post = raw_args(y);
        in.y = x.data_ptr();
        post.out = y.data_ptr();
        winograd(in, x, winograd_weight(weight, false, tile_for(y)).transpose(1, 2), post, y, padding[0]);
        if (!stats) return {y, Tensor(), Tensor()};
        auto [mean, var] = bn_stats(y);
        return {y, mean, var};
    }
    const Tensor a = prologue.empty() ? x.to(compute) : bn_act(x, prologue, act, act_param, std::nullopt, {}, compute);
    Tensor y = at::conv2d(a, weight.to(compute), std::nullopt, stride, padding, dilation, groups).contiguous(format_of(x));
    TORCH_CHECK(y.scalar_type() == compute, "conv_stats: the convolution came back in ", y.scalar_type(), ", not in ", compute);
    const View view = View::of(y);
    if (compute == x.scalar_type() && !stats) return {y, Tensor(), Tensor()};
    Args post{};
    post.layout = view.layout;
    post.y_type = dtype_of(compute);
    post.other_type = dtype_of(x.scalar_type());
    const Tensor computed = y;
    post.y = computed.data_ptr();
    if (compute != x.scalar_type()) {
        y = empty_like(computed, x.scalar_type());
        post.out = y.data_ptr();
    }
    Partials partials(view, 2, wide(x));
    reduce(table().moments, post, partials, 0, partials.chunks());
    if (!stats) return {y, Tensor(), Tensor()};
    auto [mean, var] = partials.moments(view.layout.plane);
    return {y, mean, var};
}

Tensor conv_bn_act(const Tensor& x, const Tensor& weight, IntList stride, IntList padding, IntList dilation, int64_t groups,
                   at::TensorList norm, int64_t act, double act_param, const OptTensor& residual, at::ScalarType compute, bool gemm) {
    if (gemm && compute == at::kFloat && is_winograd(x, weight, stride, padding, dilation, groups)) {
        const Tensor y = winograd_output(x, weight.size(0), padding[0]);
        Args post = epilogue_args(y, act, act_param, residual);
        set_norm(post.norm, norm, y);
        winograd(raw_args(x), x, winograd_weight(weight, false, tile_for(y)).transpose(1, 2), post, y, padding[0]);
        return y;
    }
    const Tensor y = std::get<0>(conv_stats(x, weight, stride, padding, dilation, groups, {}, 0, 0, false, compute, gemm));
    bn_act_in_place(y, norm, act, act_param, residual);
    return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_backward(const Tensor& dz, const Tensor& y, at::TensorList coef,
                                                         const Tensor& x, at::TensorList prologue, int64_t act,
                                                         double act_param, const Tensor& weight, IntList stride,
                                                         IntList padding, IntList dilation, int64_t groups,
                                                         bool need_input, bool need_weight, const OptTensor& add,
                                                         at::ScalarType compute, bool gemm) {
    const bool epilogue = !prologue.empty();
    const bool one = stride[0] == 1 && stride[1] == 1;
    if (gemm && is_gemm(x, weight, stride, padding, groups) && (one || !epilogue)) {
        if (one) return gemm_backward(dz, y, coef, x, prologue, act, act_param, weight, need_input, need_weight, add, compute);
        // only the pixels that the convolution read have a gradient
        auto [some, dw, s0, s1] = gemm_backward(dz, y, coef, strided(x, stride), {}, act, act_param, weight, need_input,
                                                need_weight, std::nullopt, compute);
        if (!need_input) return {Tensor(), dw, s0, s1};
        Tensor dx = !add ? at::zeros_like(x) : add->is_alias_of(dz) ? add->clone() : *add;
        dx.slice(2, 0, std::nullopt, stride[0]).slice(3, 0, std::nullopt, stride[1]).add_(some);
        return {dx, dw, s0, s1};
    }
    const Tensor dy = bn_backward(dz, y, coef, compute);
    const Tensor a = epilogue ? bn_act(x, {prologue[0], prologue[1]}, act, act_param, std::nullopt, {}, compute) : x.to(compute);
    const bool fast = need_input && gemm && compute == at::kFloat && padding[0] <= 1 &&
                      is_winograd(dy, weight, stride, padding, dilation, groups);
    auto [da, dw, _] = at::convolution_backward(dy, a, weight.to(compute), std::nullopt, stride, padding, dilation, false,
                                                {0, 0}, groups, {need_input && !fast, need_weight, false});
    if (fast) {
        // the gradient of a convolution is the convolution with the turned kernel, padded by 2 - padding
        da = empty_like(x, compute);
        Args post = raw_args(da);
        post.out = da.data_ptr();
        winograd(raw_args(dy), dy, winograd_weight(weight, true, tile_for(da)), post, da, 2 - padding[0]);
    }
    if (!need_input) return {Tensor(), dw, Tensor(), Tensor()};
    TORCH_CHECK(da.scalar_type() == compute, "conv_backward: the gradient came back in ", da.scalar_type(), ", not in ", compute);
    da = da.contiguous(format_of(x));
    if (!epilogue) return {add ? da.add_(*add) : da, dw, Tensor(), Tensor()};
    // dz of the unit before replaces da
    Args back{};
    back.layout = View::of(x).layout;
    back.y_type = dtype_of(x.scalar_type());
    back.other_type = dtype_of(compute);
    back.act = act_of(act);
    back.act_param = act_param;
    back.y = x.data_ptr();
    set_norm(back.norm, prologue, x);
    back.grad = back.out = da.data_ptr();
    Partials partials(View::of(x), 2, wide(x));
    reduce(table().bn_act_backward, back, partials, 0, partials.chunks());
    return {da, dw, partials.sum(0), partials.sum(1)};
}

int64_t winograd_tile(const Tensor& x, const Tensor& weight, IntList stride, IntList padding, IntList dilation,
                      int64_t groups) {
    return is_winograd(x, weight, stride, padding, dilation, groups, kWinogradPixels) ? 4 : 0;
}

Tensor winograd_prepack(const Tensor& weight, int64_t tile) {
    TORCH_CHECK(tile == 2 || tile == 4, "tile: expected 2 or 4, got ", tile);
    // [(tile + 2)^2, C, K], contiguous: the right operand of the products
    return winograd_weight(weight, false, int(tile)).transpose(1, 2).contiguous();
}

Tensor winograd_bias_act(const Tensor& x, const Tensor& packed, const Tensor& bias, int64_t padding, int64_t act,
                         double act_param, const OptTensor& residual) {
    TORCH_CHECK(packed.dim() == 3 && (packed.size(0) == 16 || packed.size(0) == 36),
                "packed: expected what winograd_prepack returns, got ", packed.sizes());
    const int64_t C = packed.size(1), K = packed.size(2);
    TORCH_CHECK(x.is_contiguous(at::MemoryFormat::ChannelsLast) && x.size(1) == C, "x: expected channels_last with ", C,
                " channels, got ", x.sizes());
    TORCH_CHECK(bias.scalar_type() == at::kFloat && bias.is_contiguous() && bias.numel() == K,
                "bias: expected ", K, " float32 values");
    const Tensor y = winograd_output(x, K, padding);
    Args post = epilogue_args(y, act, act_param, residual);
    post.norm.shift = bias.data_ptr();
    winograd(raw_args(x), x, packed, post, y, padding);
    return y;
}

}  // namespace fused_resnet::cpu
