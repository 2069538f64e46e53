"""The settings of a sweep: train/train.py's group `sweep`."""

from dataclasses import dataclass, field

from infer.program.bounds import check_most

DIRECTIONS = ("minimize", "maximize")


@dataclass
class Sweep:
    """What `-m` does with each point. A single run reads none of it."""

    compare: list[str] | None = field(default_factory=list)
    """Options of infer/compare.py, as on its command line; null: points are trained, not compared. Unless the options
    name an experiment, the prompts are those of `previews` and `edits`, and other settings those of the training."""
    launch: list[str] = field(default_factory=list)
    """The command that starts train/train.py, such as [accelerate, launch, --config_file, F]; empty: python."""
    gpus: list[int] | None = None
    """GPUs of this machine: each point gets one that is free. null leaves the choice to the launcher."""
    objectives: dict[str, str] = field(
        default_factory=lambda: {"validation_loss": "minimize", "memory_gib": "minimize", "seconds": "minimize"}
    )
    """Figures of a point, and whether to minimize or maximize each: the axes of the report's Pareto front, and the
    objectives of an optimizing sweeper. The first one decides which point is the best."""
    keys: list[str] | None = None
    """Settings whose values name the points; null: those with several values."""

    def __post_init__(self) -> None:
        check_most(self, "sweep.", gpus=10**4)
        if not self.objectives:
            raise ValueError("sweep.objectives is empty; name a figure, as in {validation_loss: minimize}")
        for name, direction in self.objectives.items():
            if direction not in DIRECTIONS:
                raise ValueError(f"sweep.objectives.{name} is {direction!r}; choose one of {', '.join(DIRECTIONS)}")
        if self.gpus and min(self.gpus) < 0:
            raise ValueError(f"sweep.gpus is {self.gpus}; GPUs are counted from 0")
        if self.gpus == []:
            raise ValueError("sweep.gpus is []; name GPUs as in [0,1], or set it to null")
