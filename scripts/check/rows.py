"""The rows of scripts/check_gpu.py by name, and which of them share a process."""

import sys
from collections.abc import Callable
from functools import partial

import torch

from infer.adapter.lora import FROM_ERROR
from infer.program.paths import ROOT
from scripts.check.case import CASES, DISTILLED, KINDS, KLEIN, TRAINED
from scripts.check.commands import (
    check_kind,
    check_merge,
    check_optimizer,
    check_resolutions,
    check_scores,
    gpu_tests,
    outside,
)
from scripts.check.figures import Figures
from scripts.check.matrix import check_case
from scripts.check.memory import check_budget, check_short, check_spill, check_stays
from scripts.check.recovery import check_recovery
from scripts.check.references import check_references
from scripts.check.second import check_second
from train.objective.optim import NAMES

SECONDS = 240  # after which a row is given up
RANKS = [sys.executable, str(ROOT / "scripts" / "check_ranks.py"), "--seconds", str(SECONDS - 30)]

WORK: dict[str, Callable[[torch.device], Figures]] = {name: partial(check_case, case) for name, case in CASES.items()}
WORK |= {f"optimizer-{name}": partial(check_optimizer, name) for name in NAMES}
WORK |= {f"kind-{kind}": partial(check_kind, kind) for kind in ("lokr", "loha", "oft")}
WORK |= {f"scores-{path}": partial(check_scores, path) for path in ("fused", "streamed")}
WORK |= {
    "recover": check_recovery,
    "merge": partial(check_merge, ""),
    "resolutions": partial(check_resolutions, ""),
    "references": partial(check_references, ""),
    f"{KLEIN}-references": partial(check_references, KLEIN),
    f"{KLEIN}-merge": partial(check_merge, KLEIN),
    f"{KLEIN}-resolutions": partial(check_resolutions, KLEIN),
    f"{KLEIN}-second": partial(check_second, KLEIN, DISTILLED),
    f"{TRAINED}-second": partial(check_second, TRAINED, "distilled"),
    "all-stay": check_stays,
    **{f"budget-{name}": partial(check_budget, name) for name in NAMES},
    "short-of-memory": check_short,
    "pytest": partial(outside, gpu_tests()),
    "ranks": partial(outside, RANKS),
    "spill": check_spill,
}
ALONE = ("ranks", "spill")  # these need the whole card, or all of them
GPU_ONLY = ("all-stay", "budget", "short", "pytest", "ranks", "spill")
BESIDE = {"merge": "resolutions", "all": "bf16", "short": "budget", "recover": "recovery"}


def possible(name: str, cpu: bool) -> bool:
    if cpu:
        return "streamed" not in name and not name.startswith(GPU_ONLY)
    return name != "ranks" or torch.cuda.device_count() > 1


def groups(names: list[str]) -> list[list[str]]:
    """Rows that share a process, and so what is compiled for them; plain before what is compared with it."""
    found: dict[str, list[str]] = {}
    for name in names:
        case = CASES.get(name)
        if case is None:
            model = next((model for model in (KLEIN, TRAINED) if name.startswith(f"{model}-")), "")
            own = name.removeprefix(f"{model}-").split("-")[0]
            key = f"{model} {BESIDE.get(own, own)}".strip()
        elif case.kind in FROM_ERROR:
            key = "from error"
        else:
            # DoRA's rows apart, so that no process has so many that it is left alone at the end
            key = f"{case.model} {case.precision}".strip() + (" dora" if KINDS[case.kind].dora else "")
        found.setdefault(key, []).append(name)
    return list(found.values())
