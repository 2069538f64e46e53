"""What a transformer is given while it draws pictures, every prompt and every step, and the velocities that it answers.

Calibration and sensitivity put the same records before transformers of several precisions.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from infer.checkpoint.load import load_scheduler
from infer.checkpoint.model import Model
from infer.quantize.precision import Precision
from infer.sample.encode import text_encoder
from infer.sample.generate import Sampling, draw, mend_of, settled

Record = dict[str, Any]
"""The keyword arguments of one call for one picture, tensors on the CPU."""
PER_PICTURE = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance")  # where given


def record(
    transformer: Any,
    model: Model,
    precision: Precision,
    prompts: list[str],
    seed: int,
    sampling: Sampling,
    size: tuple[int, int],
    device: torch.device,
) -> list[Record]:
    """Draw each prompt once (seed, seed + 1, ...) and keep what the transformer is given: pictures in their order, the
    steps of each in theirs. Where guidance is by two calls, pictures are drawn without it: what layers are given is of
    the same kind, and a step is one record. `size` is height and width in pixels; `precision` is the text encoder's."""
    sampling = settled(sampling, model)
    with text_encoder(model, precision, device, None) as encoder:
        texts = encoder(prompts)
    records: list[Record] = []

    def keep(module: nn.Module, args: Any, given: Record) -> None:
        records.append({key: value.cpu() if isinstance(value, Tensor) else value for key, value in given.items()})

    hook = transformer.register_forward_pre_hook(keep, with_kwargs=True)
    scheduler = load_scheduler(model)
    try:
        for i, text in enumerate(tqdm(texts, unit="picture", desc="recording")):
            draw(transformer, scheduler, text, seed + i, sampling, size, device)
    finally:
        hook.remove()
    return records


def stacked(records: list[Record], device: torch.device, dtype: torch.dtype) -> Record:
    """Records of pictures of one size as the keyword arguments of one call."""
    batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in records[0].items()}
    for key in PER_PICTURE:
        if batch.get(key) is not None:
            batch[key] = torch.cat([one[key] for one in records]).to(device)
    for key in ("hidden_states", "encoder_hidden_states", "pooled_projections"):
        if key in batch:
            batch[key] = batch[key].to(dtype)
    return batch | {"return_dict": False}


def batches(records: list[Record], size: int, device: torch.device, dtype: torch.dtype) -> Iterator[Record]:
    """`size` records at a time, stacked."""
    for start in range(0, len(records), size):
        yield stacked(records[start : start + size], device, dtype)


def velocities(transformer: Any, calls: Iterable[Record], hold: torch.device) -> Tensor:
    """The transformer's outputs for stacked records, [records, tokens, channels * 4] in fp32, collected on `hold`.

    Raises:
        ValueError: one is not finite.
    """
    with torch.no_grad():
        found = torch.cat([transformer(**call)[0].float().to(hold) for call in calls])
    if not found.isfinite().all():
        raise ValueError(f"the transformer's output is not finite; {mend_of(transformer)}")
    return found
