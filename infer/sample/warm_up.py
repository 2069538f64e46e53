"""A picture that nobody looks at, by which is found what drawing takes and after which nothing is left to compile."""

from typing import Any

from infer.sample.encode import decode
from infer.sample.generate import draw


def draw_unseen(vae: Any, *arguments: Any) -> None:
    """Draw and decode; arguments: those of `draw`.

    Raises:
        NotFiniteError: what is drawn is not finite.
    """
    decode(vae, draw(*arguments), *arguments[-2])
