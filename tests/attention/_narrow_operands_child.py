"""The child process of `test_narrow_operands`: two products whose second operands take turns in shared memory.

    python -m tests.attention._narrow_operands_child DIM ... [run]

Answers one JSON line for each DIM, the PTX and the machine code for compute capability 9.0; with `run` a second one,
the error on the GPU here.
"""

from __future__ import annotations

import base64
import json
import sys
from typing import Any

import torch
import triton
import triton.language as tl

ROWS, KEYS, K_DIM, STEPS = 64, 128, 64, 4


@triton.jit
def two_products_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, steps,
    M: tl.constexpr, N: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
):  # fmt: skip
    """out = Σ over steps of round(q·kᵀ)·v, with k and v in FP8: each is converted, and stored for the tensor cores.

    V is converted after the first product, so that Triton gives it the shared memory that K had.
    """
    row, key, dim_k, dim_v = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K_DIM), tl.arange(0, V_DIM)
    q = tl.load(q_ptr + row[:, None] * K_DIM + dim_k[None, :])
    out = tl.zeros([M, V_DIM], tl.float32)
    for _ in range(steps):
        k = tl.load(k_ptr + key[:, None] * K_DIM + dim_k[None, :]).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        scores = tl.dot(q, tl.trans(k))
        scores = (scores / tl.max(tl.abs(scores), 1)[:, None]).to(tl.float16)
        v = tl.load(v_ptr + key[:, None] * V_DIM + dim_v[None, :]).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        out = tl.dot(scores, v, out)
        key += N
    tl.store(out_ptr + row[:, None] * V_DIM + dim_v[None, :], out)


def compiled(dim: int) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {"q_ptr": "*fp16", "k_ptr": "*u8", "v_ptr": "*u8", "out_ptr": "*fp32", "steps": "i32"}
    source = ASTSource(
        two_products_kernel, pointers, {"M": ROWS, "N": KEYS, "K_DIM": K_DIM, "V_DIM": dim},
        {(i,): [["tt.divisibility", 16]] for i in range(4)},
    )  # fmt: skip
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def error_on_the_gpu(dim: int) -> float:
    """The relative error of the kernel's result; a fault ends the process."""
    random = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(ROWS, K_DIM, device="cuda", generator=random).half()
    k = torch.randn(STEPS * KEYS, K_DIM, device="cuda", generator=random).to(torch.float8_e4m3fn)
    v = torch.randn(STEPS * KEYS, dim, device="cuda", generator=random).to(torch.float8_e4m3fn)
    out = torch.full((ROWS, dim), torch.nan, device="cuda")
    two_products_kernel[(1,)](
        q, k.view(torch.uint8), v.view(torch.uint8), out, STEPS, M=ROWS, N=KEYS, K_DIM=K_DIM, V_DIM=dim, num_warps=4
    )
    torch.cuda.synchronize()
    expected = torch.zeros(ROWS, dim, device="cuda")
    for keys, values in zip(k.float().split(KEYS), v.float().split(KEYS), strict=True):
        scores = q.float() @ keys.T
        expected += (scores / scores.abs().amax(1, keepdim=True)) @ values
    return ((out - expected).norm() / expected.norm()).item()


if __name__ == "__main__":
    for dim in (int(word) for word in sys.argv[1:] if word != "run"):
        kernel = compiled(dim)
        answer = {"ptx": kernel.asm["ptx"], "cubin": base64.b64encode(kernel.asm["cubin"]).decode()}
        print(json.dumps(answer), flush=True)
        if "run" in sys.argv:
            print(json.dumps({"error": error_on_the_gpu(dim)}), flush=True)
