"""Compile Triton's kernels for GPUs that are not here, and print what came out as JSON. test_triton.py runs it.

python tests/triton_targets.py TARGETS CASES [measured] [strided] [scaled] [others] [contract]
CASES: strategies, as of AdamW, or RULE:STRATEGY, or RULE:(FORMAT FORMAT ...); comma-separated.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from collage import formats
from collage.backends.triton import FORMATS, _plan, _plan_of_all, _plan_of_gradients, _plan_of_one, rules, sums, walk
from collage.backends.triton import planes as of_planes
from collage.backends.triton.fold import fold
from collage.backends.triton.launching import unit_of, warps
from collage.backends.triton.memory import ADDRESSES, MASKED, STRIDED
from collage.backends.triton.tables import BLOCK
from collage.rules import RULES
from collage.strategies import Strategy

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
RELEASE = tuple(map(int, triton.__version__.split(".")[:2]))
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compiled(function, pointers: dict[str, str], constants: dict, warps: int = 0, *, target: GPUTarget):
    """warps: of a program; 0: as many as 8 elements a thread make."""
    source = ASTSource(
        fn=function,
        signature={name: pointers.get(name, "constexpr") for name in function.arg_names},
        constexprs={(function.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(k,): [["tt.divisibility", 16]] for k in range(len(pointers))},
    )
    options = {"num_warps": warps or BLOCK // target.warp_size // 8, "enable_fp_fusion": "contract" in sys.argv}
    return triton.compile(source, target=target, options=options)


class Case(NamedTuple):
    """A rule and the formats of its slots."""

    rule: str
    formats: tuple[str, ...]
    register: torch.dtype
    dtype: torch.dtype  # of the parameter

    @staticmethod
    def parse(text: str) -> "Case":
        rule, _, strategy = text.partition(":") if ":" in text else ("", "", text)
        rule = rule or "adamw"
        if strategy[0] == "(":
            return Case(rule, tuple(strategy[1:-1].split(" ")), torch.float32, torch.bfloat16)
        known = Strategy.parse(strategy)
        return Case(rule, known.formats(RULES[rule].roles), known.register, known.dtype)

    @property
    def gradient(self) -> torch.dtype:
        """dtype of the gradient."""
        return torch.float32 if self.dtype == torch.float32 else torch.bfloat16

    def plan(self, flags: Sequence[str]) -> walk.Plan:
        return _plan(
            RULES[self.rule], self.formats, self.register, self.gradient if RULES[self.rule].gradient else None,
            **self.shape("strided" in flags), maximize=False, scaled="scaled" in flags, skips="scaled" in flags,
            measured="measured" in flags,
        )  # fmt: skip

    def shape(self, strided: bool) -> dict:
        """Of the table."""
        columns = ADDRESSES.value + 1 + sum(len(FORMATS[name].words) for name in self.formats)
        by_rows = unit_of(self.formats) > 1
        return {"columns": columns, "rest": (STRIDED if strided else MASKED).value, "by_rows": by_rows}


TABLES = {"table": "*i64", "owners": "*i32", "shapes": "*i64"}


def step(case: Case, target: GPUTarget, flags: Sequence[str]):
    others = {"constants": "*fp32", "streams": "*i64", "scale": "*fp32", "skip": "*fp32", "sums": "*fp64"}
    number = warps(case.formats, not {"measured", "strided"} & set(flags), target.warp_size)
    return compiled(walk.step, TABLES | others, {"PLAN": case.plan(flags)}, number, target=target)


def others(case: Case, target: GPUTarget) -> dict:
    """The kernels beside the step."""
    narrow, rule = case.register == torch.bfloat16, RULES[case.rule]
    pointers = {
        "counters": "*i64", "keys": "*i64", "seed": "*i64", "lr": "*fp64", "hyper": "*fp64", "constants": "*fp32",
        "streams": "*i64",
    }  # fmt: skip
    folds = {
        "RULE": rules.RULES[case.rule], "SETTINGS": sum(setting.numbers for setting in rule.settings), "NARROW": narrow,
        "RANDOM": True,
    }  # fmt: skip
    shape = case._replace(formats=case.formats[:1]).shape(True)
    one = {"PLAN": _plan_of_one(case.formats[0], True, 0, 0, **shape)}
    all_of_them = {"PLAN": _plan_of_all(case.formats, torch.bfloat16, **case.shape(False) | {"by_rows": False})}
    known, streamed = FORMATS[case.formats[0]], warps(case.formats, True, target.warp_size)
    gradients = {"PLAN": _plan_of_gradients(case.gradient, **case._replace(formats=("bf16",)).shape(True))}
    counting = {"broken": (of_planes.broken, TABLES | {"counts": "*i32"}, one)}
    in_rows = {"maxima": (of_planes.maxima, TABLES | {"tops": "*i32"}, one)}
    kernels = {
        "fold": (fold, pointers, folds),
        "decode": (of_planes.decode, TABLES, one),
        "encode": (of_planes.encode, TABLES | {"streams": "*i64", "tops": "*i32"}, one),
        **(counting if known.broken else {}),
        **(in_rows if known.whole_rows else {}),
        "stream": (of_planes.stream, {"table": "*i64", "owners": "*i32", "zero": "*i32"}, all_of_them, streamed),
        "squares": (of_planes.squares, TABLES | {"sums": "*fp64"}, gradients),
        "add_up": (sums.add_up, {"sums": "*fp64", "first": "*i64", "totals": "*fp64"}, {}),
        "add_up_halved": (sums.add_up_halved, {"sums": "*fp64", "first": "*i64", "totals": "*fp64"}, {}),
    }
    return {name: compiled(*kernel, target=target) for name, kernel in kernels.items()}


def facts(kernel) -> dict:
    """Registers and spills; how wide memory is accessed; what LLVM and PTX say of contraction and flushing."""
    asm = kernel.asm
    fma = r"|llvm\.fmuladd" + (
        r"|llvm\.fma\b" if "cubin" in asm or RELEASE >= (3, 8) else ""
    )  # before: in its square root
    code = asm.get("ptx") or asm["amdgcn"]
    return {
        **(nvidia(asm["cubin"]) if "cubin" in asm else amd(code)),
        "elements": BLOCK // kernel.metadata.target.warp_size // kernel.metadata.num_warps,  # of a thread
        "loads": len(re.findall(r"ld\.global\S*\.v4\.b32|global_load_dwordx4", code)),
        "stores": len(re.findall(r"st\.global\S*\.v4\.b32|global_store_dwordx4", code)),
        "halves": len(re.findall(r"st\.global\S*\.v2\.b32|global_store_dwordx2", code)),
        "contracted": len(re.findall(r"\b(?:contract|reassoc|fast|afn|arcp)\b" + fma, asm["llir"]))
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
    targets, cases, *flags = sys.argv[1:]
    if "toy" in cases:
        toy = import_module("triton_toy")
        formats.FORMATS["toy"], FORMATS["toy"] = toy.Toy(), toy.ROW
    result = {}
    for name in cases.split(","):
        case = Case.parse(name)
        for target in targets.split(","):
            result[f"{name} {target}"] = facts(step(case, TARGETS[target], flags))
            if "others" in flags:
                for kind, kernel in others(case, TARGETS[target]).items():
                    result[f"{kind} {name} {target}"] = facts(kernel)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
