"""The pages: what they quote stands in the code, and their links, settings and configs are there."""

import ast
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from infer.program.literal import literal_arguments
from infer.program.paths import ROOT
from infer.program.settings import settings as all_settings
from infer.quantize.precision import Precision
from scripts.settings_page import commands as entries

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
SCHEMAS = {str(file): (name, schema) for file, name, schema in entries()}
NAMES = "|".join(Path(file).stem for file in SCHEMAS)
GROUPS = {path.name for path in (ROOT / "configs").iterdir() if path.is_dir()}
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


def test_the_ways_name_what_is_defined_in_their_files() -> None:
    """Each line of a way: a file, the names of what is passed there, a remark in brackets, what is in hand."""
    lines = re.findall(r"^((?:train|infer)/\S+\.py) +([\w.]+(?:, \w+)*)", (DOCS / "ways.md").read_text(), re.MULTILINE)
    assert len(lines) > 40
    for file, names in lines:
        defined = {
            node.name
            for node in ast.walk(ast.parse((ROOT / file).read_text()))
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        for name in names.replace(".", ", ").split(", "):
            assert name in defined, (file, name)


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


def blocks() -> list[tuple[str, str]]:
    """(page, text) of every block of shell on the pages, continued lines joined."""
    return [
        (page.name, re.sub(r" *\\\n\s*", " ", block))
        for page in PAGES
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    ]


def commands() -> list[tuple[str, str]]:
    """(page, command) of the pages' calls of our commands, in blocks and in lines of text."""
    found = []
    for page, block in blocks():
        for line in block.splitlines():
            if re.search(rf"\b(train|infer)/({NAMES})\.py ", line) and "..." not in line and "'[...]'" not in line:
                found.append((page, re.sub(r"\$\w+", "1", line).split("  #")[0].strip()))
    for page in PAGES:
        for text in re.findall(rf"`(python (?:train|infer)/(?:{NAMES})\.py [^`]*)`", page.read_text()):
            if "..." not in text:
                found.append((page.name, " ".join(text.split())))
    return found


@pytest.mark.parametrize("page, block", blocks())
def test_every_block_of_shell_is_shell(page: str, block: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_the_container_is_given_what_is_there() -> None:
    text = (ROOT / "Dockerfile").read_text()
    (extras,) = re.findall(r"-e '\.\[([\w,]+)\]'", text)
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras.split(",")) <= named.keys()
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".venv", "runs", "models", ".git"} <= set(ignored) and "!scripts/tiny/**/*.safetensors" in ignored
    shown = re.sub(r" *\\\n#\s*", " ", text)
    (run,) = [line for line in shown.splitlines() if "docker run" in line]
    composes(run[run.index("python train/train.py") :])


def test_what_is_made_here_is_not_committed(tmp_path: Path) -> None:
    made = ["models/dev-nf4/model_index.json", "mine.safetensors", "runs/mine/adapter/x", "wandb/x"]
    kept = ["scripts/tiny/model/vae/diffusion_pytorch_model.safetensors", "infer/compare.py"]
    ignored = subprocess.run(
        ["git", "check-ignore", "--no-index", *made, *kept], cwd=ROOT, capture_output=True, text=True
    )
    assert ignored.stdout.split() == made


@pytest.mark.parametrize("page, command", commands())
def test_commands_compose(page: str, command: str) -> None:
    composes(command)


def composes(command: str) -> None:
    """See that a command's words, as a shell leaves them, are settings that there are, with possible values."""
    words = shlex.split(command.split("&&")[0])
    place = next(i for i, word in enumerate(words) if re.fullmatch(r"(train|infer)/\w+\.py", word))
    name, schema = SCHEMAS[words[place]]
    overrides = [word for word in words[place + 1 :] if word not in ("--help", "|", "head", "-m")]
    if "-m" in words:  # each setting's first value
        parsed = OverridesParser.create().parse_overrides(literal_arguments(overrides, schema, sweep=True))
        overrides = [each.input_line for each in parsed if not each.is_sweep_override()]
        assert {each.key_or_group for each in parsed if each.is_sweep_override()} <= {*all_settings(schema), *GROUPS}
    else:
        overrides = literal_arguments(overrides, schema)
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        OmegaConf.to_object(compose(name, overrides))
    GlobalHydra.instance().clear()


def test_every_launch_by_accelerate_names_its_config_file() -> None:
    """Without one accelerate begins with a paragraph about values that were not passed."""
    shown = [block for _, block in blocks()] + [
        text
        for page in PAGES
        for text in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.S))
    ]
    launches = [line for text in shown for line in text.splitlines() if re.search(r"accelerate launch .*train", line)]
    assert len(launches) > 3 and all("--config_file" in line for line in launches)


FOREIGN = {  # of other programs, of Hydra's launchers, and examples that stand for a name
    "gradient_accumulation_steps", "init", "init_lora_weights", "lr", "metadata", "name", "precisions.nf4_fp8",
    "precisions.nf4_int8", "scores.name", "sweep.objectives.psnr_base",
}  # fmt: skip


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "settings.md"], ids=lambda page: page.name)
def test_settings_within_lines_of_text_are_there(page: Path) -> None:
    known = {"precisions.nf4." + name for name in all_settings(Precision)} | GROUPS | FOREIGN
    known = known.union(*(all_settings(schema) for _, schema in SCHEMAS.values()))
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for code in re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", text):
        for name in re.findall(r"(?<![\w.\-/\[{,:'\"(])([a-z_]+(?:\.[a-z_0-9]+)*)=", code):
            assert name in known or name.startswith("hydra."), f"{name} in `{code}`"


def scripts_shown() -> list[tuple[str, str, str]]:
    """(page, script, its arguments) of the programs in scripts/ that the pages call, comments left out."""
    found = []
    for page in PAGES:
        text = re.sub(r" *\\\n\s*", " ", page.read_text())
        for file, rest in re.findall(r"python3? (scripts/[\w/]+\.py)([^`\n]*)", text):
            found.append((page.name, file, re.split(r" +#| [|&>]", rest)[0]))
    return found


@pytest.mark.parametrize("page, file, arguments", scripts_shown())
def test_flags_of_scripts_are_there(page: str, file: str, arguments: str) -> None:
    text = (ROOT / file).read_text()
    beside = [ROOT / f"{module.replace('.', '/')}.py" for module in re.findall(r"from (scripts\.[\w.]+) import", text)]
    texts = [text, *(each.read_text() for each in beside if each.is_file())]
    calls = [node for text in texts for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    flags = {
        word.value
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"
        for word in call.args
        if isinstance(word, ast.Constant)
    }
    assert {word for word in shlex.split(arguments) if word.startswith("--")} <= flags
