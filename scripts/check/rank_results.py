"""What the trainings of scripts/check_ranks.py left behind, against each other: one result a check."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.bench_rows import Row, make_row
from scripts.check.rank_runs import RESUMED, TOOK, checks, job_of


def compare(name: str, one: str, other: str, limit: float) -> dict[str, Any]:
    """The adapters of two runs; limit: 0 asks for the same bits."""
    from safetensors.torch import load_file

    runs = Path("runs", one), Path("runs", other)
    mine, theirs = (load_file(run / "adapter/pytorch_lora_weights.safetensors") for run in runs)
    moved = sum(float(value.square().sum()) for key, value in mine.items() if "lora_B" in key) ** 0.5
    difference = sum(float((mine[key] - theirs[key]).square().sum()) for key in mine) ** 0.5 / moved
    events = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    last = [[event for event in of_run if "seconds" in event][-1] for of_run in events]
    return {
        "check": name,
        "difference": difference,
        "limit": limit,
        "ok": difference < limit if limit else difference == 0 and moved > 0,
        "seconds": [round(event["seconds"], 4) for event in last],
        "gib": [round(event["memory_gib"], 3) for event in last],
        "took": [float((run / TOOK).read_text()) for run in runs],
    }


def said(log: str, cpu: bool) -> dict[str, Any]:
    """What the ranks wrote: no library's warning, and each note of ours once, not once a rank."""
    expected = sum(check.launch == "fsdp2" for check in checks(cpu).values())
    notes = log.count("note: the fast path is off: it holds a block's weights in one piece")
    warnings = [line.strip() for line in log.splitlines() if re.search(r"Warning\b|^\[?W\d{4}|context_fn", line)]
    ours = [line for line in warnings if "torch/distributed/" not in line]  # the launcher's own, of the one that dies
    return {"check": "messages", "notes": notes, "warnings": ours[:5], "ok": notes == expected and not ours}


def results(cpu: bool, ranks: int, log: str, ended: float) -> Iterator[dict[str, Any]]:
    for name, check in checks(cpu).items():
        one, several = (job_of(name, count, cpu).run for count in (1, ranks))
        pairs = [(name, one, several, check.limit)]
        if check.deterministic:
            pairs = [
                (name, one, f"{several}-first", check.limit),
                (f"{name}: stopped", f"{several}-first", several, 0.0),
            ]
        if name == "replicas nf4":
            pairs = [(name, one, f"{several}-first", check.limit)]
            pairs += [(f"{name}: {RESUMED}", f"{several}-first", several, check.limit)]
        for pair in pairs:
            try:
                yield compare(*pair)
            except OSError as error:
                yield {"check": pair[0], "ok": False, "error": str(error)}
    yield said(log, cpu)
    told = log.count(f"rank 1 of {ranks} has ended before the work was done")
    death: dict[str, Any] = {"check": "death of a rank", "ok": False, "error": "the ranks did not come so far"}
    if Path("died").is_file():
        seconds = round(ended - float(Path("died").read_text()), 1)
        death = {"check": "death of a rank", "seconds": seconds, "told": told, "ok": told == 1}
    yield death


def row_of(result: dict[str, Any], ranks: int, place: Row) -> Row:
    """What is recorded of a result, as scripts/bench_rows.py has it: the difference as a part of its limit."""
    more = {key: value for key, value in result.items() if key != "check"}
    measured: float | None = None
    if "error" not in result:
        measured = result["difference"] / result["limit"] if result.get("limit") else 0.0 if result["ok"] else 1e9
    source = place | {"command": f"python scripts/check_ranks.py --ranks {ranks}"}
    return make_row(f"{result['check']}, {ranks} ranks", "of its limit", measured, "<= 1", source, **more)
