"""Where compiled code is kept, and when its helpers start."""

import os
from pathlib import Path

import pytest
import torch
from torch._functorch import config
from torch._inductor import async_compile

from infer.device.compiler import prepare_compiler


def test_code_is_kept_beside_the_other_caches_unless_the_user_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    monkeypatch.setattr(async_compile, "maybe_warm_pool", lambda: started.append(os.environ["TORCHINDUCTOR_CACHE_DIR"]))
    monkeypatch.setattr(config, "autograd_cache_allow_custom_autograd_functions", False)
    monkeypatch.chdir(tmp_path)
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "/elsewhere")  # which restores what was there before
        monkeypatch.delenv(name)
    prepare_compiler(torch.device("cpu"))
    assert not started and "TRITON_CACHE_DIR" not in os.environ

    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    prepare_compiler(torch.device("cuda"), pool=False)
    assert not started
    prepare_compiler(torch.device("cuda"))
    assert started == [str(tmp_path / "runs/cache/compiled/inductor")]  # known to the helpers when they start
    assert os.environ["TRITON_CACHE_DIR"] == "/elsewhere"
    assert config.autograd_cache_allow_custom_autograd_functions
