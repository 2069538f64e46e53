"""Captions by a model: which pictures get one, what is kept, and what is refused."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLProcessor

from tests.train.captioning.tiny import make_florence, make_llava, make_qwen
from train.captioning import describe as describing
from train.captioning.describe import TASK, describe, load_captioner
from train.captioning.image_chat import ImageChat
from train.data.dataset import Data
from train.data.samples import read_samples
from train.write_captions import Folder, WriteCaptions, write_captions

KINDS: dict[str, Callable[[Path], Path]] = {"florence": make_florence, "chat": make_llava, "qwen": make_qwen}


@pytest.fixture(scope="module", params=KINDS)
def captioner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(KINDS[request.param](tmp_path_factory.mktemp("captioner") / request.param))


def pictures(folder: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40 + 10 * i, 50), 90).convert("RGB").save(folder / name)
    return folder


def test_a_folder_is_described_once(captioner: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pictures(tmp_path / "set", "a.png", "deep/b.jpg", "c.png", "d.png")
    (folder / "c.txt").write_text("mine, and kept")
    (folder / "d.txt").write_text("  \n")  # nothing said
    options = WriteCaptions(Folder(str(folder), "sks"), captioner, tokens=6, batch_size=2, device="cpu")
    write_captions(options)
    assert "3 captions written, 1 kept" in capsys.readouterr().out
    samples, skipped = read_samples(Data(str(folder), trigger="sks"))
    found = {Path(sample.name).name: sample.captions[0] for sample in samples}
    assert not skipped and found["c.png"] == "mine, and kept"
    assert all(found[name].startswith("sks") for name in ("a.png", "b.jpg", "d.png"))
    with (folder / "captions.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["file_name"] for row in rows] == ["a.png", "c.png", "d.png", "deep/b.jpg"]
    assert {row["file_name"]: row["written"] for row in rows}["c.png"] == "before"
    assert all(found[Path(row["file_name"]).name] == row["caption"] for row in rows)
    (folder / "a.txt").unlink()
    before = (folder / "deep" / "b.txt").stat().st_mtime_ns
    write_captions(options)
    assert "1 captions written, 3 kept" in capsys.readouterr().out
    assert (folder / "a.txt").read_text().strip() == found["a.png"]
    assert (folder / "deep" / "b.txt").stat().st_mtime_ns == before


def test_a_batch_says_what_each_picture_alone_is_said_to_be(captioner: str, tmp_path: Path) -> None:
    shown = [Image.open(file).convert("RGB") for file in sorted(pictures(tmp_path, "a.png", "b.png").iterdir())]
    made = load_captioner(captioner, torch.device("cpu"))
    together = describe(made, shown, None, 6)
    assert together == [describe(made, [one], None, 6)[0] for one in shown]
    own = made.processor
    if isinstance(own, ImageChat):  # by transformers' own processor, but for the part that its videos need
        whole: Any = object.__new__(Qwen2_5_VLProcessor)
        whole.tokenizer, whole.image_processor, whole.chat_template = own.tokenizer, own.image_processor, None
        for kind in ("image", "video"):
            token = f"<|{kind}_pad|>"
            setattr(whole, f"{kind}_token", token)
            setattr(whole, f"{kind}_token_id", own.tokenizer.convert_tokens_to_ids(token))
        text = f"USER: <|vision_start|><|image_pad|><|vision_end|>{describing.QUESTION} ASSISTANT:"
        given = whole(images=shown[0], text=[text], return_tensors="pt")
        ids = made.model.generate(**given, max_new_tokens=6, do_sample=False)[0, given["input_ids"].shape[1] :]
    elif made.chats:
        given = own(images=shown[0], text=f"USER: <image>{describing.QUESTION} ASSISTANT:", return_tensors="pt")
        ids = made.model.generate(**given, max_new_tokens=6, do_sample=False)[0, given["input_ids"].shape[1] :]
    else:
        given = own(images=shown[0], text=TASK, return_tensors="pt")
        ids = made.model.generate(**given, max_new_tokens=6, do_sample=False, num_beams=3)[0]
    assert together[0] == " ".join(own.tokenizer.decode(ids, skip_special_tokens=True).split())


def test_a_command_that_is_stopped_goes_on(captioner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pictures(tmp_path / "set", "a.png", "b.png", "c.png")
    options = WriteCaptions(Folder(str(folder)), captioner, tokens=4, batch_size=1, device="cpu")
    calls: list[int] = []

    def stopping(*args: object) -> list[str]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return ["a thing"]

    monkeypatch.setattr(describing, "describe", stopping)
    with pytest.raises(KeyboardInterrupt):
        write_captions(options)
    assert sorted(file.name for file in folder.glob("*.txt")) == ["a.txt"]
    write_captions(options)
    assert len(calls) == 4 and len(list(folder.glob("*.txt"))) == 3


def test_nothing_is_written_of_a_picture_of_which_nothing_is_said(
    captioner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = pictures(tmp_path / "set", "a.png", "b.png")
    monkeypatch.setattr(describing, "describe", lambda *args: ["", "a thing"])
    write_captions(WriteCaptions(Folder(str(folder), "sks"), captioner, tokens=4, batch_size=2, device="cpu"))
    assert [file.name for file in folder.glob("*.txt")] == ["b.txt"]
    assert (folder / "b.txt").read_text() == "sks, a thing\n"
    said = capfd.readouterr()
    assert "1 captions written, 0 kept, 1 without one" in said.out and "no caption for a.png" in said.out + said.err


def test_what_is_refused(tmp_path: Path) -> None:
    listed = pictures(tmp_path / "listed", "a.png")
    (listed / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}')
    twice = pictures(tmp_path / "twice", "a.png", "a.jpg")
    (tmp_path / "empty").mkdir()
    latin = pictures(tmp_path / "latin", "a.png")
    (latin / "a.txt").write_bytes("ä".encode("latin-1"))
    for path, said in (
        (tmp_path / "gone", "is no folder here; set it to the folder of the pictures"),
        (tmp_path / "empty", "holds no pictures"),
        (listed, r"metadata\.jsonl lists the captions, and this command writes them beside the pictures; add lines"),
        (twice, r"a\.jpg and .*a\.png would share the caption .*a\.txt; rename one of them"),
        (latin, r"a\.txt cannot be read .*; write it again in UTF-8"),
    ):
        with pytest.raises(ValueError, match=said):
            write_captions(WriteCaptions(Folder(str(path)), device="cpu"))
    with pytest.raises(ValueError, match=r"data\.path is empty"):  # not: all pictures below the working folder
        write_captions(WriteCaptions(device="cpu"))
    plain = pictures(tmp_path / "plain", "a.png")
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match=r"captioner .* cannot be loaded .*; give the Hub id or folder"):
        write_captions(WriteCaptions(Folder(str(plain)), str(tmp_path / "model"), device="cpu"))
    for options, said in (({"batch_size": 0}, "batch_size is 0"), ({"prompt": " "}, "prompt is empty")):
        with pytest.raises(ValueError, match=said):
            WriteCaptions(**options)
