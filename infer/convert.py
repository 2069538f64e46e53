"""Write an adapter file in another program's format.

    python infer/convert.py adapter.path=runs/mine/adapter to=kohya out=mine-kohya.safetensors
    python infer/convert.py adapter.path=from_the_web.safetensors to=diffusers out=adapters/from_the_web

The adapter may be in any format that infer/adapter/read.py reads; no model is loaded.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from infer.adapter.read import FILE, find_adapter, read_notes
from infer.adapter.write import FORMATS
from infer.program.command import run_command
from infer.program.paths import expand
from infer.program.quiet import ready


@dataclass
class Source:
    """The adapter to read."""

    path: str = ""
    """A LoRA file or its folder."""

    def __post_init__(self) -> None:
        expand(self, "path")


@dataclass
class Convert:
    """Which adapter, and what it becomes."""

    adapter: Source = field(default_factory=Source)
    to: str = "diffusers"
    """diffusers, peft, kohya (sd-scripts, musubi-tuner, and most web interfaces), comfyui or ai-toolkit."""
    out: str = ""
    """A .safetensors file that does not exist yet; for PEFT a folder, for diffusers either."""
    drop_text_encoder: bool = False
    """Leave out what the file holds for the text encoder, which is not adapted here."""

    def __post_init__(self) -> None:
        expand(self, "out")
        if self.to not in FORMATS:
            raise ValueError(f"to is {self.to!r}; choose one of {', '.join(FORMATS)}")


def convert(options: Convert) -> Path:
    """Write the file; returns it.

    Raises:
        ValueError: a path is empty or taken, or the adapter cannot be read or written so.
    """
    path = options.adapter.path
    if not path:
        raise ValueError("adapter.path is empty; give a LoRA file or its folder")
    out = Path(options.out)
    if not options.out or out.exists():
        raise ValueError(f"out is {options.out!r}; give a file or folder that does not exist yet")
    file = out.suffix == ".safetensors"
    if file if options.to == "peft" else not file and options.to != "diffusers":
        raise ValueError(
            f"out is {options.out!r}; to={options.to} writes a {'folder' if file else 'file named *.safetensors'}"
        )
    read_notes(find_adapter(path))  # a file that cannot be read is answered before torch is imported
    ready()
    from infer.adapter.convert import convert_file

    out = out if file or options.to == "peft" else out / FILE
    return convert_file(path, options.to, out, options.drop_text_encoder)


if __name__ == "__main__":
    run_command("convert", Convert, convert)
