"""The pages: what they quote stands in the code, and their links, settings and configs are there."""

import ast
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from infer.program.paths import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
CODE = [file for folder in ("infer", "train") for file in sorted((ROOT / folder).rglob("*.py"))]


def said(node: ast.AST) -> str | None:
    """A text in the code, with … for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)  # type: ignore[misc]
    return None


TEXTS = "\n".join(text for file in CODE for node in ast.walk(ast.parse(file.read_text())) if (text := said(node)))
QUOTED = re.findall(r"^- `(.+)`$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)


def test_there_are_quotes() -> None:
    assert len(QUOTED) > 30


@pytest.mark.parametrize("quote", QUOTED)
def test_every_error_text_of_ours_stands_in_the_code(quote: str) -> None:
    assert quote in TEXTS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith(("https://", "#")):
            assert (page.parent / target.split("#")[0]).exists(), target
    for file in re.findall(
        r"(?:tests/)?(?:configs|scripts|docs|train|infer)/[\w/.-]+\.(?:yaml|py|sh|md)\b", page.read_text()
    ):
        assert (ROOT / file).exists(), file


def test_every_page_is_listed() -> None:
    listed = set(re.findall(r"\(([\w-]+\.md)\)", (DOCS / "README.md").read_text()))
    assert {page.name for page in DOCS.glob("*.md")} - {"README.md"} <= listed


def commands() -> list[tuple[str, str]]:
    """(page, command) of the pages' calls of train/train.py and the like, joined over their line ends."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in re.sub(r" *\\\n\s*", " ", block).splitlines():
                if re.search(r"(train|infer)/(train|cache|look|compare|save)\.py ", line) and "..." not in line:
                    found.append((page.name, re.sub(r"\$\w+", "1", line).split("  #")[0].strip()))
    return found


@pytest.mark.parametrize("page, command", commands())
def test_commands_compose(page: str, command: str) -> None:
    import shlex

    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    import train.cache
    import train.look
    import train.train
    from infer import compare, save

    schemas = {
        "train": train.train.Train, "cache": train.cache.Fill, "look": train.look.Look,
        "compare": compare.Compare, "save": save.Save,
    }  # fmt: skip
    words = shlex.split(command)
    place = next(i for i, word in enumerate(words) if re.fullmatch(r"(train|infer)/\w+\.py", word))
    root = Path(words[place]).stem
    ConfigStore.instance().store(name=f"{root}_schema", node=schemas[root])
    overrides = [word for word in words[place + 1 :] if word != "--help"]
    if "-m" in overrides:
        pytest.skip("a sweep")
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        OmegaConf.to_object(compose(root, overrides))
    GlobalHydra.instance().clear()
