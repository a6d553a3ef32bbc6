"""Every wrong argument is answered by an error that names it, what came and what was expected, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from fused_resnet.backends import BackendUnavailable, BnAct, Case, loaded, use_backend
from fused_resnet.functional import Unit, bn_act, conv_bn_act, residual_chain
from fused_resnet.spec import Act, ChainSpec, ConvSpec, PoolSpec, ShortcutSpec, UnitSpec

Call = Callable[[dict[str, Tensor]], Any]


def statistics() -> dict[str, Tensor]:
    """Running statistics of 4 and of 6 channels, which no failing call may touch."""
    torch.manual_seed(0)
    found = {f"mean{c}": torch.randn(c) for c in (4, 6)}
    return found | {f"var{c}": torch.rand(c) + 0.5 for c in (4, 6)}


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape or (2, 4, 5, 5), dtype=dtype)


def w(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape or (6, 4, 3, 3), dtype=dtype)


def conv(**changes: Any) -> Call:
    """conv_bn_act in training on [2, 4, 5, 5] with a [6, 4, 3, 3] kernel, but for what is changed."""

    def call(s: dict[str, Tensor]) -> Any:
        given = {"x": x(), "weight": w(), "bn_weight": torch.ones(6), "bn_bias": torch.zeros(6), "training": True}
        given |= {"running_mean": s["mean6"], "running_var": s["var6"]}
        return conv_bn_act(**given | changes)

    return call


def norm(**changes: Any) -> Call:
    """bn_act in training on [2, 4, 5, 5], but for what is changed."""

    def call(s: dict[str, Tensor]) -> Any:
        given = {"x": x(), "bn_weight": torch.ones(4), "bn_bias": torch.zeros(4), "training": True}
        given |= {"running_mean": s["mean4"], "running_var": s["var4"]}
        return bn_act(**given | changes)

    return call


def unit(s: dict[str, Tensor], cin: int, cout: int, **changes: Any) -> Unit:
    given = {"weight": w(cout, cin, 3, 3), "padding": 1, "training": True}
    given |= {"running_mean": s[f"mean{cout}"], "running_var": s[f"var{cout}"]}
    return Unit(**given | changes)


def block(first: dict[str, Any] | None = None, second: dict[str, Any] | None = None, **changes: Any) -> Call:
    """residual_chain of a BasicBlock 4 -> 6 -> 4 with its identity, but for what is changed."""

    def call(s: dict[str, Tensor]) -> Any:
        units = [unit(s, 4, 6, **first or {}), unit(s, 6, 4, **second or {})]
        return residual_chain(**{"x": x(), "units": units} | changes)

    return call


def projected(projection: dict[str, Any] | None = None, **changes: Any) -> Call:
    """residual_chain of a unit 4 -> 6 with a 1x1 projection, but for what is changed."""

    def call(s: dict[str, Tensor]) -> Any:
        shortcut = {"weight": w(6, 4, 1, 1), "padding": 0, "act": None, "running_mean": None, "running_var": None}
        given = {"x": x(), "units": [unit(s, 4, 6)], "shortcut": unit(s, 4, 6, **shortcut | (projection or {}))}
        return residual_chain(**given | changes)

    return call


class Bad(NamedTuple):
    """A call, the error, and what its message says: the argument first, then words of what came and what was wanted."""

    call: Call
    error: type[Exception]
    argument: str
    says: tuple[str, ...]


META = torch.empty(4, device="meta")
BAD: dict[str, Bad] = {
    # x
    "x_none": Bad(conv(x=None), TypeError, "x", ("Tensor", "NoneType")),
    "x_list": Bad(conv(x=[[1.0]]), TypeError, "x", ("Tensor", "list")),
    "x_numpy": Bad(conv(x=x().numpy()), TypeError, "x", ("Tensor", "ndarray")),
    "x_3d": Bad(conv(x=x(4, 5, 5)), ValueError, "weight", ("3 dimensions", "as x has", "got shape (")),
    "x_5d": Bad(conv(x=x(1, 2, 4, 5, 5)), ValueError, "weight", ("5 dimensions", "as x has", "got shape (")),
    "x_2d": Bad(norm(x=x(2, 4)), ValueError, "x", ("4 dimensions", "(2, 4)")),
    "x_6d": Bad(norm(x=x(1, 4, 2, 2, 5, 5)), ValueError, "x", ("5 [N, C, D, H, W]", "(1, 4, 2, 2, 5, 5)")),
    "x_0d": Bad(norm(x=torch.tensor(1.0)), ValueError, "x", ("4 dimensions", "()")),
    "x_int": Bad(conv(x=x(dtype=torch.int64)), TypeError, "x", ("float32", "int64")),
    "x_uint8": Bad(norm(x=x(dtype=torch.uint8)), TypeError, "x", ("float32", "uint8")),
    "x_bool": Bad(conv(x=x(dtype=torch.bool)), TypeError, "x", ("float32", "bool")),
    "x_complex": Bad(norm(x=x(dtype=torch.complex64)), TypeError, "x", ("float32", "complex64")),
    "x_float8": Bad(conv(x=x().to(torch.float8_e4m3fn)), TypeError, "x", ("float32", "float8_e4m3fn")),
    "x_sparse": Bad(norm(x=x().to_sparse()), TypeError, "x", ("dense", "sparse_coo")),
    "x_mkldnn": Bad(conv(x=x().to_mkldnn()), TypeError, "x", ("dense", "mkldnn")),
    "x_on_another_device": Bad(conv(x=x().to("meta")), ValueError, "weight", ("meta", "cpu")),
    "x_no_channels": Bad(norm(x=x(2, 0, 5, 5)), ValueError, "bn_weight", ("(0,)", "(4,)")),
    # weight
    "weight_none": Bad(conv(weight=None), TypeError, "weight", ("Tensor", "NoneType")),
    "weight_2d": Bad(conv(weight=w(6, 4)), ValueError, "weight", ("4 dimensions", "(6, 4)")),
    "weight_5d": Bad(conv(weight=w(6, 4, 3, 3, 3)), ValueError, "weight", ("4 dimensions", "(6, 4, 3, 3, 3)")),
    "weight_int": Bad(conv(weight=w(dtype=torch.int32)), TypeError, "weight", ("float32", "int32")),
    "weight_other_dtype": Bad(conv(weight=w(dtype=torch.float64)), TypeError, "weight", ("float32", "float64")),
    "weight_other_16_bit": Bad(
        conv(x=x(dtype=torch.bfloat16), weight=w(dtype=torch.float16)), TypeError, "weight", ("bfloat16", "float16")
    ),
    "weight_other_device": Bad(conv(weight=w().to("meta")), ValueError, "weight", ("cpu", "meta")),
    "weight_channels": Bad(conv(weight=w(6, 3, 3, 3)), ValueError, "weight", ("4 input channels", "(6, 3, 3, 3)")),
    "weight_channels_of_groups": Bad(
        conv(groups=2), ValueError, "weight", ("4 input channels", "(6, 4, 3, 3)", "groups 2")
    ),
    "weight_no_kernel": Bad(conv(weight=w(6, 4, 0, 3)), ValueError, "weight", ("at least 1x1", "(6, 4, 0, 3)")),
    "weight_no_output": Bad(conv(weight=w(0, 4, 3, 3)), ValueError, "weight", ("at least one output", "(0, 4, 3, 3)")),
    "weight_larger_than_x": Bad(conv(weight=w(6, 4, 6, 3)), ValueError, "weight", ("(6, 3)", "(5, 5)")),
    "weight_dilated_beyond_x": Bad(conv(dilation=3), ValueError, "weight", ("dilation (3, 3)", "(5, 5)")),
    # stride, padding, dilation, groups
    "stride_zero": Bad(conv(stride=0), ValueError, "stride", (">= 1", "0")),
    "stride_negative": Bad(conv(stride=(1, -2)), ValueError, "stride", (">= 1", "-2")),
    "stride_float": Bad(conv(stride=2.0), TypeError, "stride", ("int", "2.0")),
    "stride_three": Bad(conv(stride=(1, 1, 1)), ValueError, "stride", ("two ints", "3 values")),
    "stride_empty": Bad(conv(stride=()), ValueError, "stride", ("two ints", "0 values")),
    "stride_bool": Bad(conv(stride=True), TypeError, "stride", ("int", "True")),
    "stride_none": Bad(conv(stride=None), TypeError, "stride", ("int", "None")),
    "stride_numpy_bool": Bad(conv(stride=np.bool_(True)), TypeError, "stride", ("int", "True")),
    "stride_bools": Bad(conv(stride=(True, 1)), TypeError, "stride", ("int", "True")),
    "stride_numpy_float": Bad(conv(stride=np.float64(2)), TypeError, "stride", ("int", "2.0")),
    "stride_float_tensor": Bad(conv(stride=torch.tensor(2.0)), TypeError, "stride", ("int", "tensor(2.)")),
    "stride_tensor_of_two": Bad(conv(stride=torch.tensor([1, 2])), TypeError, "stride", ("int", "tensor([1, 2])")),
    "stride_array": Bad(conv(stride=np.array([1, 2])), TypeError, "stride", ("int", "array([1, 2])")),
    "stride_range": Bad(conv(stride=range(1, 3)), TypeError, "stride", ("int", "range(1, 3)")),
    "stride_list_of_float": Bad(conv(stride=[1, np.float32(2)]), TypeError, "stride", ("int", "2.0")),
    "stride_numpy_zero": Bad(conv(stride=np.int64(0)), ValueError, "stride", (">= 1", "0")),
    "stride_text": Bad(conv(stride="22"), TypeError, "stride", ("int", "'22'")),
    "dilation_zero": Bad(conv(dilation=0), ValueError, "dilation", (">= 1", "0")),
    "dilation_mixed": Bad(conv(dilation=(1, 1.5)), TypeError, "dilation", ("int", "1.5")),
    "padding_negative": Bad(conv(padding=-1), ValueError, "padding", (">= 0", "-1")),
    "padding_word": Bad(conv(padding="foo"), ValueError, "padding", ("'same'", "'valid'", "'foo'")),
    "padding_same_strided": Bad(conv(padding="same", stride=2), ValueError, "padding", ("stride 1", "(2, 2)")),
    "padding_same_even": Bad(conv(padding="same", weight=w(6, 4, 2, 2)), ValueError, "padding", ("'same'", "(2, 2)")),
    "padding_float": Bad(conv(padding=0.5), TypeError, "padding", ("int", "0.5")),
    "padding_four": Bad(conv(padding=(1, 1, 1, 1)), ValueError, "padding", ("two ints", "4 values")),
    "groups_zero": Bad(conv(groups=0), ValueError, "groups", ("divisor of the 6", "0")),
    "groups_negative": Bad(conv(groups=-2), ValueError, "groups", ("divisor of the 6", "-2")),
    "groups_do_not_divide": Bad(conv(groups=4, weight=w(6, 1, 3, 3)), ValueError, "groups", ("divisor of the 6", "4")),
    "groups_float": Bad(conv(groups=1.0), TypeError, "groups", ("int", "1.0")),
    "groups_list": Bad(conv(groups=[1]), TypeError, "groups", ("int", "[1]")),
    "groups_numpy": Bad(
        conv(groups=np.int64(4), weight=w(6, 1, 3, 3)), ValueError, "groups", ("divisor of the 6", "4")
    ),
    "groups_bool": Bad(conv(groups=True), TypeError, "groups", ("int", "True")),
    # BatchNorm
    "one_value_per_channel": Bad(
        norm(x=x(1, 4, 1, 1)), ValueError, "x", ("more than 1 value per channel", "(1, 4, 1, 1)")
    ),
    "one_value_per_channel_after_conv": Bad(
        conv(x=x(1, 4, 3, 3)), ValueError, "x", ("more than 1 value per channel", "(1, 6, 1, 1)")
    ),
    "eps_zero": Bad(norm(eps=0), ValueError, "eps", ("positive", "0")),
    "eps_negative": Bad(conv(eps=-1e-5), ValueError, "eps", ("positive", "-1e-05")),
    "eps_text": Bad(norm(eps="small"), TypeError, "eps", ("number", "'small'")),
    "eps_numpy_zero": Bad(norm(eps=np.float32(0)), ValueError, "eps", ("positive", "0")),
    "eps_false": Bad(norm(eps=False), ValueError, "eps", ("positive", "0")),
    "eps_vector": Bad(norm(eps=torch.tensor([1e-5])), TypeError, "eps", ("number", "tensor([1.0000e-05])")),
    "eps_learnt": Bad(norm(eps=torch.tensor(1.0, requires_grad=True)), TypeError, "eps", ("number", "requires_grad")),
    "eps_array": Bad(norm(eps=np.array(1e-5)), TypeError, "eps", ("number", "array(1.e-05)")),
    "eps_list": Bad(norm(eps=[1e-5]), TypeError, "eps", ("number", "[1e-05]")),
    "eps_negative_in_eval": Bad(norm(eps=-1e-5, training=False), ValueError, "eps", ("0 too", "-1e-05")),
    "eps_none": Bad(conv(eps=None), TypeError, "eps", ("number", "None")),
    "momentum_text": Bad(norm(momentum="0.1"), TypeError, "momentum", ("number", "'0.1'")),
    "momentum_fraction": Bad(norm(momentum=Fraction(1, 10)), TypeError, "momentum", ("number", "Fraction(1, 10)")),
    "momentum_complex": Bad(norm(momentum=0.1 + 0j), TypeError, "momentum", ("number", "(0.1+0j)")),
    "momentum_huge": Bad(norm(momentum=10**400), ValueError, "momentum", ("float64", "1000")),
    "momentum_vector": Bad(conv(momentum=torch.tensor([0.1])), TypeError, "momentum", ("number", "tensor([0.1000])")),
    "momentum_none": Bad(norm(momentum=None), TypeError, "momentum", ("number", "None")),
    "training_number": Bad(norm(training=1), TypeError, "training", ("bool", "1")),
    "training_text": Bad(norm(training="yes"), TypeError, "training", ("bool", "'yes'")),
    "gamma_length": Bad(conv(bn_weight=torch.ones(5)), ValueError, "bn_weight", ("(6,)", "(5,)")),
    "gamma_2d": Bad(norm(bn_weight=torch.ones(4, 1)), ValueError, "bn_weight", ("(4,)", "(4, 1)")),
    "gamma_number": Bad(norm(bn_weight=1.0), TypeError, "bn_weight", ("Tensor", "float")),
    "gamma_dtype": Bad(norm(bn_weight=torch.ones(4).double()), TypeError, "bn_weight", ("float32", "float64")),
    "gamma_int": Bad(norm(bn_weight=torch.ones(4).int()), TypeError, "bn_weight", ("float32", "int32")),
    "gamma_other_device": Bad(norm(bn_weight=META), ValueError, "bn_weight", ("cpu", "meta")),
    "beta_length": Bad(norm(bn_bias=torch.zeros(1)), ValueError, "bn_bias", ("(4,)", "(1,)")),
    "mean_length": Bad(norm(running_mean=torch.zeros(5)), ValueError, "running_mean", ("(4,)", "(5,)")),
    "mean_other_device": Bad(norm(running_mean=META), ValueError, "running_mean", ("cpu", "meta")),
    "var_dtype": Bad(norm(running_var=torch.ones(4).half()), TypeError, "running_var", ("float32", "float16")),
    "var_only": Bad(norm(running_mean=None), ValueError, "running_mean", ("running_var", "None")),
    "mean_only": Bad(conv(running_var=None), ValueError, "running_var", ("running_mean", "None")),
    "eval_without_statistics": Bad(
        norm(running_mean=None, running_var=None, training=False),
        ValueError,
        "running_mean",
        ("training=False", "None"),
    ),
    # bias, activation, residual, pool
    "bias_length": Bad(conv(bias=torch.zeros(4)), ValueError, "bias", ("(6,)", "(4,)")),
    "bias_dtype": Bad(conv(bias=torch.zeros(6).double()), TypeError, "bias", ("float32", "float64")),
    "bias_number": Bad(conv(bias=0.0), TypeError, "bias", ("Tensor", "float")),
    "act_unknown": Bad(norm(act="softsign"), ValueError, "act", ("relu", "'softsign'")),
    "act_limit": Bad(norm(act=("hardtanh", 0.0)), ValueError, "act", ("positive limit", "0.0")),
    "act_alpha": Bad(norm(act=("celu", 0)), ValueError, "act", ("alpha of celu",)),
    "act_case": Bad(conv(act="ReLU"), ValueError, "act", ("relu", "'ReLU'")),
    "act_function": Bad(norm(act=torch.relu), TypeError, "act", ("name", "relu")),
    "act_parameter": Bad(norm(act=("leaky_relu", "0.1")), TypeError, "act", ("number", "'0.1'")),
    "act_parameter_vector": Bad(norm(act=("elu", torch.ones(1))), TypeError, "act", ("number", "tensor([1.])")),
    "act_three": Bad(norm(act=("elu", 1.0, 2.0)), TypeError, "act", ("pair", "2.0")),
    "act_list": Bad(norm(act=["relu"]), TypeError, "act", ("name", "['relu']")),
    "residual_shape": Bad(norm(residual=x(2, 4, 5, 4)), ValueError, "residual", ("(2, 4, 5, 5)", "(2, 4, 5, 4)")),
    "residual_broadcast": Bad(conv(residual=x(1, 6, 1, 1)), ValueError, "residual", ("(2, 6, 3, 3)", "(1, 6, 1, 1)")),
    "residual_dtype": Bad(norm(residual=x(dtype=torch.float64)), TypeError, "residual", ("float32", "float64")),
    "residual_device": Bad(norm(residual=x().to("meta")), ValueError, "residual", ("cpu", "meta")),
    "residual_number": Bad(norm(residual=1.0), TypeError, "residual", ("Tensor", "float")),
    "residual_and_pool": Bad(
        conv(residual=x(2, 6, 3, 3), max_pool=PoolSpec.make(2)), ValueError, "max_pool", ("no residual", "'tensor'")
    ),
    "pool_number": Bad(conv(max_pool=3), TypeError, "max_pool", ("PoolSpec", "3")),
    "pool_larger_than_output": Bad(conv(max_pool=PoolSpec.make(4)), ValueError, "max_pool", ("(4, 4)", "(3, 3)")),
    "pool_ceil": Bad(
        conv(max_pool=PoolSpec.make(2, ceil_mode=True)), ValueError, "max_pool", ("ceil_mode=False", "True")
    ),
    "pool_padding": Bad(lambda s: PoolSpec.make(3, 2, 2), ValueError, "pool padding", ("half", "(3, 3)", "(2, 2)")),
    "pool_padding_direct": Bad(
        lambda s: PoolSpec((3, 3), (2, 2), (2, 2)), ValueError, "pool padding", ("half", "(3, 3)", "(2, 2)")
    ),
    "pool_ceil_number": Bad(lambda s: PoolSpec.make(3, ceil_mode=0), TypeError, "pool ceil_mode", ("bool", "0")),
    "pool_count_number": Bad(
        lambda s: PoolSpec.make(3, count_include_pad=1), TypeError, "pool count_include_pad", ("bool", "1")
    ),
    "pool_kernel_float": Bad(lambda s: PoolSpec.make(np.float32(3)), TypeError, "pool kernel", ("int", "3.0")),
    "pool_stride_zero": Bad(lambda s: PoolSpec((3, 3), (0, 2)), ValueError, "pool stride", (">= 1", "0")),
    "pool_kernel_zero": Bad(lambda s: PoolSpec.make(0), ValueError, "pool kernel", (">= 1", "0")),
    "pool_window_too_big": Bad(
        conv(x=x(2, 4, 40, 40), max_pool=PoolSpec.make((16, 17))), ValueError, "max_pool", ("256", "(16, 17)")
    ),
    "recompute_text": Bad(conv(recompute="no"), TypeError, "recompute", ("bool", "'no'")),
    # residual_chain
    "units_none": Bad(block(units=None), ValueError, "units", ("at least one Unit", "None")),
    "units_empty": Bad(block(units=[]), ValueError, "units", ("at least one Unit", "[]")),
    "units_a_unit": Bad(block(units=Unit(w())), ValueError, "units", ("at least one Unit", "Unit")),
    "units_of_modules": Bad(block(units=[torch.nn.ReLU()]), TypeError, "units[0]", ("Unit", "ReLU")),
    "unit_without_conv_inside": Bad(block(second={"weight": None}), ValueError, "units", ("the first", "unit 1")),
    "bias_without_conv": Bad(
        lambda s: residual_chain(x(), [unit(s, 4, 4, weight=None, bias=torch.zeros(4))]), ValueError, "bias", ("None",)
    ),
    "second_unit_channels": Bad(
        block(second={"weight": w(4, 5, 3, 3)}), ValueError, "weight", ("6 input channels", "(4, 5, 3, 3)", "unit 1")
    ),
    "second_unit_statistics": Bad(
        block(second={"running_mean": torch.zeros(6), "running_var": torch.ones(6)}),
        ValueError,
        "running_mean",
        ("(4,)", "(6,)", "unit 1"),
    ),
    "second_unit_kernel": Bad(
        block(first={"stride": 3}, second={"weight": w(4, 6, 5, 5), "padding": 0}),
        ValueError,
        "weight",
        ("(5, 5)", "(2, 2)", "unit 1"),
    ),
    "second_unit_eps": Bad(block(second={"eps": 0.0}), ValueError, "eps", ("positive", "0.0")),
    "second_unit_device": Bad(
        block(second={"weight": w(4, 6, 3, 3).to("meta")}), ValueError, "weight", ("cpu", "meta", "unit 1")
    ),
    "shortcut_unknown": Bad(block(shortcut="foo"), ValueError, "shortcut", ("identity", "pad", "'foo'")),
    "shortcut_number": Bad(block(shortcut=1), TypeError, "shortcut", ("str", "Unit", "1")),
    "shortcut_word_projection": Bad(block(shortcut="projection"), ValueError, "shortcut", ("Unit", "'projection'")),
    "shortcut_word_tensor": Bad(block(shortcut="tensor"), ValueError, "shortcut", ("residual", "'tensor'")),
    "identity_channels": Bad(
        block(units=[Unit(w(6, 4, 1, 1), training=True)]), ValueError, "shortcut", ("(2, 6, 5, 5)", "(2, 4, 5, 5)")
    ),
    "identity_size": Bad(block(first={"stride": 2}), ValueError, "shortcut", ("(2, 4, 3, 3)", "(2, 4, 5, 5)")),
    "pad_fewer_channels": Bad(
        block(second={"weight": w(3, 6, 3, 3), "running_mean": None, "running_var": None}, shortcut="pad"),
        ValueError,
        "shortcut",
        ("at most 3 channels", "4"),
    ),
    "pad_stride": Bad(
        block(shortcut="pad", shortcut_stride=2), ValueError, "shortcut", ("(2, 4, 5, 5)", "(2, 4, 3, 3)")
    ),
    "pad_stride_zero": Bad(block(shortcut="pad", shortcut_stride=0), ValueError, "shortcut_stride", (">= 1", "0")),
    "spec_pad_stride": Bad(
        lambda s: ShortcutSpec("pad", stride=(0, 1), channels=4), ValueError, "shortcut_stride", (">= 1", "(0, 1)")
    ),
    "pad_stride_float": Bad(block(shortcut="pad", shortcut_stride=1.5), TypeError, "shortcut_stride", ("int", "1.5")),
    "projection_activated": Bad(projected({"act": "relu"}), ValueError, "shortcut", ("without activation", "relu")),
    "projection_without_conv": Bad(
        projected({"weight": None}), ValueError, "shortcut", ("conv + BatchNorm", "without a conv")
    ),
    "projection_channels_in": Bad(
        projected({"weight": w(6, 5, 1, 1)}), ValueError, "weight", ("4 input channels", "(6, 5, 1, 1)", "shortcut")
    ),
    "projection_channels_out": Bad(
        projected({"weight": w(5, 4, 1, 1)}), ValueError, "shortcut", ("(2, 6, 5, 5)", "(2, 5, 5, 5)")
    ),
    "projection_size": Bad(projected({"stride": 2}), ValueError, "shortcut", ("(2, 6, 5, 5)", "(2, 6, 3, 3)")),
    "projection_one_statistic": Bad(
        projected({"running_mean": torch.zeros(6)}), ValueError, "running_var", ("running_mean", "None")
    ),
    "projection_eps": Bad(projected({"eps": -1.0}), ValueError, "eps", ("positive", "-1.0")),
    "average_pool_without_projection": Bad(
        block(shortcut_pool=PoolSpec.make(2)), ValueError, "shortcut_pool", ("projection", "'identity'")
    ),
    "average_pool_number": Bad(projected(shortcut_pool=2), TypeError, "shortcut_pool", ("PoolSpec", "2")),
    "average_pool_too_big": Bad(
        projected(shortcut_pool=PoolSpec.make(6)), ValueError, "shortcut_pool", ("(6, 6)", "(5, 5)")
    ),
    "residual_with_shortcut": Bad(block(residual=x()), ValueError, "residual", ("shortcut=None", "'identity'")),
    "residual_of_a_block": Bad(
        block(shortcut=None, residual=x(2, 6, 5, 5)), ValueError, "residual", ("(2, 4, 5, 5)", "(2, 6, 5, 5)")
    ),
    # specs made by hand
    "spec_no_units": Bad(lambda s: ChainSpec((), ShortcutSpec()), ValueError, "units", ("at least one",)),
    "spec_act": Bad(lambda s: Act("swish"), ValueError, "act", ("silu", "'swish'")),
    "spec_eps": Bad(lambda s: UnitSpec(None, Act(), eps=0.0), ValueError, "eps", ("positive", "0.0")),
    "spec_recompute": Bad(
        lambda s: ChainSpec((UnitSpec(None, Act()),), ShortcutSpec(), recompute=True),
        ValueError,
        "recompute",
        ("first unit", "no conv"),
    ),
    "spec_pad_channels": Bad(lambda s: ShortcutSpec("pad"), ValueError, "shortcut", ("channels", "0")),
    "spec_weight": Bad(lambda s: ConvSpec.make((3, 3)), ValueError, "weight", ("4 dimensions", "(3, 3)")),
}


def test_what_is_changed_is_what_is_bad() -> None:
    """The calls from which the bad ones differ in one thing are good."""
    s = statistics()
    assert conv()(s).shape == (2, 6, 3, 3)
    assert norm()(s).shape == (2, 4, 5, 5)
    assert block()(s).shape == (2, 4, 5, 5)
    assert projected()(s).shape == (2, 6, 5, 5)


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    """ValueError or TypeError, beginning with the argument's name, saying what came and what was expected; running
    statistics keep their bits."""
    bad = BAD[name]
    for good in (conv(), norm(), block(), projected()):
        good(statistics())  # what was accepted before (1 for 1.0, say) makes nothing else acceptable
    s = statistics()
    before = {n: v.clone() for n, v in s.items()}
    with pytest.raises((ValueError, TypeError)) as raised:
        bad.call(s)
    text = str(raised.value)
    assert type(raised.value) is bad.error, text
    assert text.startswith(bad.argument), text
    for word in bad.says:
        assert word in text, f"{word!r} is not in: {text}"
    for n, v in s.items():
        assert torch.equal(v, before[n]), f"{n} has changed"


def test_training_is_not_needed_to_find_it() -> None:
    """The same errors in eval, where nothing is updated: shapes are looked at before any kernel starts."""
    s = statistics()
    for call in (
        conv(training=False, weight=w(6, 3, 3, 3)),
        norm(training=False, bn_weight=torch.ones(5)),
        block({"training": False}, {"training": False, "weight": w(4, 5, 3, 3)}),
    ):
        with torch.no_grad(), pytest.raises(ValueError, match="expected"):
            call(s)


def test_under_torch_compile() -> None:
    """A compiled call refuses as the eager one does."""
    compiled = torch.compile(bn_act, backend="eager")
    with pytest.raises((ValueError, RuntimeError), match="bn_weight: expected shape"):
        compiled(x(), torch.ones(5), torch.zeros(5), training=True)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["", "CPU", "onednn"])
def test_unknown_backend(name: str) -> None:
    """use_backend names the ones there are."""
    with (
        pytest.raises(ValueError, match="backend: expected one of cuda, cudnn, triton, cpu, aten, got"),
        use_backend(name),
    ):
        pass


def test_backend_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """An explicit request that can't be met says which primitive, which backend and why, and changes no statistic."""
    from fused_resnet import planner

    def refuse(primitive: type[Any], case: Case) -> str | None:
        return "not on a Sunday" if primitive is BnAct else None

    planner.preference._pick.cache_clear()
    monkeypatch.setattr(loaded("aten"), "refuse", refuse)
    s = statistics()
    before = {n: v.clone() for n, v in s.items()}
    try:
        with use_backend("aten"), pytest.raises(BackendUnavailable, match="bn_act .*aten: not on a Sunday"):
            block()(s)
    finally:
        planner.preference._pick.cache_clear()
    assert all(torch.equal(v, before[n]) for n, v in s.items())
