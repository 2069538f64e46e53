"""A contact sheet: pictures in rows and columns, each under what it shows."""

from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

LETTERS = 16  # pixels of a label's letters
LINE = 20  # pixels of a label's line
LEAST = 256  # pixels that a picture is wide at least: smaller ones are enlarged by a whole number, so that text fits


@dataclass
class Layout:
    """Where the pictures of a sheet are: a row a prompt, the prompt above it in as many lines as it needs, a column for
    each way of drawing it, its name above each picture."""

    prompts: list[str]
    columns: list[str]
    size: tuple[int, int]
    """Height and width of each picture as it was drawn."""

    def __post_init__(self) -> None:
        self.scale = max(1, -(-LEAST // self.size[1]))
        self.height, self.width = (side * self.scale for side in self.size)
        self.right = self.width * len(self.columns)
        self.lines = [wrapped(prompt, self.right - 8) for prompt in self.prompts]

    def top(self, row: int) -> int:
        """The first line of pixels of a row's text; of the row behind the last one, the sheet's height."""
        return sum((len(lines) + 1) * LINE + self.height for lines in self.lines[:row])

    def cell(self, row: int, column: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of a picture, in pixels."""
        left, top = column * self.width, self.top(row) + (len(self.lines[row]) + 1) * LINE
        return left, top, left + self.width, top + self.height


def wrapped(text: str, room: int) -> list[str]:
    """A text in lines of at most `room` pixels; a word that is longer by itself is cut."""
    font, lines = ImageFont.load_default(LETTERS), [""]
    for word in text.split():
        while word:
            tried = f"{lines[-1]} {word}".strip()
            if font.getlength(tried) <= room:
                lines[-1], word = tried, ""
            elif lines[-1]:
                lines.append("")
            else:
                fits = max(1, next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= room))
                lines[-1], word = word[:fits], word[fits:]
                lines += [""] if word else []
    return lines


def sheet_of(layout: Layout, pictures: dict[tuple[str, str], Image.Image]) -> Image.Image:
    """The sheet with its pictures, by prompt and column."""
    board = Image.new("RGB", (layout.right, layout.top(len(layout.prompts))), "white")
    pen, font = ImageDraw.Draw(board), ImageFont.load_default(LETTERS)
    for row, prompt in enumerate(layout.prompts):
        for i, line in enumerate(layout.lines[row]):
            pen.text((4, layout.top(row) + i * LINE), line, fill="black", font=font)
        for column, name in enumerate(layout.columns):
            left, top, _, _ = layout.cell(row, column)
            pen.text((left + 4, top - LINE), name, fill="#555555", font=font)
            picture = pictures[prompt, name]
            board.paste(picture.resize((layout.width, layout.height), Image.Resampling.NEAREST), (left, top))
    return board
