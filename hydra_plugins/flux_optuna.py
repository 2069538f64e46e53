"""Optuna as Hydra's sweeper: `hydra/sweeper=optuna`.

hydra-optuna-sweeper 1.3.0 requires Optuna 2.10, which cannot store a study with a current SQLAlchemy. This sweeper
takes any number of objectives from `sweep.objectives`. It keeps the study in a file: the same command again continues
it. Optuna hears of failed points as failed trials.
"""

from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf


def distribution(override: Override) -> Any:
    """Optuna's distribution for `choice(a,b)` or `a,b`, `range(1,9)` and `interval(1e-5,1e-3)`.

    `tag(log, interval(...))` draws the logarithm evenly.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    if isinstance(value, IntervalSweep):
        low, high = value.start, value.end
        assert low is not None and high is not None
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log="log" in value.tags)
        return FloatDistribution(float(low), float(high), log="log" in value.tags)
    # range() and choice() alike: each value as it is written on the command line
    return CategoricalDistribution(tuple(override.sweep_string_iterator()))


class OptunaSweeper(Sweeper):
    """Runs `n_jobs` points at a time until `n_trials` have finished, those of earlier commands included."""

    def __init__(self, n_trials: int, n_jobs: int, sampler: Any, params: DictConfig | None) -> None:
        self.n_trials, self.n_jobs, self.sampler = n_trials, n_jobs, sampler
        self.params: dict[str, str] = {str(key): str(value) for key, value in (params or {}).items()}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
        from optuna.trial import TrialState

        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        given = [f"{key}={value}" for key, value in self.params.items()] + arguments
        last = {override.get_key_element(): override for override in parser.parse_overrides(given)}
        space = {key: distribution(override) for key, override in last.items() if override.is_sweep_override()}
        fixed = [str(override.input_line) for key, override in last.items() if key not in space]
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = instantiate(self.sampler) if isinstance(self.sampler, DictConfig) else self.sampler
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(folder / "optuna.journal"))),
            sampler=sampler,
            study_name="sweep",
            directions=list(self.config.sweep.objectives.values()),
            load_if_exists=True,
        )
        # trials that an earlier command left running or failed come first: their points resume where they stopped
        done = [trial.params for trial in study.get_trials(states=(TrialState.COMPLETE,))]
        for trial in study.get_trials(states=(TrialState.RUNNING, TrialState.FAIL)):
            if trial.state is TrialState.RUNNING:
                study.tell(trial.number, state=TrialState.FAIL)
            if trial.params not in done and trial.params.keys() == space.keys():
                study.enqueue_trial(trial.params)
                done.append(trial.params)
        left, number = self.n_trials - len(study.get_trials(states=(TrialState.COMPLETE,))), 0
        while left > 0:
            trials = [study.ask(space) for _ in range(min(left, self.n_jobs))]
            jobs = [[*fixed, *(f"{key}={value}" for key, value in trial.params.items())] for trial in trials]
            returns = self.launcher.launch(jobs, initial_job_idx=number)
            for trial, job in zip(trials, returns, strict=True):
                values = job.return_value
                study.tell(trial, values, state=TrialState.FAIL if values is None else TrialState.COMPLETE)
            left, number = left - len(trials), number + len(trials)
        return None
