"""Ray as Hydra's launcher: `hydra/launcher=ray`.

hydra-ray-launcher 1.2.2 requires cloudpickle below 3, while joblib 1.6 requires 3, and installs an AWS client; this
launcher needs `ray` alone. A point is a task of Ray: it waits for its share of the cluster, and sees its own GPUs only.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict


def run_task(
    context: HydraContext,
    config: DictConfig,
    task: TaskFunction,
    state: Any,
    cwd: str,
    overrides: list[str],
    number: int,
) -> JobReturn:
    """Run one point in a worker of Ray. cwd: the folder of the sweep's command, which all machines share."""
    os.chdir(cwd)
    setup_globals()
    Singleton.set_state(state)
    composed = context.config_loader.load_sweep_config(config, overrides)
    with open_dict(composed):
        composed.hydra.job.id = f"{composed.hydra.job.name}_{number}"
        composed.hydra.job.num = number
    HydraConfig.instance().set_config(composed)
    return run_job(
        hydra_context=context,
        task_function=task,
        config=composed,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )


class RayLauncher(Launcher):
    """`init`: arguments of ray.init, such as {address: auto}; `task`: of ray.remote, such as {num_gpus: 1}."""

    def __init__(self, init: DictConfig, task: DictConfig) -> None:
        self.init: Any = OmegaConf.to_container(init, resolve=True)
        self.task: Any = OmegaConf.to_container(task, resolve=True)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        import ray

        setup_globals()
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        if not ray.is_initialized():
            ray.init(**self.init)
        remote = ray.remote(**self.task)(run_task) if self.task else ray.remote(run_task)
        shared = (self.context, self.config, self.function, Singleton.get_state(), str(Path.cwd()))
        common = [ray.put(value) for value in shared]
        tasks = [
            remote.remote(*common, list(overrides), initial_job_idx + i) for i, overrides in enumerate(job_overrides)
        ]
        returns: list[JobReturn] = ray.get(tasks)
        return returns
