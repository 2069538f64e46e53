"""Everything a training run is told, as one dataclass; the defaults are in configs/train.yaml."""

from dataclasses import dataclass, field

from infer.adapters import Adapter
from infer.fast import Memory
from infer.flux import Model
from infer.generate import Sampling
from infer.quantize import Precision
from train.data import Data
from train.encoding import Encode
from train.flow import Flow
from train.optim import Optim
from train.sweep import Sweep
from train.track import Track


@dataclass
class Train:
    """One training run."""

    model: Model = field(default_factory=Model)
    precision: Precision = field(default_factory=Precision)
    adapter: Adapter = field(default_factory=Adapter)
    data: Data = field(default_factory=Data)
    encode: Encode = field(default_factory=Encode)
    flow: Flow = field(default_factory=Flow)
    memory: Memory = field(default_factory=Memory)
    optim: Optim = field(default_factory=Optim)
    sampling: Sampling = field(default_factory=Sampling)
    """Of the previews."""
    track: Track = field(default_factory=Track)
    sweep: Sweep = field(default_factory=Sweep)
    run: str = "train"
    """The run's name: its folder is runs/<run>. The same command again resumes it."""
    seed: int = 0
    steps: int = 1000
    """Optimizer updates."""
    accumulation: int = 1
    """Micro-batches an update."""
    save_every: int = 200
    """Steps between checkpoints; 0 keeps only the last."""
    keep: int = 2
    """Checkpoints kept."""
    validate_every: int = 100
    """Steps between validations; 0 validates at the start and the end."""
    validation_levels: int = 8
    """Noise levels at which each held-out picture is measured."""
    preview_every: int = 0
    """Steps between previews; 0 draws one at the end."""
    previews: list[str] = field(default_factory=list)
    """Prompts of the previews; none draws none. The trigger word is not added."""
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("accumulation", 1), ("keep", 1), ("validation_levels", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {least} or more")
        for name in ("save_every", "validate_every", "preview_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 (only at the end) or more")
        if self.precision.compute_dtype == "fp16" and self.precision.quantized:
            raise ValueError("precision.compute_dtype=fp16 gives NaN when FLUX trains; set it to bf16")
