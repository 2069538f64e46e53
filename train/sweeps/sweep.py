"""Sweeps: `train/train.py -m` with several values for some settings trains and compares a point for each combination.

    python train/train.py -m run=mine data.path=my_pictures precision=nf4,int8 adapter.rank=4,16,64 seed=0,1,2

Each point is a run, runs/mine/<its values>, made by the commands that a user would type (train/train.py,
infer/compare.py), each in a process of its own. So a point that dies takes no other with it, its memory is measured
apart, and `accelerate launch` can start several processes for it. The process that sweeps holds no model and needs no
torch. The same command again skips points that are done, resumes those that were interrupted, and tries those again
that failed.
"""

import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from infer.program.errors import INTERRUPTED, explained
from infer.program.help import print_help
from infer.program.literal import literal_arguments, read_text_literally
from infer.program.paths import CONFIGS, INSTALLED, ROOT, SHIPPED
from infer.program.prompts import prompt_notes, read_prompt_files
from train.run.config import Train
from train.run.sweep import Sweep

OmegaConf.register_new_resolver("root", lambda: str(SHIPPED), replace=True)


read_text_literally(lambda: Train)  # here, since every process that runs points imports this file


def asked(arguments: list[str]) -> bool:
    """Whether a command line asks for a sweep."""
    return bool({"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments))


def varied(overrides: list[str]) -> list[str]:
    """The settings to which a command line gives several values."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    return [override.get_key_element().lstrip("+") for override in parsed if override.is_sweep_override()]


def point(config: DictConfig) -> tuple[float, ...] | None:
    """Run one point: Hydra's task. Returns the objectives, or None if it failed; its record and the report say why."""
    from train.sweeps.point import run_point

    job = HydraConfig.get()
    plain: Any = OmegaConf.to_container(config, resolve=True)
    keys = list(dict.fromkeys([*(plain["sweep"]["keys"] or []), *(job.sweeper.get("params") or {})]))
    config_dirs = [source.path for source in job.runtime.config_sources if source.provider == "command-line"]
    return run_point(plain, list(job.overrides.task), keys, job.job.num, config_dirs)


def preview_config(arguments: Any) -> Any:
    """The config of the options with one value: it has the sweep's name and settings before any point runs."""
    parser = OverridesParser.create()
    single = [o for o in arguments.overrides if not parser.parse_override(o).is_sweep_override()]
    search = [f"hydra.searchpath=[{Path(arguments.config_dir).resolve()}]"] if arguments.config_dir else []
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose("train", [*single, *search]), resolve=True)


def main() -> None:
    """Sweep, then report. Exits with code 2 if a point failed or the sweep cannot start."""
    from infer.program.run_names import check_run_name
    from train.sweeps.report import conclude

    # without types: the commands of a point check their settings themselves
    ConfigStore.instance().store(name="train_schema", node={})
    with explained():
        sys.argv[1:] = read_prompt_files(sys.argv[1:], Train)
        notes = prompt_notes(sys.argv[1:], Train)
        sys.argv[1:] = literal_arguments(sys.argv[1:], Train, sweep=True)
        for note in notes:
            print(note)
    arguments = get_args_parser().parse_args()
    if arguments.help:
        with explained():
            swept = varied(arguments.overrides)
            single = [each for each in arguments.overrides if each.partition("=")[0].lstrip("+") not in swept]
            print_help(
                "train", Train, [*single, *(["--config-dir", arguments.config_dir] if arguments.config_dir else [])]
            )
        return
    with explained():
        try:
            keys = varied(arguments.overrides)
            config = preview_config(arguments)
        except HydraException as error:
            raise ValueError(" ".join(str(error).split())) from error
        if "run" in keys:
            raise ValueError("run has several values, but it names the sweep's folder; give it one value")
        folder = check_run_name(config["run"])
        Sweep(**config["sweep"])
    if not any(override.startswith("sweep.keys=") for override in arguments.overrides):
        # beside the other options, since argparse takes positional arguments from one row alone
        position = sys.argv.index(arguments.overrides[0]) if arguments.overrides else len(sys.argv)
        sys.argv.insert(position, f"sweep.keys=[{','.join(keys)}]")
    if not INSTALLED:  # what a launcher starts, on whichever machine, finds this checkout and its plugins
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")(point)()
    except KeyboardInterrupt:  # its points have heard it too, and save
        print(f"\nstopped by Ctrl-C; done points are kept in {folder}, the same command goes on", file=sys.stderr)
        sys.exit(INTERRUPTED)
    with explained():
        conclude(folder)
