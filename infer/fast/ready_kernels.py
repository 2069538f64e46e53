"""The kernels of fused blocks, compiled in threads while a model is loaded.

Triton compiles a kernel when it is first called, in half a second, and keeps it on disk (infer/device/compiler.py).
What models, precisions and runs of one process have in common is compiled once.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

from infer.device.compiler import prepare_compiler
from infer.fast.kernel_calls import Call, Use, kernel_calls
from infer.fast.memory import Memory
from infer.quantize.precision import Precision

BESIDE = 6  # kernels that are compiled beside each other: most of that is not Python
_begun: set[Call] = set()
_running: list[Future[object]] = []


def prepare_kernels(
    config: Mapping[str, Any],
    precision: Precision,
    memory: Memory,
    device: torch.device,
    use: Use = Use(),  # noqa: B008  # never changed
) -> None:
    """Call before a transformer is loaded for a GPU, once the user's settings are checked: what its blocks need is
    compiled meanwhile, by Triton or, where torch.compile will be needed, by helpers that are started now.

    config: the transformer's; memory: as the run can have it, so that one on the plain path compiles nothing.
    """
    if not (memory.fused and memory.compiles(device)):
        return
    own = memory.kernels(device) and precision.dtype != torch.float16
    prepare_compiler(device, pool=not own)
    if own and device.type == "cuda":
        for call in kernel_calls(config, precision, use, device):
            if call not in _begun:
                _begun.add(call)
                _running.append(_pool().submit(_apart, device, call))


def wait() -> None:
    """Until what was begun is done: two threads would compile a kernel twice."""
    while _running:
        # one that failed, as for want of memory, has cost time alone: the first call compiles, or says what is wrong
        _running.pop().exception()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(BESIDE, thread_name_prefix="kernels")


def _apart(device: torch.device, call: Call) -> None:
    function, arguments = call
    with torch.cuda.stream(torch.cuda.Stream(device)):
        function(*arguments)
    torch.cuda.empty_cache()
