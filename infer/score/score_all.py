"""Drawn pictures -> every score that can be had, and the names of those that cannot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from infer.device.device import release
from infer.report.results import References
from infer.sample.edit import Edit
from infer.score.drawn import Drawn
from infer.score.edits import score_edits
from infer.score.judges import Score
from infer.score.memorization import SetScore, score_likeness
from infer.score.networks import TRAINING, Networks, clip_score, load_networks
from infer.score.pairs import Key, score_pairs, score_prompts


@dataclass(frozen=True)
class Scored:
    """What is said beside the pictures' own scores."""

    references: References
    sets: list[SetScore]
    absent: dict[str, str]
    """A score that was not measured -> why."""


def score_all(
    rows: Sequence[Drawn],
    drift: Sequence[Drawn],
    bleed: Sequence[Drawn],
    folder: Path,
    latents: dict[Key, Tensor],
    reference: str | None,
    scores: dict[str, Score],
    named: Networks,
    references: str | None,
    edits: Mapping[str, Edit],
    device: torch.device,
) -> Scored:
    """Fill in the scores of all pictures.

    Args:
        drift: rows of prompts that the adapter has nothing to do with.
        bleed: rows of prompts of the adapter's class, without its trigger.
        folder: holds the pictures.
        latents: packed, of each picture.
        reference: the precision that others are compared with.
        scores: the user's.
        references: the folder of the training pictures.
        edits: prompts with reference pictures, by `Row.asked`.
    """
    networks, own = load_networks(named, device), scores
    score_pairs([*rows, *drift, *bleed], folder, latents, reference, networks.lpips)
    score_edits(rows, folder, edits, networks.lpips)
    score_prompts([*drift, *bleed], folder, own)
    if networks.clip is not None and networks.text is not None:
        scores = {**scores, "clip_t": partial(clip_score, networks.clip, networks.text)}
    if networks.image_reward is not None:
        scores = {**scores, "image_reward": networks.image_reward}
    score_prompts(rows, folder, scores)
    absent = named.absent()
    known, sets = References(), list[SetScore]()
    if references is None:
        absent |= dict.fromkeys(("nearest_rms", *TRAINING), "references is null")
    else:
        known, sets = score_likeness(rows, folder, references, networks)
    for name, option, found in (("drift", "unrelated", drift), ("bleed", "class_prompts", bleed)):
        if not found and any(row.adapter for row in rows):
            absent[name] = f"{option} is empty"
    del networks
    release(device)
    return Scored(known, sets, absent)
