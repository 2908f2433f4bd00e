"""On a Hopper GPU no load of a kernel overwrites a tile that a running product still reads.

Triton lets a product run on while the next tiles are loaded. Where a loop also reads these tiles without tensor cores,
Triton 3.6 reserves no further buffer for that, and results change from run to run.
"""

import json
import re
import subprocess
import sys

import pytest


def overwrites_operands(stages: int, code: str) -> bool:
    """Return True if products may outlast the tiles that they read.

    Args:
        stages: stages of the software pipeline.
        code: a kernel in Triton's GPU dialect.
    """
    # Products that may still run when the next load starts, and tiles that fit into the buffer of each load.
    pending = [int(number) for number in re.findall(r"warp_group_dot_wait.*pendings = (\d+)", code)]
    tiles = [int(number) for number in re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x", code)]
    return max(pending, default=0) > 0 and min(tiles, default=stages) < stages


@pytest.mark.integration
def test_no_load_overwrites_the_operands_of_a_running_product() -> None:
    command = [sys.executable, "-m", "tests.redux.kernels.hopper_code"]
    kernels = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    expected = {"_gram_kernel", "_kmeans_kernel", "_log_sum_exp", "_mean", "_forward", "_query_gradient"}
    assert {name for name, _, _ in kernels} == expected | {"_key_gradients"}
    assert [name for name, stages, code in kernels if overwrites_operands(stages, code)] == []


def test_overwritten_operands_are_found() -> None:
    code = """
    %x = ttg.local_alloc : () -> !ttg.memdesc<2x64x64xbf16, #shared, #smem, mutable>
    %2:3 = ttng.warp_group_dot_wait %1, %x {pendings = 1 : i32}
    """
    assert overwrites_operands(3, code)
    assert not overwrites_operands(2, code)
    assert not overwrites_operands(3, code.replace("pendings = 1", "pendings = 0"))
