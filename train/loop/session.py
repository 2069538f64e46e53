"""What a training run has: before anything is loaded, once all is loaded, and while the loop runs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from infer.adapter.error_init import Start
from infer.family.family import Text
from infer.fast.offload import Offload
from infer.sample.edit import Edit
from train.data.batches import SampleIndex
from train.latents.store import Cache
from train.loop.batch import Batch, Samples
from train.loop.picture_losses import PictureLosses
from train.loop.second import Second
from train.loop.spill import Spill
from train.run.config import Train
from train.state.checkpoint import Checkpoint
from train.state.journal import Journal
from train.state.progress import TrainingState
from train.state.requests import Requests
from train.state.run_lock import RunLock
from train.state.signals import StopSignals
from train.trackers.tracker import Tracker


@dataclass
class Run:
    """A run on one rank, before anything is loaded."""

    job: Train
    folder: Path
    accelerator: Accelerator
    stop: StopSignals
    lock: RunLock | None
    """Of the folder; on the main rank."""
    requests: Requests | None = None
    """What others ask of the run; on the main rank."""

    @property
    def main(self) -> bool:
        """Whether this rank is the one that writes."""
        return bool(self.accelerator.is_main_process)

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def ranks(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    def say(self, text: str) -> None:
        """Print on the main rank of each machine."""
        self.accelerator.print(text)


@dataclass
class Resumption:
    """How this run goes on from an earlier start of it."""

    original_ranks: int
    """The number of processes that the run began with."""
    base: str
    """The hash of the transformer's weights."""
    path: Path | None
    """The checkpoint from which the run goes on; None: it starts anew."""
    checkpoint: Checkpoint | None
    """What the checkpoint holds; the main rank has read it already."""


@dataclass
class EncodedData:
    """The encoded training set."""

    cache: Cache
    samples: Samples
    previews: dict[str, Text]
    """What the previews are called, with their embeddings and references."""
    edits: dict[str, Edit]
    """Of the previews with references in files: the prompt and these, by what the preview is called."""
    unrelated: dict[str, Text]
    """Of the prompts that the adapter has nothing to do with, where scores are drawn."""


@dataclass
class LoadedModel:
    """The quantized transformer with the adapter in it."""

    transformer: Any
    parameters: list[nn.Parameter]
    """The adapter's, which are trained."""
    start: Start | None
    """Where the adapter begins, if that is the quantization error."""
    offload: Offload | None
    """Of the transformer's blocks to host memory, if memory has a budget."""


@dataclass
class Session:
    """A run on one rank, once everything is loaded."""

    run: Run
    resumption: Resumption
    data: EncodedData
    model: LoadedModel
    tracker: Tracker

    @property
    def job(self) -> Train:
        return self.run.job


@dataclass
class Loop:
    """What the training loop works with."""

    session: Session
    training: TrainingState
    optimizer: Any
    """The training state's, or the ZeRO-2 optimizer that takes its place."""
    first: int
    """The step at which this process began."""
    learn: Callable[[Batch], Tensor]
    """Adds a batch's gradient to the parameters' and returns the loss of each sample, [b]."""
    batches: Iterator[list[SampleIndex]]
    metrics: Journal
    events: Journal
    bar: tqdm
    pictures: PictureLosses
    spill: Spill
    saved_at: float
    """By time.monotonic: when the last checkpoint was written, or the loop began."""
    saved: bool
    """Whether the run has a checkpoint."""
    second: Second | None = None
    """Another checkpoint that previews are drawn on too."""
    base_latents: dict[str, Tensor] = field(default_factory=dict)
    """Of the previews without the adapter, by prompt: drawn once."""
    save_requested: bool = False
    stop_requested: bool = False
    sample_requested: bool = False

    @property
    def step(self) -> int:
        """The number of updates so far."""
        return self.training.progress.step

    def due(self, every: int) -> bool:
        """Whether something is done at this step that is done every so many steps (0: never) and at the last one."""
        return self.step == self.session.job.steps or (every > 0 and self.step % every == 0)
