"""Reference pictures (edit training): whether the samples' ones fit the checkpoint and the settings."""

from collections.abc import Sequence

from infer.checkpoint.family import takes_references
from infer.checkpoint.model import Model
from infer.program.no_effect import refuse_idle
from infer.sample.edit import untaught
from train.data.dataset import Data
from train.data.source import Sample


def refuse_without_references(data: Data, samples: Sequence[Sample]) -> None:
    """Refuse settings of references where no sample has one."""
    if not any(sample.references for sample in samples):
        reason = "no sample has references; name their folders in data.references, or the files in metadata.jsonl"
        names = ("reference_resolution", "reference_dropout", "teach_references")
        refuse_idle(data, "data.", names, reason)


def check_taught(model: Model, data: Data, samples: Sequence[Sample]) -> None:
    """See that the checkpoint was trained with references, if samples have some, or that it is to be taught.

    Raises:
        ValueError: it was not; or it was, and data.teach_references has no effect.
    """
    with_references = next((sample for sample in samples if sample.references), None)
    if with_references is None:
        return
    known = takes_references(model)
    if not known and not data.teach_references:
        raise ValueError(
            f"{with_references.name} has references, but {untaught(model)}; set data.teach_references=true to have the "
            "adapter learn what they are for, which takes more steps"
        )
    if known and data.teach_references:
        reason = f"{model.path} was trained with references"
        refuse_idle(data, "data.", ("teach_references",), reason)
