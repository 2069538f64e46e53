"""The tables of the docs that name the bundled model: where they stand, and what stays when one is written."""

import pytest

from infer.program.paths import ROOT
from scripts import tables
from scripts.tiny import check, world


def test_every_table_has_its_place() -> None:
    for name, (page, _) in tables.TABLES.items():
        text = (ROOT / page).read_text()
        assert tables.placed(text, name, "| a |\n").count(f"<!-- {name} -->\n| a |\n<!-- /{name} -->\n") == 1


def test_only_what_stands_between_the_marks_is_replaced() -> None:
    page = "before\n<!-- gap -->\nold\n<!-- /gap -->\nafter\n<!-- edit -->\nkept\n<!-- /edit -->\n"
    assert tables.placed(page, "gap", "\nnew\n") == page.replace("old", "new")
    for broken in (page.replace("<!-- gap -->\n", ""), page + "<!-- gap -->\n", page.replace("<!-- /gap -->", "")):
        with pytest.raises(ValueError, match="the page has no <!-- gap -->"):
            tables.placed(broken, "gap", "new")


def test_a_table_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["tables.py", "captions", "gaps"])
    with pytest.raises(ValueError, match=r"there is no table \['gaps'\]; choose from reader, captions"):
        tables.main()


def test_the_styles_prompts_differ_and_name_what_the_model_never_saw() -> None:
    prompts = tables.style_prompts()
    assert len(prompts) == len(set(prompts)) == tables.PROMPTS
    for prompt in prompts:
        assert any(world.held_out(*pair) for pair in check.parse(prompt).pairs), prompt
        assert not any(texture in prompt for texture in world.TEXTURES[1:])
