"""Compile the GPU kernels for compute capability 9.0, without a GPU, and count registers, spills and instructions.

python benchmarks/registers.py                  # writes benchmarks/results/registers.md
python benchmarks/registers.py --classes 19 --output ""

Needs triton, whose package contains the assembler. Loads and stores are instructions of a thread, each of one to four of its
pixels. They and the special functions (ex2, rcp, sqrt, rsqrt) are counted in the PTX code of the whole kernel: with up to 24
classes in all, with more in the body of each loop of four classes, with upsampling of one.

The prototypes of the kernels at full resolution took 0.49 to 0.61 times as long as cross entropy on an H200. Compiled in the
same way (bf16, a loop over single classes, 512 pixels in a block), they have, in the columns of the table:

    margin forward 40, 0, 19, 1, 8          margin backward 64, 0, 34, 1, 32
    soft forward, power half 48, 0, 9, 6, 24          soft backward, power half 56, 0, 17, 1, 36
"""

import argparse
import re
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mcseg.kernels import gpu, gpu_labels, gpu_pixels, gpu_upsampled

CAPABILITY = 90
INTEGERS = {"rows_ptr", "columns_ptr", "row_start_ptr", "row_end_ptr", "column_start_ptr", "column_end_ptr"}
POINTERS = {"y_ptr": "*i64", "preds_ptr": "*u8", "classes_ptr": "*i32"}
WIDE = {"pixels", "total", "width", "zn", "zc", "gn", "gc"}  # multiples of 16, as at usual sizes
PATTERNS = {"loads": r"ld\.global", "stores": r"st\.global", "special functions": r"(ex2|rcp|sqrt|rsqrt)\.approx|div\.full"}
HEAD = "| kernel | registers | bytes spilt | loads | stores | special functions |"


def compiled(kernel: Any, dtype: str, **constants: Any) -> str:
    """Return the PTX code of a kernel for logits of a dtype."""
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name.endswith("_ptr"):
            default = "*i32" if name in INTEGERS else f"*{dtype}" if name in ("z_ptr", "gradient_ptr") else "*fp32"
            return POINTERS.get(name, default)
        return "fp32" if name in ("weight", "power") else "i32"

    signature = {name: kind(name) for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name not in constants and (name.endswith("_ptr") or name in WIDE)
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    ptx: str = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options={"num_warps": 4}).asm["ptx"]
    return ptx


def assembled(ptx: str) -> tuple[int, int]:
    """Return registers of a thread, and bytes that it spills, as the assembler reports them."""
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "kernel.ptx"
        code.write_text(ptx)
        command = [str(assembler), "-v", f"--gpu-name=sm_{CAPABILITY}a", str(code), "-o", str(code.with_suffix(".cubin"))]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilt = re.search(r"Used (\d+) registers", report), re.search(r"(\d+) bytes spill stores", report)
    assert registers, report
    return int(registers[1]), int(spilt[1]) if spilt else 0


def row(name: str, ptx: str) -> str:
    """Return a row of the table."""
    registers, spilt = assembled(ptx)
    counts = [len(re.findall(pattern, ptx)) for pattern in PATTERNS.values()]
    return f"| {name} | {registers} | {spilt} | {' | '.join(map(str, counts))} |"


def rows(classes: list[int], dtypes: list[str]) -> Any:
    """Yield the rows of all kernels."""
    flat: dict[str, Any] = {"UP": False, "R": 1, "zp": 1, "gp": 1, "upstream_step": 0}
    flat |= dict.fromkeys(("rows_ptr", "down_ptr", "columns_ptr", "across_ptr"))
    for dtype in dtypes:
        for count in classes:
            one = count <= gpu.UNROLLED
            sizes: dict[str, Any] = {"ONE": one, "U": count if one else gpu._CHUNK, "BP": gpu._block(count)}
            if one:
                sizes |= dict.fromkeys(("numbers_ptr", "classes_ptr"))
            for name, kernel in (("forward", gpu_pixels.margin_forward), ("backward", gpu_pixels.margin_backward)):
                yield row(f"margin {name}, {count} classes, {dtype}", compiled(kernel, dtype, v_ptr=None, **flat, **sizes))
            for name, kernel in (("forward", gpu_pixels.soft_forward), ("backward", gpu_pixels.soft_backward)):
                for power in ("one", "half", "any"):
                    bins = triton.next_power_of_2(count + 1)
                    ptx = compiled(kernel, dtype, KIND=power, BINS=bins, **flat, **sizes)
                    yield row(f"soft {name}, power {power}, {count} classes, {dtype}", ptx)
        up = {"UP": True, "ONE": False, "U": 1, "R": 4, "BP": gpu._TILE, "zp": 0, "zw": 1, "KIND": "half", "BINS": 256}
        yield row(f"margin forward, upsampled, {dtype}", compiled(gpu_pixels.margin_forward, dtype, v_ptr=None, **up))
        yield row(f"soft forward, upsampled, {dtype}", compiled(gpu_pixels.soft_forward, dtype, **up))
        yield row(f"soft statistics, {dtype}", compiled(gpu_upsampled.soft_statistics, dtype, **up))
        precision = "tf32" if dtype == "bf16" else "ieee"
        fold = {"PRECISION": precision, "CELLS": 14, "zw": 1, "gw": 1, "upstream_step": 0, **gpu._FOLD}
        unused = dict.fromkeys(("fg_ptr", "bg_ptr", "upstream_ptr"))
        yield row(f"fold, margin, {dtype}", compiled(gpu_upsampled.fold, dtype, KIND="margin", v_ptr=None, **fold))
        yield row(f"fold, power half, {dtype}", compiled(gpu_upsampled.fold, dtype, KIND="half", **unused, **fold))
        yield row(f"predict, {dtype}", compiled(gpu_labels.predict, dtype, **flat, BP=512))
        yield row(f"predict, upsampled, {dtype}", compiled(gpu_labels.predict, dtype, **up))


def main() -> None:
    """Compile all kernels, print the table and write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 11, 19, 24, 150])
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "registers.md"), help='"" for none')
    arguments = parser.parse_args()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    ).stdout.strip()
    lines = ["# Registers and instructions of the GPU kernels", ""]
    lines += [
        f"`python benchmarks/registers.py`, commit {commit}, Triton {version('triton')}, compute capability 9.0, 4 warps."
    ]
    lines += ["", HEAD, "|---|---:|---:|---:|---:|---:|"]
    print("\n".join(lines))
    for line in rows(arguments.classes, arguments.dtypes):
        print(line, flush=True)
        lines.append(line)
        if arguments.output:
            Path(arguments.output).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
