"""What a comparison measured, as results.json holds it. The file is read and written here alone.

A field that is None by default is left out of the file while it is None; keys that are not known are kept.
"""

import json
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from infer.sample.edit import label

T = TypeVar("T")
Scores = dict[str, float | None]  # by name; None where a score is not defined, as PSNR is for equal pictures
Variant = tuple[str, str | None]  # a precision and an adapter, or none


class Estimate(NamedTuple):
    """A mean, its 95 % limits where they are known, and how many values it is of."""

    mean: float
    low: float | None = None
    high: float | None = None
    pictures: int | None = None


@dataclass
class Stage:
    """One stage of making a picture: load, encode, denoise or decode."""

    seconds: float
    peak_memory_bytes: int
    peak_reserved_bytes: int | None = None
    """What torch's allocator held; None on a CPU, which has none."""


@dataclass(kw_only=True)
class Row:
    """One picture and what it cost."""

    precision: str
    adapter: str | None
    prompt: str
    seed: int
    image: str
    """Its file, relative to the folder of results.json."""
    seconds: float
    """Denoising and decoding."""
    seconds_per_step: float
    weights_bytes: int
    compute_dtype: str | None = None
    peak_memory_bytes: int
    """The highest of its stages."""
    scores: Scores
    stages: dict[str, Stage]
    nearest: str | None = None
    """The nearest training picture, relative to their folder."""
    references: list[str] | None = None
    """Files of its prompt's reference pictures, relative to the same folder."""
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def variant(self) -> Variant:
        return self.precision, self.adapter

    @property
    def asked(self) -> str:
        """Its prompt with the references, which tells it from the same prompt with others."""
        return label(self.prompt, self.references or ())


@dataclass
class Summary:
    """All pictures of one precision with one adapter: means of times and scores, the highest of bytes."""

    precision: str
    adapter: str | None
    images: int
    weights_bytes: int
    peak_memory_bytes: int
    load_seconds: float
    seconds: float
    seconds_per_step: float
    scores: Scores
    intervals: dict[str, list[float]] | None = None
    """The 95 % limits [low, high] of scores."""
    differences: dict[str, dict[str, Estimate]] | None = None
    """To another precision by its name, or to `base`, the same without the adapter: of each score the mean difference
    at the same prompt and seed."""
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def variant(self) -> Variant:
        return self.precision, self.adapter


@dataclass
class References:
    """What is known of the training pictures; nothing where none were named."""

    folder: str | None = None
    count: int | None = None
    nearest_rms: float | None = None
    """The median closeness of each one to the closest other one; so is `nearest_dino`."""
    nearest_dino: float | None = None
    more: dict[str, Any] = field(default_factory=dict)


@dataclass
class Comparison:
    """The content of results.json."""

    model: str
    device: str
    versions: dict[str, Any]
    sampling: dict[str, Any]
    rows: list[Row]
    drift: list[Row] | None = None
    """Pictures of prompts that the adapter has nothing to do with."""
    bleed: list[Row] | None = None
    """Pictures of prompts of the adapter's class, without its trigger."""
    summary: list[Summary] | None = None
    """None: the means of the rows are shown."""
    references: References | None = None
    absent: dict[str, str] | None = None
    """A score that was not measured -> why."""
    sections: list[dict[str, Any]] | None = None
    """Further measurements, as infer/report/sections.py says."""
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def all_rows(self) -> list[Row]:
        return self.rows + (self.drift or []) + (self.bleed or [])


def read_results(file: Path) -> Comparison:
    """A comparison's results.json.

    Raises:
        ValueError: it is absent, or holds no comparison.
    """
    try:
        content = json.loads(file.read_bytes())
        return from_json(Comparison, content, "")
    except (OSError, ValueError) as error:  # absent, neither JSON nor UTF-8, or of another shape
        raise ValueError(
            f"{file} holds no comparison ({error}); give the folder that infer/compare.py wrote, or compare again"
        ) from error


def results_text(comparison: Comparison) -> str:
    """The content of results.json.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    return json.dumps(to_json(comparison), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(kind: type[T], value: Any, path: str) -> T:
    """What json.loads gives as an instance of a class of this file; path: where it stands, for messages.

    Raises:
        ValueError: a key is absent, or a value is of another type.
    """
    found: T = _read(kind, value, path)
    return found


def to_json(value: Any) -> Any:
    """The reverse of `from_json`: what json.dumps takes."""
    if is_dataclass(value):
        shown = {f.name: to_json(getattr(value, f.name)) for f in fields(value) if not _left_out(value, f)}
        return shown | getattr(value, "more", {})
    if isinstance(value, Estimate):
        return {name: own for name, own in value._asdict().items() if name != "pictures" or own is not None}
    if isinstance(value, dict):
        return {key: to_json(own) for key, own in value.items()}
    return [to_json(own) for own in value] if isinstance(value, list) else value


def _left_out(value: Any, f: Any) -> bool:
    return f.name == "more" or (f.default is None and getattr(value, f.name) is None)


def _read(kind: Any, value: Any, path: str) -> Any:
    if is_dataclass(kind) or kind is Estimate:
        return _read_object(kind, value, path)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:
        (one,) = (argument for argument in arguments if argument is not NoneType)
        return None if value is None else _read(one, value, path)
    if origin is list:
        _expect(isinstance(value, list), "a list", value, path)
        return [_read(arguments[0], own, f"{path}[{i}]") for i, own in enumerate(value)]
    if origin is dict:
        _expect(isinstance(value, dict), "an object", value, path)
        return {key: _read(arguments[1], own, f"{path}.{key}") for key, own in value.items()}
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    types = {float: (int, float)}.get(kind, kind)
    # Python's bool is an int
    fits = kind is Any or (isinstance(value, types) and isinstance(value, bool) == (kind is bool))
    _expect(fits, names.get(kind, ""), value, path)
    return value


def _read_object(kind: Any, value: Any, path: str) -> Any:
    _expect(isinstance(value, dict), "an object", value, path)
    types, given = get_type_hints(kind), dict[str, Any]()
    required = _required(kind)
    for name in types:
        if name in value and name != "more":
            given[name] = _read(types[name], value[name], f"{path}.{name}".lstrip("."))
        elif name in required:
            raise ValueError(f"{path or 'it'} has no {name}")
    rest = {key: own for key, own in value.items() if key not in given}
    return kind(**given, **({"more": rest} if "more" in types and rest else {}))


def _required(kind: Any) -> set[str]:
    if kind is Estimate:
        return {"mean"}
    return {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}


def _expect(fits: bool, wanted: str, value: Any, path: str) -> None:
    if not fits:
        raise ValueError(f"{path or 'it'} is {json.dumps(value)[:40]} and not {wanted}")
