"""torch.compile's cache on disk and its helpers: what one process compiled, the next one reads.

The cache is torch's own (Inductor's and Triton's). Its keys hold the card, the versions and the code, and processes may
share it: ranks, and the points of a sweep.
"""

import os
from pathlib import Path

import torch

FOLDER = Path("runs/cache/compiled")


def prepare_compiler(device: torch.device, pool: bool = True) -> None:
    """Call before a model is loaded for a GPU, once the user's settings are checked.

    pool: start the processes that compile for torch.compile. They need as long to start as Python does, while the model
    is loaded; without them the first kernels are compiled one after another. A user's own folders
    (TORCHINDUCTOR_CACHE_DIR, TRITON_CACHE_DIR) stay.
    """
    if device.type != "cuda":
        return
    for name, part in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        os.environ.setdefault(name, str((FOLDER / part).absolute()))
    from torch._functorch import config
    from torch._inductor.async_compile import maybe_warm_pool

    # without it, what is differentiated by hand (infer/fast/blocks.py) is traced and divided again by each process
    config.autograd_cache_allow_custom_autograd_functions = True
    if pool:
        maybe_warm_pool()
