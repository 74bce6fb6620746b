"""Innermost loops of a cubin: how many instructions, by kind."""
import os, re, subprocess, sys, collections
import triton
ND = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/nvdisasm")

def loops(cubin):
    text = subprocess.run([ND, "-c", cubin], capture_output=True, text=True).stdout
    labels, code, pending = {}, [], []
    for line in text.splitlines():
        m = re.match(r"^\s*(\.L_x_\d+):", line)
        if m: pending.append(m[1]); continue
        m = re.match(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", line)
        if m:
            for p in pending: labels[p] = len(code)
            pending = []
            code.append(m[2].strip())
    found = []
    for i, c in enumerate(code):
        m = re.search(r"BRA.*?`\((\.L_x_\d+)\)", c)
        if m and labels.get(m[1], 10**9) <= i: found.append((labels[m[1]], i))
    inner = [l for l in found if l[1]-l[0] > 60 and not any(o != l and l[0] <= o[0] and o[1] <= l[1] and o[1]-o[0] > 60 for o in found)]
    out = []
    for a, b in sorted(inner):
        n = collections.Counter()
        for c in code[a:b+1]:
            c = re.sub(r"^@!?U?P\w+\s+", "", c)
            op = c.split()[0].split(".")
            n[op[0]] += 1
            if "UNPACK_B" in c: n["UNPACK"] += 1
            if "EX2" in c: n["EX2"] += 1
        keep = ["HGMMA", "EX2", "FMUL", "FFMA", "FADD", "FMNMX", "F2FP", "UNPACK", "STS", "LDG", "LDS", "STL", "LDL", "PRMT", "SHFL", "MOV", "BAR", "R2UR", "WARPSYNC"]
        if n["HGMMA"] or n["UNPACK"] or n["EX2"]:
            out.append(f"  {b-a+1} instructions: " + " ".join(f"{k} {n[k]}" for k in keep if n[k]))
    return out
if __name__ == "__main__":
    for f in sys.argv[1:]: print(f); print("\n".join(loops(f)))
