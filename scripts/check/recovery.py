"""The recovery adapter of the bundled model, made once and used by the rows that train beside it."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from infer.recover import recover
from infer.rounding.settings import Recover
from infer.sample.generate import Sampling
from scripts.check.case import BUNDLED, NF4, PROMPTS, Case
from scripts.check.figures import Figures


def recovery_of(case: Case) -> str | None:
    """The folder of the case's recovery adapter, if it has one."""
    return recovery_path() if case.precision == "recovery" else None


@cache
def recovery_path() -> str:
    folder = Path("runs/recover/adapter")
    if not folder.is_dir():
        device = "cuda" if torch.cuda.is_available() else "cpu"
        # of one rank everywhere: each other one is compiled by itself
        few: dict[str, Any] = {"sampling": Sampling(steps=2), "rows": 512, "share": 1.0, "most": 8, "polish": 2}
        recover(
            Recover(BUNDLED, NF4, prompts=PROMPTS, held_out=["four pink diamonds"], run="recover", device=device, **few)
        )
    return str(folder)


def check_recovery(device: torch.device) -> Figures:
    """How much of the rounding error an adapter gives back."""
    folder = Path(recovery_path()).parent
    return {"gap closed": (json.loads((folder / "recovery.json").read_text())["gap_closed"], ">=", 0.05)}
