"""Prior preservation with pictures that the base itself draws, once, before training.

    train/train.py data.path=my_dog data.trigger=sks data.prior.prompt="a photo of a dog" data.prior.count=100

Training on them beside one's own keeps the adapter from turning every dog into that dog (DreamBooth, Ruiz et al. 2023).
They lie in the cache's folder under a key of everything that they depend on, so another run draws none again.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from infer.checkpoint.family import family_of
from infer.checkpoint.fingerprint import fingerprint
from infer.checkpoint.load import load_scheduler, load_transformer, load_vae
from infer.checkpoint.model import Model
from infer.device.device import release
from infer.program.atomic import replace_file
from infer.quantize.eight_bit_products import without_products
from infer.quantize.precision import Precision
from infer.sample.encode import decode, drawn_texts, text_encoder
from infer.sample.generate import Sampling, draw, settled
from train.data.dataset import Data, sources_of
from train.data.image_folder import read_bytes
from train.data.source import Sample
from train.latents.locks import claim, give_up, open_claims
from train.latents.writer import PAUSE


def prior_folder(data: Data, model: Model, precision: Precision) -> Path:
    """Where the class pictures of this prompt, base and precision lie."""
    prior, side = data.prior, data.resolutions[0]
    prints = [fingerprint(model, part) for part in family_of(model).PARTS]
    sampling = prior_sampling(data, model)
    drawn = prior.prompt, data.text_length, sampling.steps, sampling.guidance, prior.seed, side
    how = [*drawn, prints, without_products(precision)]
    return Path(data.cache) / "prior" / hashlib.sha256(json.dumps(how).encode()).hexdigest()[:32]


def prior_sampling(data: Data, model: Model) -> Sampling:
    """How the class pictures are drawn."""
    side = data.resolutions[0]
    return settled(Sampling(data.prior.steps, data.prior.guidance, side, side), model)


def shared(todo: list[int], files: list[Path], bar: tqdm) -> Iterator[int]:
    """Those of the pictures that no other process draws meanwhile; it ends when all are there."""
    with open_claims(files[0].parent) as claims:
        while todo:
            later = []
            for i in todo:
                key = f"{i:015x}"
                if not claim(claims, key):
                    later.append(i)
                    continue
                if not files[i].is_file():
                    yield i
                give_up(claims, key)
                bar.update()
            if len(later) == len(todo):
                time.sleep(PAUSE)
            todo = later


def prior_samples(
    data: Data, model: Model, precision: Precision, device: torch.device, rank: int = 0, ranks: int = 1
) -> list[Sample]:
    """The class pictures as samples; this rank draws its share of those that are not there yet.

    Only when all ranks have returned are all of them there.
    """
    prior, side = data.prior, data.resolutions[0]
    if not prior.count:
        return []
    folder = prior_folder(data, model, precision)
    files = [folder / f"{i:05d}.png" for i in range(prior.count)]
    absent = [i for i in range(rank, prior.count, ranks) if not files[i].is_file()]
    if absent:
        with text_encoder(model, precision, device, data.text_length) as encoder:
            (text,) = drawn_texts(model, encoder, [prior.prompt])
        transformer = load_transformer(model, precision, device)
        vae, scheduler = load_vae(model, device), load_scheduler(model)
        sampling = prior_sampling(data, model)
        bar = tqdm(total=len(absent), desc="drawing class pictures", unit="picture", disable=rank > 0)
        for i in shared(absent, files, bar):
            latents = draw(transformer, scheduler, text, prior.seed + i, sampling, (side, side), device)
            replace_file(files[i], partial(decode(vae, latents, side, side).save, format="PNG"))
        del transformer, vae
        release(device)
    source = len(sources_of(data)) - 1
    return [
        Sample(str(file), (prior.prompt.strip(),), source, partial(read_bytes, str(file)), file=file) for file in files
    ]
