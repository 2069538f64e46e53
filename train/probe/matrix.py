"""The figure of a transfer: heat maps of trained at x run at."""

from collections.abc import Sequence
from pathlib import Path

from infer.report.plot import Heat
from infer.report.png import save_heats
from train.probe.transfer_summary import TransferSummary


def draw_matrix(summary: Sequence[TransferSummary], path: Path) -> None:
    """A PNG: the loss, and what it costs not to have trained where the adapter runs; cells say mean and 95 % limits."""
    losses = {(entry.trained, entry.run): entry for entry in summary if entry.figure == "loss"}
    names = list(dict.fromkeys(run for _, run in losses))

    def heat(title: str, key: str) -> Heat:
        values = [[getattr(losses[trained, run], key) for run in names] for trained in names]
        return Heat(title, names, names, values, "run at", "trained at")

    title = "loss above that of the adapter trained where it runs"
    save_heats(path, [heat("validation loss", "mean"), heat(title, "cost")], signed={1})
