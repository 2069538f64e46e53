"""A look at the data from the page: what a preset says of model and data is looked at too."""

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from infer.program.literal import literal_arguments
from infer.program.paths import CONFIGS
from train.look import Look
from train.run.config import Train
from train.watch.run_commands import look_words


def composed(config: str, words: list[str], schema: type) -> dict[str, object]:
    ConfigStore.instance().store(name=f"{config}_schema", node=schema)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        found = OmegaConf.to_container(compose(config, literal_arguments(words, schema)))
    assert isinstance(found, dict)
    return {"model": found["model"]["path"], "data": found["data"]}


def test_a_look_is_at_what_the_training_would_read() -> None:
    for words in (
        ["experiment=edit", "run=mine"],
        ["experiment=dev_12gb", "run=mine", "data.path=mine"],
        ["experiment=dev_12gb", "model=krea", "run=mine", "data.path=mine", "data.resolution=256"],
        ["experiment=style", "model=dev", "run=mine", "data.path=mine", "data.trigger=sks"],
    ):
        found = look_words(["train/train.py", *words])
        assert composed("look", found[1:], Look) == composed("train", words, Train)
