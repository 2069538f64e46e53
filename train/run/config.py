"""All settings of a training run, as one dataclass; the defaults are in configs/train.yaml."""

import re
from dataclasses import dataclass, field

from infer.adapter.lora import Adapter
from infer.checkpoint.model import Model
from infer.fast.memory import Memory
from infer.program.bounds import MANY, SEED, STEPS, check_most
from infer.program.no_effect import refuse_idle
from infer.quantize.precision import Precision
from infer.sample.edit import Edit, check_once
from infer.sample.generate import Sampling
from infer.score.judges import UNRELATED, Networks
from train.data.cloud import is_cloud
from train.data.dataset import Data
from train.latents.settings import Encode
from train.objective.flow_matching import Flow
from train.objective.optim import Optim
from train.objective.preservation import Preserve
from train.run.early_stop import SCORED, EarlyStop
from train.run.sweep import Sweep
from train.trackers.options import Track

UNSCORED = "scores_every is 0, so that nothing is scored"
MAY_CHANGE = {"may_change": True}  # marks a setting that a resumed run may change: what is learned stays the same


@dataclass
class Train:
    """One training run. A resumed run must repeat every setting but `steps` and those marked as ones that may change;
    paths are compared by what they lead to (train/state/identity.py)."""

    model: Model = field(default_factory=Model)
    precision: Precision = field(default_factory=Precision)
    adapter: Adapter = field(default_factory=Adapter)
    data: Data = field(default_factory=Data)
    encode: Encode = field(default_factory=Encode)
    flow: Flow = field(default_factory=Flow)
    memory: Memory = field(default_factory=Memory, metadata=MAY_CHANGE)
    optim: Optim = field(default_factory=Optim)
    sampling: Sampling = field(default_factory=Sampling, metadata=MAY_CHANGE)
    """Of the previews."""
    track: Track = field(default_factory=Track, metadata=MAY_CHANGE)
    sweep: Sweep = field(default_factory=Sweep, metadata=MAY_CHANGE)
    preserve: Preserve = field(default_factory=Preserve)
    networks: Networks = field(default_factory=Networks, metadata=MAY_CHANGE)
    """Of the scores (`scores_every`)."""
    stop: EarlyStop = field(default_factory=EarlyStop, metadata=MAY_CHANGE)
    run: str = "train"
    """The run's name: its folder is runs/<run>. The same command again resumes it."""
    seed: int = 0
    """Of the adapter's start, the order of the samples, their noise and what is held out."""
    deterministic: bool = field(default=False, metadata=MAY_CHANGE)
    """Give the same bits every time on one kind of GPU, whether the run is stopped or not; false is faster there
    (docs/nothing-lost.md has figures). On a CPU the bits are the same in any case."""
    distilled: bool = False
    """Train on a checkpoint that is distilled to draw in few steps, which is refused otherwise."""
    steps: int = 1000
    """Optimizer updates. A resumed run may ask for another number, not below the step that it has reached."""
    accumulation: int = 1
    """Micro-batches per update."""
    ema: float | None = None
    """Decay of a moving average of the adapter's weights, such as 0.99. The average is validated, drawn and saved
    beside the weights themselves; null: no average."""
    save_every: int = field(default=200, metadata=MAY_CHANGE)
    """Steps between checkpoints; 0: by time and at the end alone."""
    save_minutes: float = field(default=10.0, metadata=MAY_CHANGE)
    """Minutes after which another checkpoint is written in any case, a run's first after one minute; 0: never."""
    keep: int = field(default=2, metadata=MAY_CHANGE)
    """How many of the newest checkpoints are kept."""
    keep_best: int = field(default=0, metadata=MAY_CHANGE)
    """How many of the checkpoints with the lowest validation loss (of the averaged weights, if there are any) are kept
    besides; above 0, a checkpoint is written at each validation."""
    resume: str | None = field(default=None, metadata=MAY_CHANGE)
    """A checkpoint's name, such as step-000200, to go on from; null: the newest that is whole."""
    stop_after_bad: int = field(default=5, metadata=MAY_CHANGE)
    """After this many updates in a row whose loss or gradient is not finite the run stops; each is left out."""
    spikes: float = field(default=6.0, metadata=MAY_CHANGE)
    """A loss this many (robust) standard deviations above the last ones is recorded with its samples; 0: none."""
    validate_every: int = field(default=100, metadata=MAY_CHANGE)
    """Steps between validations; 0 validates at the start and the end."""
    validation_levels: int = field(default=8, metadata=MAY_CHANGE)
    """Noise levels at which each held-out picture is measured. With another number the figures begin anew."""
    preview_every: int = field(default=250, metadata=MAY_CHANGE)
    """Steps between previews; 0 draws one at the end."""
    previews: list[str] | None = field(default=None, metadata=MAY_CHANGE)
    """Prompts of the previews, to which the trigger word is not added; null takes the captions of two held-out
    pictures, with it; an empty list draws none."""
    edits: list[Edit] = field(default_factory=list, metadata=MAY_CHANGE)
    """More previews, with reference pictures, as in `edits=[{prompt: make it blue, references: [before.png]}]`. Where
    previews is null, those of held-out pictures are drawn with the references of these."""
    scores_every: int = field(default=0, metadata=MAY_CHANGE)
    """Steps between scorings, at which the previews' prompts and `unrelated` are drawn and judged: likeness, copying
    and drift. Each is a validation too; 0: none."""
    unrelated: list[str] = field(default_factory=lambda: list(UNRELATED), metadata=MAY_CHANGE)
    """Prompts that the adapter has nothing to do with: how far a scoring finds them moved is the drift."""
    push: str | None = field(default=None, metadata=MAY_CHANGE)
    """The repository owner/name on the Hub to which the finished adapter and its card are pushed, private if it is new;
    null: none."""
    mirror: str | None = field(default=None, metadata=MAY_CHANGE)
    """An address in the cloud (s3://bucket/runs, gs://, hf://) to which the run's folder is copied while it trains, and
    from which it is brought back where it is not here; null: none."""
    device: str = field(default="auto", metadata=MAY_CHANGE)
    """auto (the GPU if there is one), cpu, cuda or cuda:1."""

    def __post_init__(self) -> None:
        check_most(
            self,
            "",
            seed=SEED,
            steps=STEPS,
            accumulation=10**4,
            save_every=MANY,
            save_minutes=MANY,
            keep=MANY,
            keep_best=MANY,
            stop_after_bad=MANY,
            spikes=MANY,
            validate_every=MANY,
            validation_levels=10**4,
            preview_every=MANY,
            scores_every=MANY,
        )
        for name, least in (
            ("steps", 1),
            ("accumulation", 1),
            ("keep", 1),
            ("keep_best", 0),
            ("stop_after_bad", 1),
            ("validation_levels", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {least} or more")
        for name in ("save_every", "validate_every", "preview_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 (only at the end) or more")
        if self.scores_every < 0:
            raise ValueError(f"scores_every is {self.scores_every}; it must be 0 (never) or more")
        self._check_scores()
        for name in ("save_minutes", "spikes"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 (never) or more")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema is {self.ema}; it must be above 0 and below 1, such as 0.99, or null for none")
        if self.resume is not None and not re.fullmatch(r"step-\d+", self.resume):
            raise ValueError(f"resume is {self.resume!r}; give a checkpoint's name, such as step-000200, or null")
        if self.push is not None and self.push.count("/") != 1:
            raise ValueError(f"push is {self.push!r}; write owner/name, or null to keep the adapter here")
        check_once(self.edits)
        if self.mirror is not None and not is_cloud(self.mirror):
            raise ValueError(f"mirror is {self.mirror!r}, no address; write s3://bucket/runs, gs://..., hf://...")
        check_half(self.precision)

    def _check_scores(self) -> None:
        """Raises:
        ValueError: a setting of the scores has no effect.
        """
        if self.stop.loss and not self.validate_every and not self.scores_every:
            raise ValueError(
                f"stop.loss is {self.stop.loss}, and validate_every=0 validates at the end alone; set "
                "validate_every=100, or stop.loss=0"
            )
        if not self.scores_every:
            refuse_idle(self, "", ("unrelated",), UNSCORED)
            refuse_idle(self.stop, "stop.", SCORED, UNSCORED)
            return
        refuse_idle(self.networks, "networks.", ("lpips", "image_reward"), "training scores by DINO or CLIP alone")
        if self.previews == [] and not self.edits:
            raise ValueError(
                f"scores_every is {self.scores_every}, and previews=[] leaves no prompts to draw; set previews=null, "
                "or scores_every=0"
            )
        if self.stop.likeness and self.networks.dino is None and self.networks.clip is None:
            raise ValueError(
                f"stop.likeness is {self.stop.likeness}, and no network judges likeness; set networks=hub, or "
                "networks.dino to a folder"
            )
        if self.stop.drift is not None and not self.unrelated:
            raise ValueError(f"stop.drift is {self.stop.drift:g}, and unrelated is []; give prompts, or set it to null")


def check_half(precision: Precision) -> None:
    """See that the precision can be trained with products in fp16, if it has them (infer/fast/half.py).

    Raises:
        ValueError: it is LLM.int8, whose own products lose the gradients in fp16.
    """
    if precision.llm_int8 and precision.dtype_name == "fp16":
        raise ValueError(
            "precision.llm_int8=true multiplies gradients in fp16, in which they vanish, where compute_dtype is fp16 "
            "(as on every card without bf16); set precision.llm_int8=false"
        )
