// Convolutions between their BatchNorms: what conv_list.h offers, or ATen's (oneDNN) between passes of their own.
#include "args.h"
#include "conv_list.h"
#include "product.h"

namespace fused_resnet::cpu {

namespace {

// The convolutions between BatchNorms, in order: the first that takes a case runs it.
enum class Algorithm { gemm, winograd, implicit_gemm, aten };

// The bits of ConvSpec.products: the passes that run as implicit_gemm, if the algorithms before it do not take them.
enum Pass { kForward = 1, kInputGradient = 2, kWeightGradient = 4 };

// Of a convolution of x. The gradient of its input is a convolution of dy.
Algorithm algorithm_of(const Image& x, const Tensor& weight, IntList stride, IntList padding, IntList dilation,
                       int64_t groups, ScalarType compute, bool gemm, bool implicit) {
    if (gemm && is_gemm(x, weight, stride, padding, groups)) return Algorithm::gemm;
    // in float, also for bfloat16, whose own products take half of the time
    const GemmKernel* const kernel = gemm_kernel_of(compute);
    if (gemm && kernel && is_winograd(x, weight, stride, padding, dilation, groups, false, kernel->word))
        return Algorithm::winograd;
    if (gemm && implicit && kernel && is_implicit_gemm(x, weight, groups, kernel->word))
        return Algorithm::implicit_gemm;
    return Algorithm::aten;
}

// Whether the backward of a 1x1 convolution is that of a matrix product.
bool gemm_backwards(IntList stride, bool prologue) { return (stride[0] == 1 && stride[1] == 1) || !prologue; }

Algorithm algorithm_of_wgrad(const Image& x, const Tensor& weight, IntList stride, IntList padding, IntList dilation,
                             int64_t groups, bool prologue, ScalarType compute, bool gemm, int64_t products) {
    const bool implicit = products & kWeightGradient;
    const Algorithm found = algorithm_of(x, weight, stride, padding, dilation, groups, compute, gemm, implicit);
    // oneDNN's gradient of a strided 1x1 convolution is wrong on AVX2, or does not end
    if (found == Algorithm::gemm && !gemm_backwards(stride, prologue))
        return gemm_kernel_of(compute) ? Algorithm::implicit_gemm : Algorithm::aten;
    if (found != Algorithm::winograd || compute == ScalarType::Float) return found;
    // the transform reads dy in float
    return implicit && is_implicit_gemm(x, weight, groups, 1) ? Algorithm::implicit_gemm : Algorithm::aten;
}

Algorithm algorithm_of_dgrad(const Image& dy, const Tensor& weight, IntList stride, IntList padding, IntList dilation,
                             int64_t groups, ScalarType compute, bool gemm, int64_t products) {
    const bool implicit = products & kInputGradient && stride[0] == 1 && stride[1] == 1;
    const Algorithm found = algorithm_of(dy, weight, stride, padding, dilation, groups, compute, gemm, implicit);
    // the turned kernel's padding, 2 - padding, is not negative
    return found == Algorithm::winograd && padding[0] > 1 ? Algorithm::aten : found;
}

}  // namespace

std::string conv_algorithm(std::string_view kind, const Tensor& x, const Tensor& weight, IntList stride,
                           IntList padding, IntList dilation, int64_t groups, bool prologue, ScalarType compute,
                           bool gemm, int64_t products) {
    const Image image(x);
    Algorithm found =
        kind == "wgrad"
            ? algorithm_of_wgrad(image, weight, stride, padding, dilation, groups, prologue, compute, gemm, products)
            : algorithm_of(image, weight, stride, padding, dilation, groups, compute, gemm, products & kForward);
    if (kind == "dgrad") {
        const auto size = [&](int64_t d) {
            return output_size(x.size(2 + d), weight.size(2 + d), stride[d], padding[d], dilation[d]);
        };
        const Image dy(x.size(0), weight.size(0), size(0), size(1), image.format());
        found = algorithm_of_dgrad(dy, weight, stride, padding, dilation, groups, compute, gemm, products);
    }
    if (kind != "fprop" && found == Algorithm::gemm && !gemm_backwards(stride, prologue)) found = Algorithm::aten;
    switch (found) {
        case Algorithm::gemm: return "gemm";
        case Algorithm::winograd: return "winograd";
        case Algorithm::implicit_gemm: return "implicit_gemm";
        default: return "aten";
    }
}

std::tuple<Tensor, Tensor, Tensor> conv_stats(const Tensor& x, const Tensor& weight, IntList stride, IntList padding,
                                              IntList dilation, int64_t groups, TensorList prologue, int64_t act,
                                              double act_param, bool stats, ScalarType compute, bool gemm,
                                              int64_t products) {
    const Algorithm algorithm =
        algorithm_of(Image(x), weight, stride, padding, dilation, groups, compute, gemm, products & kForward);
    if (algorithm == Algorithm::gemm)
        return gemm_stats(strided(x, stride), weight, prologue, act, act_param, stats, compute);
    if (algorithm == Algorithm::winograd) {
        const Tensor y = winograd_output(x, weight.size(0), padding[0]);
        Args in = prologue.empty() ? raw_args(x) : prologue_args(x, prologue, act, act_param), post = raw_args(y);
        in.y = x.data_ptr();
        post.out = y.data_ptr();
        winograd(in, x, weight, false, post, y, padding[0]);
        if (!stats) return {y, Tensor(), Tensor()};
        auto [mean, var] = bn_stats(y);
        return {y, mean, var};
    }
    const Tensor a = prologue.empty() ? x.to(compute) : bn_act(x, prologue, act, act_param, std::nullopt, {}, compute);
    const Tensor w = weight.to(compute);
    Tensor y = algorithm == Algorithm::implicit_gemm
                   ? implicit_gemm(a, w, stride, padding, dilation)
                   : conv2d(a, w, std::nullopt, stride, padding, dilation, groups).contiguous(format_of(x));
    FR_CHECK(y.scalar_type() == compute, "conv_stats: the convolution came back in ", y.scalar_type(), ", not in ",
             compute);
    const View view = View::of(y);
    if (compute == x.scalar_type() && !stats) return {y, Tensor(), Tensor()};
    Args post{};
    post.layout = view.layout;
    post.y_type = dtype_of(compute);
    post.other_type = dtype_of(x.scalar_type());
    const Tensor computed = y;
    post.y = computed.data_ptr();
    if (compute != x.scalar_type()) {
        y = empty_like(computed, x.scalar_type(), view.format());
        post.out = y.data_ptr();
    }
    Partials partials(view, 2, wide(x));
    reduce(table().moments, post, partials, 0, partials.chunks);
    if (!stats) return {y, Tensor(), Tensor()};
    auto [mean, var] = partials.moments(view.layout.plane);
    return {y, mean, var};
}

Tensor conv_bn_act(const Tensor& x, const Tensor& weight, IntList stride, IntList padding, IntList dilation,
                   int64_t groups, TensorList norm, int64_t act, double act_param, const OptTensor& residual,
                   ScalarType compute, bool gemm, int64_t products) {
    if (algorithm_of(Image(x), weight, stride, padding, dilation, groups, compute, gemm, false) ==
        Algorithm::winograd) {
        const Tensor y = winograd_output(x, weight.size(0), padding[0]);
        Args post = epilogue_args(y, act, act_param, residual);
        set_norm(post.norm, norm, y);
        winograd(raw_args(x), x, weight, false, post, y, padding[0]);
        return y;
    }
    const Tensor y =
        std::get<0>(conv_stats(x, weight, stride, padding, dilation, groups, {}, 0, 0, false, compute, gemm, products));
    bn_act_in_place(y, norm, act, act_param, residual);
    return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_backward(const Tensor& dz, const Tensor& y, TensorList coef,
                                                         const Tensor& x, TensorList prologue, int64_t act,
                                                         double act_param, const Tensor& weight, IntList stride,
                                                         IntList padding, IntList dilation, int64_t groups,
                                                         bool need_input, bool need_weight, const OptTensor& add,
                                                         ScalarType compute, bool gemm, int64_t products) {
    const bool epilogue = !prologue.empty();
    const Algorithm algorithm =
        algorithm_of_wgrad(Image(x), weight, stride, padding, dilation, groups, epilogue, compute, gemm, products);
    if (algorithm == Algorithm::gemm) {
        if (stride[0] == 1 && stride[1] == 1)
            return gemm_backward(dz, y, coef, x, prologue, act, act_param, weight, need_input, need_weight, add,
                                 compute);
        // only the pixels that the convolution read have a gradient
        auto [some, dw, s0, s1] = gemm_backward(dz, y, coef, strided(x, stride), {}, act, act_param, weight, need_input,
                                                need_weight, std::nullopt, compute);
        if (!need_input) return {Tensor(), dw, s0, s1};
        Tensor dx = add ? add->contiguous(kRows) : zeros(x.sizes(), x.options(), kRows);
        if (add && dx.storage() == dz.storage()) dx = dx.clone();
        add_strided(dx, stride, some);
        return {dx, dw, s0, s1};
    }
    const Tensor dy = bn_backward(dz, y, coef, compute);
    const Algorithm for_input =
        algorithm_of_dgrad(Image(dy), weight, stride, padding, dilation, groups, compute, gemm, products);
    const bool rows = dy.is_channels_last(),
               ours = for_input == Algorithm::winograd || for_input == Algorithm::implicit_gemm;
    const bool transformed = algorithm == Algorithm::winograd && rows;
    const bool gathered = algorithm == Algorithm::implicit_gemm && rows;
    const bool library_input = need_input && !ours, library_weight = need_weight && !transformed && !gathered;
    Tensor da, dw, a;
    if (library_input || library_weight || (need_weight && gathered))
        a = epilogue ? bn_act(x, {prologue[0], prologue[1]}, act, act_param, std::nullopt, {}, compute) : x.to(compute);
    if (library_input || library_weight)
        std::tie(da, dw) = conv2d_backward(dy, a, weight.to(compute), stride, padding, dilation, groups, library_input,
                                           library_weight);
    if (need_weight && gathered) dw = implicit_gemm_backward_weight(a, dy, weight, stride, padding, dilation);
    if (need_weight && transformed) {
        Args in = epilogue ? prologue_args(x, prologue, act, act_param) : raw_args(x);
        in.y = x.data_ptr();
        dw = winograd_backward_weight(in, x, dy, padding[0]);
    }
    if (need_input && for_input == Algorithm::implicit_gemm)
        da = implicit_gemm_backward_input(dy, weight.to(compute), padding, dilation);
    if (need_input && for_input == Algorithm::winograd) {
        // the gradient of a convolution is the convolution with the turned kernel, padded by 2 - padding
        da = empty_like(x, compute, format_of(x));
        Args post = raw_args(da);
        post.out = da.data_ptr();
        winograd(raw_args(dy), dy, weight, true, post, da, 2 - padding[0]);
    }
    if (!need_input) return {Tensor(), dw, Tensor(), Tensor()};
    FR_CHECK(da.scalar_type() == compute, "conv_backward: the gradient came back in ", da.scalar_type(), ", not in ",
             compute);
    da = da.contiguous(format_of(x));
    if (!epilogue) {
        if (add) add_to(da, *add);
        return {da, dw, Tensor(), Tensor()};
    }
    // dz of the unit before replaces da
    Args back{};
    back.layout = View::of(x).layout;
    back.y_type = dtype_of(x.scalar_type());
    back.other_type = back.grad_type = dtype_of(compute);
    back.act = act_of(act);
    back.act_param = act_param;
    back.y = x.data_ptr();
    set_norm(back.norm, prologue, x);
    back.grad = back.out = da.data_ptr();
    Partials partials(View::of(x), 2, wide(x));
    reduce(table().bn_act_backward, back, partials, 0, partials.chunks);
    return {da, dw, partials.sum(0), partials.sum(1)};
}

}  // namespace fused_resnet::cpu
