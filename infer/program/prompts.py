"""Prompts on a command line: from a file (`prompts=@prompts.txt`), and a note where the shell has taken the quotation
marks off, so that a comma made two prompts of one."""

from pathlib import Path
from typing import Any, get_origin

from infer.program.absent import meant
from infer.program.literal import inside, kind_of, quote, required
from infer.program.paths import expanded

PROMPTS = ("prompts", "previews", "unrelated", "held_out")
"""Settings that are lists of prompts."""


def _given(argument: str, schema: Any) -> tuple[str, str] | None:
    """Name and value of an argument that sets a list of prompts."""
    name, _, value = argument.partition("=")
    if name not in PROMPTS or get_origin(required(kind_of(schema, name))[0]) is not list:
        return None
    return name, value


def read_prompt_files(arguments: list[str], schema: Any) -> list[str]:
    """A command line in which @FILE, as the value of a list of prompts, is replaced by the file's lines.

    Raises:
        ValueError: the file is not there, is no text, or holds no line.
    """
    return [_read(argument, schema) for argument in arguments]


def _read(argument: str, schema: Any) -> str:
    found = _given(argument, schema)
    if found is None or not found[1].startswith("@"):
        return argument
    name, file = found[0], Path(expanded(found[1][1:]))
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except FileNotFoundError:
        mend = meant(str(file), "write its path behind the @")
        raise ValueError(f"{argument}: there is no file {str(file)!r}; {mend}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{argument}: {file} cannot be read ({error}); save it as a text file in UTF-8") from error
    if not lines:
        raise ValueError(f"{argument}: {file} holds no prompt; write one a line")
    # in quotation marks whatever they hold, and the begin of an interpolation as text
    return f"{name}=[{','.join(quote(line.replace('${', chr(92) + '${'), True) for line in lines)}]"


def prompt_notes(arguments: list[str], schema: Any) -> list[str]:
    """A note for each list that has several prompts and no quotation marks: was it one, with a comma?"""
    notes = []
    for found in filter(None, (_given(argument, schema) for argument in arguments)):
        name, value = found
        parts = inside(value, "[]") or []
        if len(parts) > 1 and not any(part[0] in "'\"" for part in parts):
            several = " | ".join(parts)
            notes.append(
                f"note: {name} has {len(parts)} prompts: {several}. If a comma belongs to a prompt, write "
                f"{name}='[\"{', '.join(parts[:2])}\"]', or a prompt a line in a file and {name}=@prompts.txt"
            )
    return notes
