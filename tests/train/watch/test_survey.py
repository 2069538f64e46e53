"""What a look at the data found, on the page: the command, the findings by the folder's names, the crops as trained."""

import io
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pytest
from PIL import Image

from infer.sample.picture import decode
from tests.train.watch.conftest import serving
from tests.train.watch.test_look_words import composed
from train.data.buckets import cut
from train.data.dataset import Data
from train.data.view import View
from train.look import Look, look
from train.watch import jobs
from train.watch.survey import survey_name


def test_the_page_shows_what_look_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str | None] = []
    monkeypatch.setattr(jobs, "start_runner", started.append)
    data = tmp_path / "runs" / "set"
    (data / "sub").mkdir(parents=True)
    small = np.random.default_rng(0).integers(0, 256, (5, 8, 3), dtype=np.uint8)
    noise = np.asarray(Image.fromarray(small).resize((160, 90), Image.Resampling.BICUBIC))
    for name in ("a.png", "copy.png", "sub/b.png", "bare.png"):
        other = noise if name != "sub/b.png" else noise[::-1, :100]
        Image.fromarray(other).save(data / name)
        if name != "bare.png":
            (data / name).with_suffix(".txt").write_text(f"a card of {name}")
    (data / "broken.png").write_bytes(b"no picture")
    (data / "broken.txt").write_text("a card")
    for page in serving(tmp_path):
        assert page.get("/api/survey?folder=runs/set") == {
            "found": None, "job": None, "page": f"{survey_name('runs/set')}/data.html",
        }  # fmt: skip
        form = {
            "what": "survey",
            "folder": "runs/set",
            "resolution": "64",
            "crops": "2",
            "flip": "yes",
            "trigger": "sks",
        }
        status, said = page.post("/api/start", **form, when="now")
        assert status == 200 and started == [said["job"]], said
        assert said["command"] == (
            f"python train/look.py data.path=runs/set run={survey_name('runs/set')} data.resolution=64 data.crops=2 "
            "data.flip=true data.trigger=sks"
        )
        words = page.get("/api/survey?folder=runs/set")["job"]["words"]
        options = Data("runs/set", resolution=64, crops=2, flip=True, trigger="sks")
        asked = composed("look", words[1:], Look)["data"]
        assert (asked["path"], asked["resolution"], asked["crops"], asked["flip"], asked["trigger"]) == (  # type: ignore[index]
            "runs/set", 64, 2, True, "sks",
        )  # fmt: skip
        with pytest.raises(SystemExit):  # broken ones and data.on_error=raise: training could not start
            look(Look(data=options, run=survey_name("runs/set"), workers=1))
        found = page.get("/api/survey?folder=runs/set")["found"]
        assert "2 of 5 samples cannot be used" in found["refusal"]
        assert {one["name"] for one in found["skipped"]} == {"broken.png", "bare.png"}
        assert found["copies"] == [["a.png", "copy.png"]] and found["counts"]["exact_duplicates"] == 1
        assert sum(bucket["count"] for bucket in found["buckets"]) == 3
        pictures = {one["name"]: one for one in found["pictures"]}
        assert pictures.keys() == {"a.png", "copy.png", "sub/b.png"} and pictures["sub/b.png"]["size"] == [100, 90]
        assert "same pixels as a.png" in pictures["copy.png"]["notes"]
        views = pictures["a.png"]["views"]
        assert len(views) >= 2 and {view["flip"] for view in views} == {False, True}
        picture = decode((data / "a.png").read_bytes(), "a.png")
        for view in views:  # as the trainer cuts them
            text = ",".join(map(str, [view["width"], view["height"], *view["box"], int(view["flip"])]))
            query = urlencode({"folder": "runs/set", "name": "a.png", "view": text})
            status, body = page.raw("GET", f"/crop?{query}", page.good)
            assert status == 200
            shown = np.asarray(Image.open(io.BytesIO(body)).convert("RGB"), dtype=float)
            trained = cut(picture, View(view["height"], view["width"], tuple(view["box"]), view["flip"]))
            expected = (trained.permute(1, 2, 0).numpy() + 1) * 127.5
            assert shown.shape == expected.shape and np.abs(shown - expected).mean() < 4  # WebP
        Image.new("RGB", (20, 20)).save(data / "a.png")  # another picture since
        status, body = page.raw("GET", f"/crop?{query}", page.good)
        assert status == 403 and b"has another size now" in body
