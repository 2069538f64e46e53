"""Texts that are not in the cache yet -> shards, one by one."""

import torch
from tqdm import tqdm

from infer.sample.encode import TextEncoder
from train.latents.store import Cache
from train.latents.writer import ShardWriter, rounds


def encode_texts(cache: Cache, encoder: TextEncoder, texts: list[str], writer: ShardWriter, show: bool) -> None:
    """Write the embeddings of the texts that are missing, one by one so that none depends on its neighbours: `embeds`
    [tokens, width], and `pooled` [width] where there is one. `tokens` are two numbers: those of the whole text, and
    those that the encoder sees at most."""

    def absent(text: str) -> bool:
        return bool(writer.index.absent([cache.keys.text(text)]))

    with tqdm(total=len(texts), desc="texts", unit="text", disable=not show) as bar:
        for todo, later in rounds(texts, writer.settle, absent):
            for text in todo:
                mine, complete = writer.claim([cache.keys.text(text)])
                if not complete:
                    later.append(text)
                    continue
                for key in mine:
                    (encoded,) = encoder([text])
                    tokens = torch.tensor([encoder.tokens(text), encoder.length], dtype=torch.int32)
                    pooled = {} if encoded.pooled is None else {"pooled": encoded.pooled.clone()}
                    writer.add(key, {"embeds": encoded.embeds.clone(), "tokens": tokens} | pooled)
                bar.update()
