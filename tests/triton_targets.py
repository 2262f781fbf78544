"""Compile Triton's kernels for GPUs that are not here, and print what came out as JSON. test_triton.py runs it.

python tests/triton_targets.py TARGETS STRATEGIES [measured] [strided] [others] [contract]
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from collage.backends.triton import BLOCK, GRADIENTS, fold, slots, walk
from collage.backends.triton.arithmetic import bf16, same
from collage.backends.triton.rules import RULES
from collage.backends.triton.walk import MASKED, STRIDED
from collage.strategies import Strategy

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compiled(function, pointers: dict[str, str], constants: dict, target: GPUTarget):
    source = ASTSource(
        fn=function,
        signature={name: pointers.get(name, "constexpr") for name in function.arg_names},
        constexprs={(function.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(k,): [["tt.divisibility", 16]] for k in range(len(pointers))},
    )
    options = {"num_warps": BLOCK // target.warp_size // 8, "enable_fp_fusion": "contract" in sys.argv}
    return triton.compile(source, target=target, options=options)


def step(s: Strategy, target: GPUTarget, measured: bool, strided: bool):
    pointers = {
        "table": "*i64", "blocks": "*i32", "shapes": "*i64", "constants": "*fp32", "streams": "*i64", "sums": "*fp64",
    }  # fmt: skip
    constants = {
        "RULE": RULES["adamw"], **formats(s), "ROUND": bf16 if s.arithmetic == "bfloat16" else same, "MAXIMIZE": False,
        "RANDOM": s.stochastic, "BY_ROWS": False, "REST": (STRIDED if strided else MASKED).value, "MEASURED": measured,
    }  # fmt: skip
    return compiled(walk.step, pointers, constants, target)


def formats(s: Strategy) -> dict:
    """Where everything lies."""
    names = s.param, s.momentum, s.variance
    gradient = GRADIENTS[s.dtype if s.dtype == torch.float32 else torch.bfloat16]
    planes = sum(len(fmt.dtypes) for fmt in s.formats)
    return {"SLOTS": slots(names), "GRADIENT": gradient, "TENSORS": 1 + planes}


def fold_on_device(s: Strategy, target: GPUTarget):
    pointers = {
        "counters": "*i64", "keys": "*i64", "seed": "*i64", "lr": "*fp64", "hyper": "*fp64", "constants": "*fp32",
        "streams": "*i64",
    }  # fmt: skip
    constants = {
        "RULE": RULES["adamw"], "FOLD": fold.FOLDS["adamw"], "NARROW": s.arithmetic == "bfloat16",
        "RANDOM": s.stochastic,
    }  # fmt: skip
    return compiled(fold.fold, pointers, constants, target)


def others(s: Strategy, target: GPUTarget) -> dict:
    """The kernels beside the step."""
    whole = formats(s)
    tables = {"table": "*i64", "blocks": "*i32"}
    theta = {"SLOT": whole["SLOTS"][0], "TENSORS": whole["TENSORS"], "REST": STRIDED.value}
    return {
        "fold": fold_on_device(s, target),
        "broken": compiled(walk.broken, tables | {"shapes": "*i64", "counts": "*i32"}, theta, target),
        "stream": compiled(walk.stream, tables | {"zero": "*i32"}, whole, target),
        "add_up": compiled(walk.add_up, {"sums": "*fp64", "first": "*i64", "totals": "*fp64"}, {}, target),
    }


def facts(kernel) -> dict:
    """Registers and spills; how wide memory is accessed; what LLVM and PTX say of contraction and flushing."""
    asm = kernel.asm
    code = asm.get("ptx") or asm["amdgcn"]
    return {
        **(nvidia(asm["cubin"]) if "cubin" in asm else amd(code)),
        "loads": len(re.findall(r"ld\.global\S*\.v4\.b32|global_load_dwordx4", code)),
        "stores": len(re.findall(r"st\.global\S*\.v4\.b32|global_store_dwordx4", code)),
        "contracted": len(re.findall(r"\b(?:contract|reassoc|fast|afn|arcp)\b|llvm\.fmuladd|llvm\.fma\b", asm["llir"]))
        + len(re.findall(r"\bfma\.", code)),
        "flushed": len(re.findall(r"\.ftz\b|denormal-fp-math[^=]*=\"preserve-sign", code + asm["llir"])),
        "approximate": len(re.findall(r"\b(?:div|sqrt|rcp)\.(?:approx|full)|!fpmath", code + asm["llir"])),
    }


def nvidia(cubin: bytes) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
        sass = subprocess.run([CUOBJDUMP, "-sass", file.name], check=True, capture_output=True, text=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return {"registers": found["REG"], "local": found["LOCAL"] + found["STACK"], "spills": spills}


def amd(code: str) -> dict:
    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", code)[1])

    return {
        "registers": number("vgpr_count"),
        "local": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
    }


def main() -> None:
    targets, strategies, *flags = sys.argv[1:]
    result = {}
    for name in strategies.split(","):
        s = Strategy.parse(name)
        for target in targets.split(","):
            kernel = step(s, TARGETS[target], "measured" in flags, "strided" in flags)
            result[f"{name} {target}"] = facts(kernel)
            if "others" in flags:
                for kind, other in others(s, TARGETS[target]).items():
                    result[f"{kind} {name} {target}"] = facts(other)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
