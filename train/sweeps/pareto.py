"""Which points of a sweep no other beats, and a drawing of them."""

from collections.abc import Sequence

from infer.report.svg import draw_scatter


def front_of(points: Sequence[Sequence[float]], directions: Sequence[str]) -> list[bool]:
    """Whether each point is on the Pareto front: none is at least as good in every objective and better in one.

    Args:
        points: the objectives of each.
        directions: minimize or maximize, for each objective.
    """
    signs = [1 if direction == "minimize" else -1 for direction in directions]
    costs = [[sign * value for sign, value in zip(signs, point, strict=True)] for point in points]

    def beats(a: list[float], b: list[float]) -> bool:
        return a != b and all(x <= y for x, y in zip(a, b, strict=True))

    return [not any(beats(other, cost) for other in costs) for cost in costs]


def draw_front(
    titles: tuple[str, str],
    directions: tuple[str, str],
    names: Sequence[str],
    points: Sequence[tuple[float, float]],
    front: Sequence[bool],
) -> str:
    """A figure with a circle for each point; joined are those that nothing beats in these two objectives.

    Args:
        titles: of the x and the y axis.
        directions: minimize or maximize, for each axis.
        front: whether each point is on the front of all objectives; its circle is filled.
    """
    return draw_scatter(titles, points, names, front, front_of(points, directions))
