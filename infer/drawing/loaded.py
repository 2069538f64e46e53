"""A model in memory to draw with: loaded when it is first asked for, left as it is for the next drawing if it stays."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from infer.adapter.attach import remove_adapter
from infer.adapter.checks import check_running
from infer.adapter.read import find_adapter
from infer.adapter.selection import Trained, load_chosen
from infer.checkpoint.files import read_config
from infer.checkpoint.layers import linear_shapes
from infer.checkpoint.load import load_scheduler, load_transformer, load_vae
from infer.checkpoint.model import Model
from infer.device.device import release
from infer.family.family import Text
from infer.fast.cuda_graph import Sampler
from infer.fast.install import choose_path, hold_of
from infer.fast.memory import Memory
from infer.fast.offload import Offload
from infer.fast.ready_kernels import prepare_kernels
from infer.fast.weights import obstacle
from infer.quantize.compute import stored_on
from infer.quantize.precision import Precision, kind_asked
from infer.quantize.storage import weight_bytes
from infer.rounding.layer_errors import decide
from infer.sample.encode import NotFiniteError, TextEncoder, drawn_texts, text_encoder
from infer.sample.generate import Sampling
from infer.sample.warm_up import draw_unseen

WORK = 6 * 2**30  # bytes left for drawing and decoding where the text encoders stay beside the transformer
TEXTS = 500  # prompts whose embeddings are remembered

Say = Callable[[str], object]


@dataclass
class Loaded:
    """A checkpoint at a precision on a device. What is None is not loaded yet."""

    model: Model
    precision: Precision
    """As it is stored on this device, kind auto's mixture included."""
    memory: Memory
    device: torch.device
    text_length: int | None
    files: Hashable
    """Of the checkpoint, with their times and sizes."""
    texts: dict[str, Text] = field(default_factory=dict)
    """Embeddings by prompt."""
    encoder: TextEncoder | None = None
    """Its weights may be freed already."""
    open: ExitStack = field(default_factory=ExitStack)
    """Closing it frees the text encoders."""
    transformer: Any = None
    vae: Any = None
    scheduler: Any = None
    path: Memory | None = None
    """The way that the blocks are computed, as it was installed."""
    offload: Offload | None = None
    on: list[str] = field(default_factory=list)
    """Adapters in the transformer, by their names there."""
    state: Hashable = None
    """Which adapters these are, at which strength, and at what size was drawn."""


@dataclass
class Held:
    """What a drawing leaves behind for the next one."""

    stays: bool = False
    """Whether it is left there."""
    between: Callable[[], object] = lambda: None
    """Called before each picture; what it raises ends the drawing."""
    loaded: Loaded | None = None


def settle(
    model: Model, precision: Precision, adapters: Sequence[Trained], memory: Memory, device: torch.device
) -> tuple[Precision, Memory]:
    """The precision as it is stored on a device, and the memory settings with which all of these adapters take one
    path. They are checked before anything is measured, and again with the mixture that kind auto came to.

    Raises:
        ValueError: adapters and settings do not go together.
    """
    for turn in range(2):
        for chosen in adapters:
            memory = check_running(model, precision, chosen, None, memory, device)
        if turn == 0:
            precision = stored_on(decide(model, precision, device, print), device)
    return precision, memory


def take(
    held: Held, model: Model, precision: Precision, memory: Memory, device: torch.device, text_length: int | None
) -> Loaded:
    """The model that is held, if it is this one; else the place for it, from which another one is freed."""
    files, old = _files(model), held.loaded
    if old is not None:
        now = (old.model, old.precision, old.memory, old.device, old.text_length, old.files)
        if now == (model, precision, memory, device, text_length, files):
            return old
        free(held)
    prepare_kernels(read_config(model, "transformer"), precision, memory, device)
    held.loaded = Loaded(model, precision, memory, device, text_length, files)
    return held.loaded


def _files(model: Model) -> Hashable:
    found = [model.file] if model.file else sorted(model.local.rglob("*.*")) if model.local else []
    return tuple((str(file), status.st_mtime_ns, status.st_size) for file in found if (status := file.stat()))


def read_texts(held: Held, prompts: Sequence[str], say: Say) -> dict[str, Text]:
    """The embeddings of prompts; those that are known already are not computed again."""
    loaded = held.loaded
    assert loaded is not None
    new = [prompt for prompt in prompts if prompt not in loaded.texts]
    if new:
        encoder = loaded.encoder
        if encoder is None or encoder.encode is None:
            if encoder is not None and _free_bytes(loaded) < encoder.weights_bytes + WORK:
                _drop_rest(loaded)  # the two were not on the device at once, and are not now
            encoder = loaded.encoder = loaded.open.enter_context(
                text_encoder(loaded.model, loaded.precision, loaded.device, loaded.text_length)
            )
        loaded.texts |= zip(new, drawn_texts(loaded.model, encoder, new), strict=True)
        if not (held.stays and _leaves_room(loaded)):
            loaded.open.close()
    assert loaded.encoder is not None
    for prompt in loaded.encoder.truncated(prompts):
        say(f"only the first {loaded.encoder.length} tokens are seen of {prompt!r}")
    found = {prompt: loaded.texts[prompt] for prompt in prompts}
    for prompt in list(loaded.texts)[: max(0, len(loaded.texts) - TEXTS)]:
        del loaded.texts[prompt]
    return found


def _leaves_room(loaded: Loaded) -> bool:
    """Whether the text encoders can stay on the device beside the transformer, which may be there already."""
    needed = WORK
    if loaded.transformer is None:
        precision = loaded.precision
        item = 4 if precision.kind == "fp32" else 2
        for name, layer in linear_shapes(read_config(loaded.model, "transformer")).items():
            kind = kind_asked(precision, name)
            needed += weight_bytes(layer.rows, layer.columns, kind, precision.double_quant, item)
    return _free_bytes(loaded) >= needed


def _free_bytes(loaded: Loaded) -> float:
    """What the device has left; of a budget nothing, as the transformer takes all of it. A CPU is not counted."""
    if loaded.device.type != "cuda":
        return math.inf
    if loaded.memory.budget_gib is not None:
        return 0
    unused = torch.cuda.memory_reserved(loaded.device) - torch.cuda.memory_allocated(loaded.device)
    return torch.cuda.mem_get_info(loaded.device)[0] + unused


def _drop_rest(loaded: Loaded) -> None:
    loaded.transformer = loaded.vae = loaded.offload = loaded.state = None
    loaded.on = []
    release(loaded.device)


def load_rest(loaded: Loaded, say: Say) -> None:
    """Load the transformer, the autoencoder and the sampler's scheduler, unless they are there."""
    if loaded.transformer is not None:
        return
    model, precision, memory, device = loaded.model, loaded.precision, loaded.memory, loaded.device
    transformer = load_transformer(model, precision, device, hold_of(memory))
    loaded.vae, loaded.scheduler = load_vae(model, device), load_scheduler(model)
    loaded.path, loaded.offload = choose_path(transformer, memory, precision, device, say)
    if loaded.path.graphs(device):
        Sampler(transformer, loaded.offload)
    loaded.transformer = transformer


def put_on(loaded: Loaded, chosen: Trained, largest: Text, sampling: Sampling, size: tuple[int, int]) -> None:
    """Have exactly these adapters on. largest: of the texts that are drawn then, the one that takes most memory;
    size: height and width in pixels."""
    adapters = tuple((one.path, one.weight, _stamp(one.path)) for one in chosen.all())
    state = (adapters, size, largest.embeds.shape, tuple(each.shape for each in largest.references))
    if state == loaded.state:
        return
    transformer, before, loaded.state = loaded.transformer, loaded.state, None
    assert loaded.path is not None
    if isinstance(transformer.forward, Sampler):
        transformer.forward.replay.release()  # what another size captured would stay for ever
    if not isinstance(before, tuple) or before[0] != adapters:
        for name in loaded.on:
            remove_adapter(transformer, name, loaded.model)
        loaded.on = []
        loaded.on = [] if chosen.path is None else load_chosen(transformer, chosen, loaded.model)
        assert not loaded.path.fused or obstacle(transformer) is None, obstacle(transformer)
    if loaded.offload is not None:
        assert loaded.memory.budget_gib is not None
        once = Sampling(1, sampling.guidance, sampling.height, sampling.width)
        arguments = (loaded.vae, transformer, loaded.scheduler, largest, 0, once, size, loaded.device)
        loaded.offload.fit(loaded.memory.budget_gib, partial(_draw_one, *arguments))
    loaded.state = state


def _draw_one(vae: Any, *arguments: Any) -> None:
    """A picture that nobody looks at; arguments: those of `draw`."""
    try:
        draw_unseen(vae, *arguments)
    except NotFiniteError:
        return  # said of each picture that is asked for, by its name


def _stamp(path: str) -> Hashable:
    status = find_adapter(path).stat()
    return status.st_mtime_ns, status.st_size


def free(held: Held) -> None:
    """Give back all memory of what is held."""
    loaded, held.loaded = held.loaded, None
    if loaded is None:
        return
    loaded.open.close()
    loaded.encoder = None
    _drop_rest(loaded)
