"""An adapter file of any format -> a file of another program's, or PEFT's folder."""

from pathlib import Path

from infer.adapter.error_init import minus, read_start
from infer.adapter.read import find_adapter, read_notes, read_pairs
from infer.adapter.write import write_pairs


def convert_file(path: str, form: str, out: Path, drop_text_encoder: bool) -> Path:
    """Write the adapter at `path` in a format to `out`; returns what plain programs are given.

    Raises:
        ValueError: the adapter cannot be read, or not written in that format.
    """
    notes = read_notes(find_adapter(path))
    pairs = read_pairs(path, drop_text_encoder)
    start = read_start(path, lambda layer: None)
    if start is not None:  # other programs have not the weights that it makes up for, nor its start.safetensors
        pairs = minus(pairs, start.elsewhere)
        notes |= {"adapter": notes["adapter"] | {"init": "default"}}
        print(
            f"{path} starts from a quantization error (init={start.init}): written is what it has learned beyond that"
        )
    written = write_pairs(pairs, form, out, notes)
    ranks = sorted({pair.down.shape[0] for pair in pairs.values()})
    print(f"{len(pairs)} layers of rank {', '.join(map(str, ranks))} as {form} in {written}")
    return written
