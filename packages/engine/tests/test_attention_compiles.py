"""Our attention kernels are compiled for cards that are not here: they fit each one's shared memory.

Run as a script, `test_attention_compiles.py CAPABILITY HEAD_SIZE`, this prints the bytes that each kernel takes: in the
tests there may be Triton's interpreter only, which is chosen before Triton is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
"""What a program may take, by compute capability: CUDA C++ Programming Guide, table of technical specifications."""


@pytest.mark.slow
@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("capability", [86, 90, 120])
def test_kernels_fit_the_shared_memory_of_the_card(capability: int, head_size: int) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, str(capability), str(head_size)]
    run = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    taken = json.loads(run.stdout)
    assert len(taken) == (4 if capability == 90 and head_size == 256 else 3)
    assert max(taken.values()) <= SHARED_BYTES[capability], taken


def shared_bytes(capability: int, head_size: int) -> dict[str, int]:
    """Compiles forward and backward in bf16 with a window and a soft cap, the most that they hold."""
    import triton
    from hotloop_engine.attention import kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = dict.fromkeys(("Q", "K_", "V", "OUT", "DO", "DQ", "DK", "DV"), "*bf16")
    types = pointers | {"LSE": "*fp32", "DELTA": "*fp32", "scale": "fp32", "cap": "fp32"}
    types |= {"cu_seqlens": "*i32"}
    launches = kernel.launches(head_size, 2, capability == 90)
    runs = {
        "forward": (kernel._forward, launches.forward, {}),
        "dq": (kernel._backward_dq, launches.dq, {}),
    }
    wanted = [("dk", True, False), ("dv", False, True)] if launches.apart else [("dkv", True, True)]
    for name, dk, dv in wanted:
        wants = {"WANT_DK": dk, "WANT_DV": dv}
        runs[name] = (kernel._backward_dkv, launches.dkv, wants)
    found = {}
    for name, (function, tile, wants) in runs.items():
        constants = {
            "GROUP": 2, "K": head_size, "K2": head_size, "M": tile.queries, "N": tile.keys,
            "WINDOW": 4096, "CAP": True, "STEPS": 3, **wants,
        }  # fmt: skip
        signature = {
            argument: "constexpr" if argument in constants else types.get(argument, "i32")
            for argument in function.arg_names
        }
        aligned = {
            (index,): [["tt.divisibility", 16]]
            for index, (argument, kind) in enumerate(signature.items())
            if kind not in ("constexpr", "fp32") and argument not in ("count", "tokens")
        }
        compiled = triton.compile(
            ASTSource(function, signature, constants, aligned),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": tile.warps, "num_stages": tile.stages},
        )
        found[name] = compiled.metadata.shared
    return found


if __name__ == "__main__":
    print(json.dumps(shared_bytes(*map(int, sys.argv[1:3]))))
