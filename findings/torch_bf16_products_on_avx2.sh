#!/usr/bin/env bash
# torch 2.13.0, CPU: products of bf16 matrices on processors without AVX512.
#
# Guess: as slow as in fp32 plus the conversions, perhaps twice the time, because torch falls back to MKL in fp32.
# Seen: no library is used. A product in scalar loops takes 5 to 10 times as long as in fp32 if the second matrix is
# transposed in memory (x @ W.T, a linear layer), and 50 to 100 times if it is not (gradient @ W, the gradient of its
# input); to convert both matrices to fp32, multiply, and round takes about as long as the product in fp32. The gradient
# of scaled_dot_product_attention takes several times as long too, its output does not.
# So a training step in bf16 on a laptop can take half a minute instead of a second, without a warning.
# ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA make a processor with AVX512 behave as one without.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0 numpy
ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 "$work/venv/bin/python" - <<'PYTHON'
import statistics
import time

import torch

print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())
x, weight = torch.randn(512, 256).bfloat16(), torch.randn(768, 256).bfloat16()
gradient = torch.randn(512, 768).bfloat16()


def milliseconds(run):
    run()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return 1000 * statistics.median(times)


ratios = {}
for name, a, b in (("x @ W.T", x, weight.T), ("gradient @ W", gradient, weight)):
    a32, b32 = a.float(), (weight.float().T if b is not weight else weight.float())
    fp32 = milliseconds(lambda: a32 @ b32)
    bf16 = milliseconds(lambda: a @ b)
    converted = milliseconds(lambda: (a.float() @ b.float()).bfloat16())
    ratios[name] = bf16 / fp32, converted / fp32
    print(f"{name}: fp32 {fp32:.2f} ms, bf16 {bf16:.2f} ms, converted to fp32 and back {converted:.2f} ms")
assert not torch.ops.mkldnn._is_mkldnn_bf16_supported()
assert ratios["x @ W.T"][0] > 3 and ratios["gradient @ W"][0] > 20, ratios
assert all(converted < 3 for _, converted in ratios.values()), ratios
PYTHON
