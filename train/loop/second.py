"""Previews on a second checkpoint (sampling.model), as those of an adapter of klein's base on the distilled klein.

It is loaded for the pictures and freed after them. Beside the transformer in training it has what that leaves: all of
it lies on the device where it fits, else some of its blocks in host memory, else nothing is drawn on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import psutil
import torch
from PIL import Image
from torch import Tensor

from infer.adapter.attach import attach
from infer.adapter.attached import set_adapter_state
from infer.adapter.second import second_model, short_name
from infer.adapter.switch import switch
from infer.checkpoint.family import guided_by_two_calls
from infer.checkpoint.load import load_scheduler, load_transformer, load_vae
from infer.checkpoint.model import Model
from infer.device.device import release
from infer.family.family import Text
from infer.fast.install import choose_path, hold_of
from infer.fast.memory import Memory
from infer.sample.encode import decode
from infer.sample.generate import Sampling, draw, settled
from train.estimate.memory import footprint
from train.run.config import Train

GIB = 2**30
BASE = "base"


class NoRoomError(Exception):
    """The second checkpoint does not fit beside the transformer in training."""


@dataclass
class Second:
    """A checkpoint to draw on too."""

    job: Train
    model: Model
    base: dict[str, Tensor] = field(default_factory=dict)
    """Packed latents without the adapter, by prompt: drawn once in a run."""

    def column(self, name: str) -> str:
        """What the sheet calls the second's pictures of one of its columns."""
        return f"{name} on {short_name(self.model)}"


def second_of(job: Train) -> Second | None:
    """What sampling.model names; None if it names nothing."""
    return None if job.sampling.model is None else Second(job, second_model(job.model, job.sampling.model))


def empty_text(job: Train) -> bool:
    """Whether previews need the embedding of an empty prompt: guidance takes two calls on one of the checkpoints."""
    second = second_of(job)
    return guided_by_two_calls(job.model) or (second is not None and guided_by_two_calls(second.model))


def memory_beside(second: Second, device: torch.device) -> Memory:
    """How the second's blocks lie beside the transformer in training. Nothing is compiled or captured for few steps.

    Raises:
        NoRoomError: it does not fit, and offloading does not help.
    """
    memory = Memory("nothing", fused=second.job.memory.fused)
    if memory.fused:
        memory.compile = memory.graph = False
    taken = footprint(replace(second.job, model=second.model, memory=Memory("nothing")))
    if device.type == "cpu":
        need, room = taken.weights + taken.adapters + taken.block, psutil.virtual_memory().available
    else:
        torch.cuda.empty_cache()
        held = torch.cuda.memory_reserved(device)
        need, room = taken.allocated + taken.allocator, torch.cuda.mem_get_info(device)[0]
        if second.job.memory.budget_gib is not None:
            room = min(room, int(second.job.memory.budget_gib * GIB) - held)
        if need > room and memory.fused and room > 0:
            return replace(memory, budget_gib=(held + room) / GIB)
    if need > room:
        raise NoRoomError(
            f"{second.model.path} needs about {need / GIB:.1f} GiB beside the transformer in training, and "
            f"{max(room, 0) / GIB:.1f} are free; draw on it afterwards with infer/compare.py"
        )
    return memory


def draw_on(
    second: Second,
    states: Mapping[str, Mapping[str, Tensor]],
    prompts: Mapping[str, Text],
    size: tuple[int, int],
    device: torch.device,
) -> dict[tuple[str, str], Image.Image]:
    """Pictures by (prompt, column): without the adapter, and with each of some states of it, by their columns.

    Raises:
        NoRoomError: there is no memory for it.
        NotFiniteError: what is drawn is not finite.
    """
    try:
        latents = _latents(second, states, prompts, size, device)
    except torch.OutOfMemoryError as error:
        raise NoRoomError(f"{second.model.path} found no memory beside the transformer in training") from error
    finally:
        release(device)
    vae = load_vae(second.model, device)
    pictures = {place: decode(vae, packed, *size) for place, packed in latents.items()}
    del vae
    release(device)
    return pictures


def _latents(
    second: Second,
    states: Mapping[str, Mapping[str, Tensor]],
    prompts: Mapping[str, Text],
    size: tuple[int, int],
    device: torch.device,
) -> dict[tuple[str, str], Tensor]:
    """As `draw_on`, but packed latents; the transformer is free afterwards."""
    job, model = second.job, second.model
    sampling = settled(Sampling(height=job.sampling.height, width=job.sampling.width), model)
    memory = memory_beside(second, device)
    transformer = load_transformer(model, job.precision, device, hold_of(memory))
    attach(transformer, replace(job.adapter, start=None), job.seed)
    transformer.eval()
    path, offload = choose_path(transformer, memory, job.precision, device, lambda _: None)
    scheduler = load_scheduler(model)
    if offload is not None:
        assert path.budget_gib is not None
        one, text = replace(sampling, steps=1), next(iter(prompts.values()))
        try:
            offload.fit(path.budget_gib, lambda: draw(transformer, scheduler, text, 0, one, size, device))
        except ValueError as error:
            raise NoRoomError(f"{model.path} does not fit beside the transformer in training: {error}") from error
    latents: dict[tuple[str, str], Tensor] = {}
    for name in (BASE, *states):
        switch(transformer, name != BASE)
        if name != BASE:
            set_adapter_state(transformer, dict(states[name]))
        for prompt, text in prompts.items():
            packed = second.base.get(prompt) if name == BASE else None
            if packed is None:
                packed = draw(transformer, scheduler, text, job.seed, sampling, size, device)
            latents[prompt, second.column(name)] = packed
            if name == BASE:
                second.base[prompt] = packed
    return latents
