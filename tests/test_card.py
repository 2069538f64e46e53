"""The model card as the Hub reads it, and the way to the Hub, against one that is made up."""

from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError

from infer.card import Card, push, write_card
from infer.formats import FILE

CARD = Card(
    name="mine", base="black-forest-labs/FLUX.1-dev", trigger="sks: a 'dog'", precision="nf4",
    facts={"kind": "LoRA, rank 4"}, figures={"0": 0.93812, "100": 0.2}, samples={"sks, on a table": "sample-0.png"},
    notes=["Keep dry."],
)  # fmt: skip


def test_the_hub_reads_the_card(tmp_path: Path) -> None:
    card = ModelCard.load(write_card(tmp_path, CARD))
    data = card.data.to_dict()
    assert data["base_model"] == "black-forest-labs/FLUX.1-dev" and data["instance_prompt"] == "sks: a 'dog'"
    assert data["license"] == "other" and data["license_name"] == "flux-1-dev-non-commercial-license"
    assert data["widget"] == [{"text": "sks, on a table", "output": {"url": "sample-0.png"}}]
    assert data["library_name"] == "diffusers" and "lora" in data["tags"]
    for part in ("0.9381 at step 0, 0.2000 at step 100", "| kind | LoRA, rank 4 |", "Keep dry.", "(sample-0.png)"):
        assert part in card.text
    local = tmp_path / "owner" / "model"
    local.mkdir(parents=True)
    card = ModelCard.load(write_card(tmp_path, Card("x", str(local), None, "bf16", {})))
    assert "base_model" not in card.data.to_dict() and str(tmp_path) not in card.content  # no path of this machine


class Hub:
    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def create_repo(self, name: str, **options: Any) -> str:
        self.calls.append((name, options))
        return f"hub/{name}"

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload", options))


def test_push_is_private_and_says_what_the_hub_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    for name, message in (("mine", "push is 'mine'; write owner/name"), ("me/mine", "there is no adapter in")):
        with pytest.raises(ValueError, match=message):
            push(tmp_path, name)
    assert not hub.calls
    (tmp_path / FILE).write_bytes(b"")
    assert push(tmp_path, "me/mine") == "hub/me/mine"
    assert hub.calls[0] == ("me/mine", {"private": True, "exist_ok": True})
    assert hub.calls[1][1]["repo_id"] == "me/mine" and hub.calls[1][1]["folder_path"] == tmp_path

    def refuse(**options: Any) -> None:
        raise HfHubHTTPError(
            "403 Forbidden\nlong story", response=httpx.Response(403, request=httpx.Request("PUT", "hub:"))
        )

    monkeypatch.setattr(hub, "upload_folder", refuse)
    with pytest.raises(ValueError, match=r"the Hub did not take me/mine: 403 Forbidden; log in with `hf auth login`"):
        push(tmp_path, "me/mine")
