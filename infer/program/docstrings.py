"""What the source says of a dataclass's fields: the text below each one."""

import ast
import inspect
import textwrap
from typing import Any


def field_docs(group: Any) -> dict[str, str]:
    """Each documented field's text in one line, inherited fields' too."""
    found: dict[str, str] = {}
    for kind in reversed(group.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                assert isinstance(below.value, ast.Constant)
                found[field.target.id] = " ".join(str(below.value.value).split())
    return found
