"""Compile the experiments for sm_90 without a GPU and print what ptxas says."""
import re, subprocess, sys, tempfile, os, time
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
import hopper_kernels as hk

TYPES = ["*bf16", "*i32", "*i32", "*i32", "*i32", "*i32", "*bf16", "*fp32", "*fp32", "fp32", "i32", "i32"]
ptxas = os.environ.get("PTXAS", os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/ptxas"))

def compile_hopper(v, dim):
    fn = hk.hopper_kernel
    names = fn.arg_names
    sig = {n: (TYPES[i] if i < len(TYPES) else "constexpr") for i, n in enumerate(names)}
    attrs = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(TYPES) if t.startswith("*")}
    src = GluonASTSource(fn, sig, constexprs=v.constants(dim, 4 if dim == 128 else 8), attrs=attrs)
    return triton.compile(src, target=GPUTarget("cuda", 90, 32), options=v.options())

def report(k, name):
    ptx = k.asm["ptx"]
    open(f"/tmp/hopper_{name}.ptx", "w").write(ptx)
    out = subprocess.run([ptxas, "-v", "--gpu-name=sm_90a", f"/tmp/hopper_{name}.ptx", "-o", f"/tmp/hopper_{name}.cubin"], capture_output=True, text=True)
    text = out.stderr
    regs = re.findall(r"Used (\d+) registers", text); spill = re.findall(r"(\d+) bytes spill stores", text)
    notes = sorted(set(re.findall(r"(C75\d\d|Potential[^\n]*)", text)))
    from loops import loops
    print(name, "regs", regs, "spill", spill, "shared", k.metadata.shared, notes, "" if out.returncode == 0 else text[-500:], flush=True)
    print("\n".join(loops(f"/tmp/hopper_{name}.cubin")), flush=True)

if __name__ == "__main__":
    from variants import HOPPER, Hopper
    dims = [int(d) for d in sys.argv[1].split(",")] if len(sys.argv) > 1 else [128, 64]
    extra = eval(sys.argv[2]) if len(sys.argv) > 2 else None
    for dim in dims:
        for v in extra or HOPPER[dim]:
            try:
                report(compile_hopper(v, dim), f"{dim} {v.name}".replace(" ", "_").replace("/", "-"))
            except Exception as e:
                c = e
                while c.__cause__ is not None: c = c.__cause__
                print(dim, v.name, "FAILED", type(c).__name__, str(c)[-600:], flush=True)
