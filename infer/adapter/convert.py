"""An adapter file of any format -> a file of another program's, or PEFT's folder."""

from pathlib import Path
from typing import Any

from infer.adapter.error_init import minus, read_start
from infer.adapter.factors import NAMES, Factors
from infer.adapter.read import find_adapter, no_lora, read_adapter, read_notes, read_whole
from infer.adapter.write import write_factors, write_pairs


def convert_file(path: str, form: str, out: Path, drop_text_encoder: bool) -> Path:
    """Write the adapter at `path` in a format to `out`; returns what plain programs are given.

    Raises:
        ValueError: the adapter cannot be read, or not written in that format.
    """
    notes = read_notes(find_adapter(path))
    pairs = read_adapter(path, drop_text_encoder) if form != "lycoris" else read_whole(path, drop_text_encoder)
    if isinstance(pairs, Factors):
        return convert_factors(path, pairs, form, out, notes)
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


def convert_factors(path: str, factors: Factors, form: str, out: Path, notes: dict[str, Any]) -> Path:
    """Write LoKr or LoHa in LyCORIS' names.

    Raises:
        ValueError: another format is asked for, or it is OFT.
    """
    if factors.kind == "oft" and form == "lycoris":
        raise ValueError(
            f"{path} is OFT of inputs, as PEFT and OneTrainer have it, and LyCORIS' OFT is of outputs: neither can be "
            "written as the other; the file itself is what OneTrainer writes, or merge it (infer/merge.py)"
        )
    if form != "lycoris":
        also = "give to=lycoris, or " if factors.kind != "oft" else ""
        raise ValueError(f"{path} is {no_lora(factors)}; {also}merge it into the weights (infer/merge.py)")
    written = write_factors(factors, out, notes)
    print(f"{len(factors.layers)} layers of {NAMES[factors.kind]} as lycoris in {written}")
    return written
