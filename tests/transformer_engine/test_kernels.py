"""Each kernel of the stand-in against the plain formula that it stands for, by autograd where it has a backward pass."""

from __future__ import annotations

import itertools
from inspect import signature
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.transformer_engine.stand_in import (
    fused_attention,
    multi_tensor,
    norms,
    pad_kernel,
    permutation_kernels,
    products,
    quantized,
    rope_kernels,
    router_kernels,
)
from tests.transformer_engine.stand_in.enums import DType, NVTE_Mask_Type, NVTE_QKV_Format, NVTE_QKV_Layout
from tests.transformer_engine.stand_in.extension import extension_module

LENGTHS = (7, 1, 12)  # of packed sequences
BOUNDS = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("release", ["2.12.0", "2.20.2"])
def test_what_is_missing_raises_by_name(release: str) -> None:
    module = extension_module({"dgeglu"}, release)
    assert ("o_format" in signature(module.fused_attn_fwd).parameters) == (release == "2.20.2")
    assert "dgeglu" in module.__all__
    with pytest.raises(NotImplementedError, match="has no dgeglu"):
        module.dgeglu(1, out=2)
    with pytest.raises(NotImplementedError, match="user buffers"):
        module.CommOverlap()


@pytest.mark.parametrize("zero_centered", [False, True])
def test_rms_norm(zero_centered: bool) -> None:
    x, gamma, dz = torch.randn(5, 3, 16, requires_grad=True), torch.randn(16, requires_grad=True), torch.randn(5, 3, 16)
    expected = F.rms_norm(x, (16,), gamma + zero_centered, 1e-6)
    expected.backward(dz)
    output, _, rsigma = norms.rmsnorm_fwd(x, gamma, 1e-6, None, None, DType.kFloat32, 0, zero_centered)
    close(output, expected)
    dx, dgamma = norms.rmsnorm_bwd(dz, x.detach(), rsigma, gamma.detach(), 0, zero_centered)
    close(dx, x.grad)
    close(dgamma, gamma.grad)


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """One sequence, [s, h, d]."""
    heads = [tensor.transpose(0, 1) for tensor in (q, k, v)]
    return F.scaled_dot_product_attention(*heads, is_causal=causal, enable_gqa=True).transpose(0, 1)


@pytest.mark.parametrize("form", ["SBHD", "BSHD", "THD"])
@pytest.mark.parametrize("causal", [False, True])
def test_fused_attention(form: str, causal: bool) -> None:
    batch, length, size = 3, 10, 8
    shape = {"SBHD": (length, batch), "BSHD": (batch, length), "THD": (sum(LENGTHS),)}[form]
    bounds = BOUNDS if form == "THD" else torch.arange(batch + 1, dtype=torch.int32) * length
    q, k, v = (torch.randn(*shape, heads, size, requires_grad=True) for heads in (4, 2, 2))

    def sequence(tensor: Tensor, index: int) -> Tensor:
        if form == "THD":
            return tensor[bounds[index] : bounds[index + 1]]
        return tensor[:, index] if form == "SBHD" else tensor[index]

    layout = NVTE_QKV_Layout[f"NVTE_{form}_{form}_{form}"]
    mask = ["PADDING"] * (form == "THD") + ["CAUSAL"] * causal or ["NO"]
    mask_type, longest = NVTE_Mask_Type[f"NVTE_{'_'.join(mask)}_MASK"], int(bounds.diff().max())
    output, statistics, _ = fused_attention.fused_attn_fwd(
        longest, longest, True, size**-0.5, 0.0, True, layout, 0, mask_type, 0, (-1, -1), True, bounds, bounds,
        q.detach(), k.detach(), v.detach(), torch.float32, *[None] * 9, 0, False, False,
    )  # fmt: skip
    gradient = torch.randn_like(output)
    dq, dk, dv, *_ = fused_attention.fused_attn_bwd(
        longest, longest, size**-0.5, 0.0, True, layout, 0, mask_type, 0, (-1, -1), True, False, bounds, bounds,
        q.detach(), k.detach(), v.detach(), output, gradient, torch.float32, None, [statistics], None, None, None, None,
        None, False,
    )  # fmt: skip
    for index in range(len(bounds) - 1):
        expected = _attend(*(sequence(tensor, index) for tensor in (q, k, v)), causal)
        close(sequence(output, index), expected)
        expected.backward(sequence(gradient, index), retain_graph=True)
    for actual, expected in ((dq, q.grad), (dk, k.grad), (dv, v.grad)):
        close(actual, expected)


def test_attention_refuses_a_sequence_longer_than_it_is_told() -> None:
    q = torch.randn(sum(LENGTHS), 2, 8)
    with pytest.raises(RuntimeError, match="longer than max_seqlen"):
        fused_attention._check_operands(11, BOUNDS, q, q, q, NVTE_QKV_Layout.NVTE_THD_THD_THD)


@pytest.mark.parametrize("form", ["SBHD", "BSHD", "THD"])
def test_rope(form: str) -> None:
    """As complex numbers: the first half real, the second imaginary; what lies beyond the angles passes."""
    length, batch, size, turned = 12, 3, 10, 8
    shape = {"SBHD": (length, batch), "BSHD": (batch, length), "THD": (sum(LENGTHS),)}[form]
    x = torch.randn(*shape, 4, size, requires_grad=True)
    angles = torch.randn(length, turned // 2)
    position = torch.arange(length) if form != "THD" else torch.cat([torch.arange(n) for n in LENGTHS])
    position = (position[:, None] if form == "SBHD" else position).expand(shape)
    of_rows = angles[position][..., None, :]
    numbers = torch.complex(x[..., : turned // 2], x[..., turned // 2 : turned])
    numbers = numbers * torch.polar(torch.ones_like(of_rows), of_rows)
    expected = torch.cat([numbers.real, numbers.imag, x[..., turned:]], -1)
    gradient = torch.randn_like(x)
    expected.backward(gradient)
    options = (
        torch.cat([angles, angles], -1)[:, None, None],
        None,
        NVTE_QKV_Format[f"NVTE_{form}"],
        False,
        BOUNDS,
        1,
        0,
    )
    close(rope_kernels.fused_rope_forward(x.detach(), *options), expected)
    close(rope_kernels.fused_rope_backward(gradient, *options), x.grad)


@pytest.mark.parametrize("pre_softmax", [False, True])
def test_router(pre_softmax: bool) -> None:
    logits = torch.randn(20, 8, requires_grad=True)
    chosen = logits.topk(2, -1).indices
    scores = logits.softmax(-1).gather(1, chosen) if pre_softmax else logits.gather(1, chosen).softmax(-1)
    expected = torch.zeros_like(logits).scatter(1, chosen, 1.5 * scores)
    gradient = torch.randn_like(expected)
    expected.backward(gradient)
    probs, routing, kept = router_kernels.fused_topk_with_score_function_fwd(
        logits.detach(), 2, pre_softmax, None, None, 1.5, "softmax", None
    )
    close(probs, expected)
    assert torch.equal(routing, expected > 0)
    close(
        router_kernels.fused_topk_with_score_function_bwd(
            20, 8, routing, kept, gradient, 2, pre_softmax, 1.5, "softmax"
        ),
        logits.grad,
    )


def _product(a: Tensor, transpose_a: bool, b: Tensor, transpose_b: bool, **more: Any) -> list[Any]:
    options: dict[str, Any] = dict(
        D=None, quantizer=None, output_dtype=None, bias=None, bias_type=None, gelu=False, gelu_in=None, grad=False,
        workspace=None, workspace_size=0, accumulate=False, use_split_accumulator=True,
    ) | more  # fmt: skip
    return products.generic_gemm(a, transpose_a, b, transpose_b, **options)


def test_products_of_a_linear_layer() -> None:
    """Forward (TN), gradient of the input (NN) and of the weight (NT), the last with accumulation."""
    x, weight, dy = torch.randn(5, 4, 16), torch.randn(8, 16), torch.randn(5, 4, 8)
    bias, main_grad = torch.randn(8), torch.randn(8, 16)
    close(_product(weight, True, x, False, bias=bias)[0], F.linear(x, weight, bias))
    close(_product(weight, False, dy, False)[0], dy @ weight)
    before = main_grad.clone()
    _, bias_gradient, *_ = _product(x, False, dy, True, D=main_grad, accumulate=True, bias=bias, grad=True)
    close(main_grad, before + dy.flatten(0, 1).T @ x.flatten(0, 1))
    close(bias_gradient, dy.sum((0, 1)))


def test_a_product_refuses_what_cublas_refuses() -> None:
    x, weight = torch.randn(5, 16), torch.randn(8, 16)
    with pytest.raises(RuntimeError, match="must be contiguous"):
        _product(weight.T.contiguous().T, True, x, False)
    with pytest.raises(RuntimeError, match="operands of"):
        _product(weight.bfloat16(), True, x, False)
    with pytest.raises(RuntimeError, match="output has"):
        _product(weight, True, x, False, D=torch.empty(8, 5))


def _grouped(
    a: list[Tensor], transa: bool, b: list[Tensor], transb: bool, out: list[Tensor], single: bool, accumulate: bool
) -> None:
    nothing = [torch.empty(0)] * len(a)
    sizes = [len(tensor) for tensor in b]
    products.te_general_grouped_gemm(
        a,
        transa,
        b,
        transb,
        out,
        DType.kFloat32,
        sizes,
        nothing,
        None,
        single,
        nothing,
        False,
        [],
        0,
        accumulate,
        True,
        0,
    )


def test_grouped_products() -> None:
    """One group has no tokens."""
    sizes = [3, 0, 4]
    x, weights = torch.randn(7, 16), [torch.randn(8, 16) for _ in sizes]
    out, gradients = torch.empty(7, 8), [torch.full((8, 16), 1.0) for _ in sizes]
    _grouped(weights, True, list(x.split(sizes)), False, [out], True, False)
    dy = torch.randn(7, 8)
    _grouped(list(x.split(sizes)), False, list(dy.split(sizes)), True, gradients, False, True)
    for piece, result, slope, weight, gradient in zip(
        x.split(sizes), out.split(sizes), dy.split(sizes), weights, gradients, strict=True
    ):
        close(result, piece @ weight.T)
        close(gradient, 1 + slope.T @ piece)


def test_padding_of_rows() -> None:
    x, rows, padded = torch.randn(7, 4), [3, 0, 4], [16, 0, 16]
    out, back = torch.full((32, 4), 9.0), torch.empty(7, 4)
    products.fused_multi_row_padding(x, out, rows, padded)
    assert torch.equal(out[:3], x[:3]) and torch.equal(out[16:20], x[3:]) and not out[3:16].any() and not out[20:].any()
    products.fused_multi_row_unpadding(out, back, padded, rows)
    assert torch.equal(back, x)


def test_tokens_sorted_by_expert() -> None:
    """Rows by expert, then by token; back, the sum of a token's rows, by autograd of that."""
    tokens, experts, hidden = 9, 4, 6
    routing = torch.rand(tokens, experts) < 0.5
    routing[2] = False
    x, probs = torch.randn(tokens, hidden), torch.rand(tokens, experts) * routing
    row_id_map = permutation_kernels.make_row_id_map(routing, tokens, experts)
    expert_of, token_of = routing.T.nonzero(as_tuple=True)
    count = len(token_of)
    rows, _, row_probs = permutation_kernels.permute_with_mask_map(
        x, row_id_map, probs, None, None, tokens, experts, count, hidden, 0
    )
    assert torch.equal(rows, x[token_of]) and torch.equal(row_probs, probs[token_of, expert_of])

    outputs, weights = torch.randn(count, hidden, requires_grad=True), probs.clone().requires_grad_()
    expected = torch.zeros(tokens, hidden).index_add(0, token_of, outputs * weights[token_of, expert_of][:, None])
    gradient = torch.randn(tokens, hidden)
    expected.backward(gradient)
    summed, back = permutation_kernels.unpermute_with_mask_map(
        outputs.detach(), row_id_map, probs, row_probs, None, tokens, experts, hidden
    )
    close(summed, expected)
    assert torch.equal(back, probs)
    of_rows, of_probs = permutation_kernels.unpermute_with_mask_map_bwd_with_merging_probs(
        gradient, row_id_map, outputs.detach(), probs, None, tokens, experts, count, hidden
    )
    close(of_rows, outputs.grad)
    close(of_probs, weights.grad)


def test_swapped_dimensions() -> None:
    x, out = torch.randn(2, 3, 4), torch.empty(3, 2, 4)
    assert torch.equal(quantized.swap_first_dims(x, out=out), x.transpose(0, 1)) and torch.equal(out, x.transpose(0, 1))


def test_sorted_chunks() -> None:
    x, sizes, order = torch.randn(9, 3), torch.tensor([2, 0, 4, 3]), torch.tensor([2, 3, 1, 0])
    row_id_map = permutation_kernels.make_chunk_sort_map(sizes, order, 9, 4)
    chunks = x.split(sizes.tolist())
    there, _ = permutation_kernels.sort_chunks_by_map(x, row_id_map, None, 9, 3, True)
    assert torch.equal(there, torch.cat([chunks[i] for i in order]))
    back, probs = permutation_kernels.sort_chunks_by_map(there, row_id_map, there[:, 0], 9, 3, False)
    assert torch.equal(back, x) and torch.equal(probs, x[:, 0])


def test_norms_and_scales_of_many_tensors() -> None:
    tensors, flag = [torch.randn(4, 3), torch.randn(5)], torch.zeros(1)
    total, each = multi_tensor.multi_tensor_l2norm(1, flag, [tensors], True)
    close(total, torch.cat([tensor.flatten() for tensor in tensors]).norm().view(1))
    close(each[1], tensors[1].norm())
    close(multi_tensor.multi_tensor_unscale_l2norm(1, flag, [tensors], torch.tensor(0.5))[0], 0.5 * total)
    halves = [torch.empty_like(tensor) for tensor in tensors]
    multi_tensor.multi_tensor_scale(1, flag, [tensors, halves], 0.5)
    assert torch.equal(halves[1], 0.5 * tensors[1]) and not flag
    multi_tensor.multi_tensor_scale(1, flag, [[torch.tensor([float("inf")])], [torch.empty(1)]], 0.5)
    assert flag


@pytest.mark.parametrize("mode", [0, 1])
def test_adam(mode: int) -> None:
    """torch's own, with weight decay added to the gradient (0) or apart (1)."""
    weight = torch.randn(6, 5)
    parameter, m, v = weight.clone(), torch.zeros(6, 5), torch.zeros(6, 5)
    mirror = torch.nn.Parameter(weight.clone())
    optimizer = [torch.optim.Adam, torch.optim.AdamW][mode](
        [mirror], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
    )
    for step in (1, 2, 3):
        gradient = torch.randn(6, 5)
        mirror.grad = gradient.clone()
        optimizer.step()
        lists = [[gradient], [parameter], [m], [v]]
        multi_tensor.multi_tensor_adam(1, torch.zeros(1), lists, 0.1, 0.9, 0.95, 1e-8, step, mode, 1, 0.1)
    torch.testing.assert_close(parameter, mirror.detach(), rtol=1e-5, atol=1e-6)


def test_adam_with_a_split_main_weight() -> None:
    """bf16 and 16 more bits are the fp32 weight, bit for bit, and train as it does."""
    main = torch.cat([torch.randn(1000), torch.tensor([0.0, 1.0, -1.0, 1e-38, 3e38])])
    upper, lower = multi_tensor.split(main)
    assert torch.equal(multi_tensor.join(upper, lower), main)
    assert ((upper.float() - main).abs() <= (main.bfloat16().float() - main).abs()).all()  # to nearest
    gradient, moments = torch.randn_like(main), [torch.zeros_like(main) for _ in range(4)]
    multi_tensor.multi_tensor_adam_param_remainder(
        1, torch.zeros(1), [[gradient], [upper], moments[:1], moments[1:2], [lower]], 0.1, 0.9, 0.95, 1e-8, 1, 1, 1, 0.1
    )
    multi_tensor.multi_tensor_adam(
        1, torch.zeros(1), [[gradient], [main], moments[2:3], moments[3:]], 0.1, 0.9, 0.95, 1e-8, 1, 1, 1, 0.1
    )
    assert torch.equal(multi_tensor.join(upper, lower), main)


def test_scales_are_padded_with_zeros() -> None:
    scales = torch.randint(1, 255, (130, 6), dtype=torch.uint8)
    padded = pad_kernel.pad_columnwise_scale_inv(scales)
    assert padded.shape == (256, 8) and torch.equal(padded[:130, :6], scales) and padded.sum() == scales.sum()
    assert torch.equal(pad_kernel.pad_columnwise_scale_inv(padded), padded)
