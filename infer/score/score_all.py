"""Drawn pictures -> every score that can be had, and the names of those that cannot."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infer.device.device import release
from infer.score.judges import Score
from infer.score.memorization import score_likeness
from infer.score.networks import TRAINING, Networks, clip_score, load_networks
from infer.score.pairs import Key, Row, score_pairs, score_prompts
from infer.score.summary import summarise


def judge(
    rows: list[Row],
    drift: list[Row],
    folder: Path,
    latents: dict[Key, Tensor],
    reference: str | None,
    own: dict[str, Score],
    named: Networks,
    references: str | None,
    device: torch.device,
) -> dict[str, Any]:
    """Fill in the scores of all rows; returns what a report says beside them: `summary` (infer/score/summary.py),
    `references` (what is known of the training pictures) and `absent` (score -> why it was not measured).

    drift: rows of prompts that the adapter has nothing to do with. reference: the precision that others are compared
    with. own: the user's scores. references: the folder of the training pictures.
    """
    networks = load_networks(named, device)
    score_pairs(rows + drift, folder, latents, reference, networks.lpips)
    if networks.clip is not None and networks.text is not None:
        own = {**own, "clip_t": partial(clip_score, networks.clip, networks.text)}
    if networks.image_reward is not None:
        own = {**own, "image_reward": networks.image_reward}
    score_prompts(rows, folder, own)
    absent = named.absent()
    known: dict[str, Any] = {}
    if references is None:
        absent |= dict.fromkeys(("nearest_rms", *TRAINING), "references is null")
    else:
        known = score_likeness(rows, folder, references, networks)
    if not drift and any(row["adapter"] for row in rows):
        absent["drift"] = "unrelated is empty"
    del networks
    release(device)
    summary = summarise(rows, drift, known.pop("sets", []), reference)
    return {"drift": drift, "summary": summary, "references": known, "absent": absent}
