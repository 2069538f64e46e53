"""Write docs/settings.md: every setting of every command, from the texts below their fields and the YAML files.

python scripts/settings_page.py    # after a setting was added or said otherwise; a test compares
"""

import argparse
import importlib
import re
import sys
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from infer.program.atomic import replace_file
from infer.program.docstrings import field_docs
from infer.program.help import Group, groups_of, shown
from infer.program.literal import read_text_literally
from infer.program.paths import CONFIGS, ROOT

PAGE = ROOT / "docs" / "settings.md"
HEAD = """# All settings

Made by `python scripts/settings_page.py` from the texts in the code; `python train/train.py --help` shows the first
sentence of each. Settings are written `name=value`, as in `python train/train.py run=mine optim.lr=2e-4`. A group's
file is chosen by the group's name (`memory=lean`), and what is in it can be set one by one (`memory.keep=nothing`).

- Text is taken as it is typed: `data.path=photosété`, `data.trigger=1e3`. What has spaces is put into quotation marks
  for the shell: `'data.suffix=, in ink'`.
- A list stands in brackets: `data.resolution=[512,768]`. A prompt with a comma needs quotation marks that the shell
  leaves: `previews='["sks, a cup", "a dog"]'`; or write a prompt a line into a file: `previews=@prompts.txt`.
- `null` is none. `'run="null"'` is the word.
"""


def commands() -> list[tuple[Path, str, Any]]:
    """Each command with a config: its file, the config's name, and its dataclass."""
    found = []
    for file in sorted([*(ROOT / "train").glob("*.py"), *(ROOT / "infer").glob("*.py")]):
        called = re.search(r"^    run_command\(\"(\w+)\", (\w+), ", file.read_text(), re.MULTILINE)
        if called is not None:
            relative = file.relative_to(ROOT)
            module = importlib.import_module(".".join(relative.with_suffix("").parts))
            found.append((relative, called[1], getattr(module, called[2])))
    return sorted(found, key=lambda each: each[0].name != "train.py")


def composed(config: str, schema: Any) -> dict[str, Any]:
    """A command's defaults in plain containers."""
    ConfigStore.instance().store(name=f"{config}_schema", node=schema)
    read_text_literally(lambda: schema)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        values: Any = OmegaConf.to_container(compose(config), resolve=True)
    GlobalHydra.instance().clear()
    return values  # type: ignore[no-any-return]


def cell(text: str) -> str:
    """Text in a cell of a table."""
    return text.replace("|", "\\|")


def table(group: Group, values: dict[str, Any]) -> list[str]:
    """The settings of a group with their defaults."""
    docs = field_docs(group.kind)
    inner: Any = values
    for part in filter(None, group.name.split(".")):
        inner = inner[part]
    lines = ["| setting | default | |", "|---|---|---|"]
    for name in group.settings:
        default = shown(inner[name]).replace(f"{ROOT}/", "")
        default = default if len(default) < 60 else f"{default[:59]}…"
        lines.append(f"| `{f'{group.name}.{name}'.lstrip('.')}` | `{cell(default)}` | {cell(docs[name])} |")
    return lines


def page() -> str:
    """The page's text."""
    lines = [HEAD]
    before: dict[tuple[Any, str], str] = {}  # where a group was shown
    for file, config, schema in commands():
        values = composed(config, schema)
        own, *groups = groups_of(schema)
        if (schema, "") in before:
            lines += [
                f"## {file.name}",
                "",
                f"All settings of [{before[schema, '']}](#{link(before[schema, ''])}).",
                "",
            ]
            continue
        before[schema, ""] = file.name
        lines += [f"## {file.name}", "", f"`python {file}`: {' '.join(schema.__doc__.split())}", ""]
        lines += [*table(own, values), ""]
        same = []
        for group in groups:
            there = before.setdefault((group.kind, group.name), file.name)
            if there != file.name:
                same.append(f"`{group.name}` ([{there}](#{link(there, group.name)}))")
                continue
            lines += [f"### {file.name}: {group.name}", "", " ".join(group.kind.__doc__.split()), ""]
            if group.options:
                chosen = ", ".join(f"`{group.name}={each}`" for each in group.options)
                lines += [f"Files: {chosen}.", ""]
            lines += [*table(group, values), ""] if group.settings else []
        lines += [f"As above: {', '.join(same)}.", ""] if same else []
    return "\n".join(lines).rstrip() + "\n"


def link(name: str, group: str = "") -> str:
    """The address of a heading on the page."""
    return re.sub(r"[^\w -]", "", f"{name} {group}".strip().lower()).replace(" ", "-")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    replace_file(PAGE, lambda path: path.write_text(page()))
    print(f"written: {PAGE.relative_to(ROOT)}")
