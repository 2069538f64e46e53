"""Names of files that mean the same: macOS takes letters with accents apart, Windows' programs capitalise endings."""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import PurePosixPath


def key_of(name: str) -> str:
    """What two names have in common that mean one file: their letters in one Unicode form, the ending in small ones."""
    path = PurePosixPath(unicodedata.normalize("NFC", name))
    return str(path.with_suffix(path.suffix.lower())) if path.suffix else str(path)


def stem_of(name: str) -> str:
    """A name without its ending, in one Unicode form."""
    return unicodedata.normalize("NFC", str(PurePosixPath(name).with_suffix("")))


class Names:
    """Files by their names, and by other spellings of these."""

    def __init__(self, names: Iterable[str]) -> None:
        self.exact = dict.fromkeys(names)
        self.by_key: dict[str, list[str]] = defaultdict(list)
        self.by_stem: dict[str, list[str]] = defaultdict(list)
        for name in self.exact:
            self.by_key[key_of(name)].append(name)
            self.by_stem[stem_of(name)].append(name)

    def __contains__(self, name: str) -> bool:
        return name in self.exact

    def find(self, name: str) -> str | None:
        """The file that a name means.

        Raises:
            ValueError: it could mean several.
        """
        if name in self.exact:
            return name
        found = self.by_key.get(key_of(name), [])
        if len(found) > 1:
            raise ValueError(
                f"names {name!r}, which could be any of {', '.join(map(repr, found))}; write the very name"
            )
        return found[0] if found else None

    def near(self, name: str) -> str | None:
        """The only file whose name differs in capitals alone."""
        folded = key_of(name).casefold()
        found = [other for key, others in self.by_key.items() if key.casefold() == folded for other in others]
        return found[0] if len(found) == 1 else None
