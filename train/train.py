"""Train a LoRA adapter on a quantized FLUX.1 transformer.

    python train/train.py model=dev precision=nf4 data.path=my_pictures data.resolution=512 run=mine

Writes runs/<run>/: config.yaml, metrics.jsonl, previews/, checkpoints/ and adapter/pytorch_lora_weights.safetensors,
which plain diffusers loads with `pipeline.load_lora_weights("runs/<run>/adapter")`. The same command again resumes;
`-m` with several values for some settings sweeps (train/sweep.py). Several processes are started by `accelerate
launch`; one needs no launcher.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from train import sweep

    if sweep.asked(sys.argv):  # its points are processes of their own: nothing below is needed here
        sweep.main()
        sys.exit()

from infer.command import run_command
from infer.quiet import ready
from train.check import check_run
from train.config import Train
from train.data import check_left, read_samples
from train.stop import Stop


def train(job: Train) -> Path:
    """The whole run; returns the adapter's folder. Stopped by a signal it leaves by SystemExit, with code 3."""
    with Stop() as stop:
        folder = check_run(job)
        samples, skipped = read_samples(job.data)
        check_left(job.data, samples, skipped)
        ready()
        from train.repeat import repeating
        from train.run import run

        with repeating(job.deterministic):
            return run(job, folder, samples, skipped, stop)


if __name__ == "__main__":
    run_command("train", Train, train)
