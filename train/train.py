"""Train a LoRA adapter on a quantized FLUX transformer.

    python train/train.py model=dev precision=nf4 data.path=my_pictures data.resolution=512 run=mine

Writes runs/<run>/: config.yaml, metrics.jsonl, previews/, checkpoints/ and adapter/pytorch_lora_weights.safetensors,
which plain diffusers loads with `pipeline.load_lora_weights("runs/<run>/adapter")`. The same command again resumes;
`-m` with several values for some settings sweeps (train/sweeps/sweep.py). `accelerate launch` starts several processes;
one process needs no launcher.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from train.sweeps import sweep

    if sweep.asked(sys.argv):  # it starts a process for each point: nothing below is needed here
        sweep.main()
        sys.exit()

from infer.program.command import run_command
from infer.program.quiet import ready
from train.data.dataset import sources_of
from train.data.references import check_taught
from train.data.samples import check_left, read_samples
from train.objective.preservation import check_preserved
from train.run.config import Train
from train.run.names import check_names, check_resumed
from train.state.foreign import check_foreign
from train.state.identity import check_recorded
from train.state.mirror import mirrored
from train.state.signals import StopSignals


def train(job: Train) -> Path:
    """The whole run; returns the adapter's folder. If a signal stops it, it leaves by SystemExit with code 3."""
    with StopSignals() as stop:
        folder = check_names(job)
        if job.mirror is None:
            check_recorded(job, folder)
        else:  # which brings the run back first, and copies the folder in the end
            check_foreign(folder, whole=False)
        samples, skipped = read_samples(job.data)
        check_left(job.data, samples, skipped)
        check_taught(job.model, job.data, samples)
        own = (sample for sample in samples if not sources_of(job.data)[sample.source].prior)
        prefix, suffix = job.data.prefix, job.data.suffix
        captions = (f"{prefix}{text}{suffix}" for sample in own for text in sample.captions)
        check_preserved(job.preserve, job.data.trigger, captions)
        with mirrored(job.mirror, job.run, folder) as brought_back:
            if brought_back:
                check_resumed(job, folder)
                check_recorded(job, folder)
            ready()
            from train.loop.repeat import repeating
            from train.loop.run import run

            with repeating(job.deterministic):
                return run(job, folder, samples, skipped, stop)


if __name__ == "__main__":
    run_command("train", Train, train)
