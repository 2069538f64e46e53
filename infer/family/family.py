"""What differs between families of FLUX. Each family is a module with what `Family` names; nothing else names one.

flux1.py and flux2.py hold a family each, with the sizes of its published checkpoints beside it; find.py tells which one
a checkpoint, a config or a model is of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

Table = dict[str, tuple[str, ...]]
"""Black Forest Labs' name of a layer, and diffusers' names of the layers that are in it, in the order of its rows."""
Sizes = dict[str, dict[str, Any]]
"""A checkpoint's configs by part; `index` is its model_index.json."""


class Linear(NamedTuple):
    """A linear layer."""

    rows: int
    """Its outputs."""
    columns: int
    """Its inputs."""


class Encoder(NamedTuple):
    """A text encoder of a pipeline."""

    part: str
    """Its folder."""
    tokenizer: str
    """Its tokenizer's folder."""
    large: bool
    """Whether it is quantized as precision.t5 says; small ones are not."""


class Drawing(NamedTuple):
    """How a checkpoint draws if nothing else is said."""

    steps: int
    guidance: float


class TextSize(NamedTuple):
    """What a text encoder stores."""

    layers: list[Linear]
    """The linear layers that can be quantized."""
    kept: int
    """Parameters that stay as they are, in bf16."""
    wide: int
    """Parameters that stay as they are, in fp32 beside products in fp16."""


class Activations(NamedTuple):
    """How much a block takes in training, in activations of the transformer's width: measured (scripts/bench_train.py,
    tests/plan_grid.jsonl)."""

    work: float
    """Alive while a block's backward pass runs on the fast path, besides those that are kept for it."""
    plain: float
    """The same on the plain path."""
    plain_4bit: float
    """The same with bitsandbytes' 4-bit layers."""
    products: float
    """Outputs of its matrix products, but for adapters'."""
    everything: float
    """All that its backward pass reads."""
    holes: float
    """GiB that torch's allocator holds beyond the allocated bytes where the products of 4-bit layers are kept."""


class Names(NamedTuple):
    """What Black Forest Labs' own model calls the layers that diffusers calls otherwise."""

    double: Table
    """Within double_blocks.<i> and transformer_blocks.<i>."""
    single: Table
    """Within single_blocks.<i> and single_transformer_blocks.<i>."""
    outside: Table
    """Outside the blocks."""
    swapped: str
    """The layer of `outside` whose rows stand in two halves, shift before scale, where diffusers has scale first."""
    ai_toolkit: bool
    """Whether ai-toolkit's adapter files have these names; else they have diffusers'."""
    double_also: Table
    """What other programs call the layers of `double`."""
    single_also: Table


@dataclass
class Text:
    """One prompt's embeddings, and the latents of the reference pictures that go with it."""

    embeds: Tensor  # [tokens, joint_attention_dim]
    pooled: Tensor | None  # [pooled_projection_dim], where the transformer takes one
    empty: Text | None = None  # the empty prompt's, where guidance is by two calls
    references: tuple[Tensor, ...] = ()  # normalised latents [channels, height, width], each of a size of its own


@dataclass
class LatentMap:
    """How latents [..., channels, height, width] of an autoencoder become those that the transformer expects:
    (latents - shift) * scale.

    shift and scale: one number for all, or one for each channel and place in a patch of 2 x 2, [channels, 2, 2].
    """

    shift: float | Tensor
    scale: float | Tensor

    def spread(self, value: float | Tensor, latents: Tensor) -> float | Tensor:
        """shift or scale at every latent."""
        if isinstance(value, float):
            return value
        return value.to(latents.device).repeat(1, latents.shape[-2] // 2, latents.shape[-1] // 2)

    def normalise(self, mean: Tensor) -> Tensor:
        """Latents -> what the transformer expects, in fp32."""
        return (mean.float() - self.spread(self.shift, mean)) * self.spread(self.scale, mean)

    def deviation(self, deviation: Tensor) -> Tensor:
        """A deviation of latents -> that of normalised ones, in fp32."""
        return deviation.float() * self.spread(self.scale, deviation)

    def restore(self, latents: Tensor) -> Tensor:
        """The way back."""
        return latents / self.spread(self.scale, latents) + self.spread(self.shift, latents)


class Family(Protocol):
    """A family's module."""

    NAME: str
    """As users know it, such as FLUX.1."""
    TAG: str
    """As the Hub's tag."""
    PIPELINES: Mapping[str, str]
    """diffusers' pipelines of it by class, and why one that is not taken is not; "" for those that are."""
    TRANSFORMER: str
    """diffusers' class of the transformer."""
    AUTOENCODER: str
    """diffusers' class of the autoencoder."""
    PARTS: tuple[str, ...]
    """The folders of a checkpoint."""
    ENCODERS: tuple[Encoder, ...]
    INDEXED: bool
    """Whether model_index.json says what nothing else does; else the functions below can do with an empty one."""
    AXES: tuple[int, ...]
    """Widths of the rotary embedding's axes, where a config does not say."""
    BIAS: bool
    """Whether its linear layers have biases."""
    SAMPLED: bool
    """Whether it is trained on samples of the autoencoder's posterior; else on its mode."""
    ATTENTION: str
    """A regular expression for the blocks' attention layers, within a block."""
    MLP: str
    """One for the blocks' other layers that read tokens."""
    NAMES: Names
    FILE_MARKS: Mapping[str, str]
    """A tensor by which the text encoders and the autoencoder are known in a single file, by part; its second size is
    the part's width, or the autoencoder's channels."""
    GGUF_TEXT: Mapping[str, str]
    """Text encoders that a GGUF may hold: general.architecture, and the part."""
    SIZES: Mapping[str, Sizes]
    """Of published checkpoints, by their Hub id."""
    TOKENS: Mapping[str, int]
    """Text tokens of those."""
    ACTIVATIONS: Activations
    LICENCES: Mapping[str, tuple[str, str | None]]
    """By Hub id: the Hub's name of the licence, and the licence's own if that is `other`."""

    def linear_shapes(self, config: Mapping[str, Any]) -> dict[str, Linear]:
        """Every linear layer of a transformer by diffusers' name, from its config.json.

        Raises:
            KeyError: the config lacks a number.
        """

    def norm_sizes(self, config: Mapping[str, Any]) -> dict[str, int]:
        """Parameters of every norm that has some, by its name."""

    def drawing(self, path: str, index: Mapping[str, Any], config: Mapping[str, Any]) -> Drawing:
        """Steps and guidance of a checkpoint, from its path, its model_index.json and its transformer's config."""

    def unguided(self, index: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
        """Why guidance has no effect on what this checkpoint draws; None if it has."""

    def two_calls(self, index: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
        """Whether guidance is by two calls of the transformer, the second one with the empty prompt."""

    def distilled_from(self, path: str, index: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
        """The checkpoint to train on in place of a few-step distilled one; None if this one is not distilled so."""

    def distilled_to(self, index: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
        """The few-step checkpoint that adapters of a base model are drawn on too; None if there is none."""

    def training_note(self, config: Mapping[str, Any]) -> str | None:
        """What to know before training on a checkpoint of this config; it follows the checkpoint's name."""

    def text_class(self, part: str, config: dict[str, Any], whole: bool) -> tuple[Any, Any]:
        """transformers' class of a text encoder and the config to load it with (None: its own). whole: with the layers
        that no embedding reads.

        Raises:
            ValueError: it is an encoder that this family does not use.
        """

    def embeds_width(self, config: Mapping[str, Any]) -> int:
        """The width of the embeddings that the large text encoder gives, by its config.json."""

    def text_size(self, part: str, config: Mapping[str, Any]) -> TextSize:
        """What of a text encoder is loaded, by its config.json."""

    def text_body(self, encoder: Any) -> Any:
        """Of a loaded text encoder, the part that is called."""

    def text_length(self, parts: Mapping[str, Any]) -> int:
        """Text tokens that the transformer was trained with, by the loaded text parts."""

    def make_encoder(self, parts: Mapping[str, Any], length: int) -> Callable[[str], Text]:
        """A function from a prompt to its embeddings, by the loaded text parts, on their device; length: in tokens."""

    def count_tokens(self, parts: Mapping[str, Any], prompts: list[str]) -> list[int]:
        """Tokens that each whole prompt has; `parts`: loaded tokenizers."""

    def latent_map(self, config: Mapping[str, Any], tensor: Callable[[str], Tensor]) -> LatentMap:
        """An autoencoder's map, from its config.json and its weights by name.

        Raises:
            ValueError: the config lacks it.
        """

    def takes_references(self, index: Mapping[str, Any]) -> bool:
        """Whether the checkpoint was trained with reference pictures, by its model_index.json."""

    def reference_pixels(self, picture: Image.Image, resolution: int | None) -> Tensor:
        """A reference picture as the family's pipelines scale it, [1, 3, height, width] in [-1, 1], sides multiples of
        16.

        resolution: pixels a side of the square that it has about as many pixels as; None: the pipelines' own.
        """

    def inputs(
        self,
        config: Mapping[str, Any],
        packed: Tensor,
        height: int,
        width: int,
        embeds: Tensor,
        pooled: Tensor | None,
        guidance: float,
        dtype: torch.dtype,
        references: Sequence[Tensor] = (),
    ) -> dict[str, Any]:
        """Keyword arguments of the transformer, but for `timestep`. The references' tokens stand behind the picture's,
        so that the picture's velocity is the first `packed.shape[1]` tokens of the output.

        Args:
            packed: latents [batch, height / 2 * width / 2, channels * 4], height and width in latents.
            embeds: [batch, text tokens, joint_attention_dim].
            pooled: [batch, pooled_projection_dim].
            dtype: the transformer's own.
            references: normalised latents [batch, channels, height, width] of reference pictures, without noise.
        """

    def mu(self, scheduler: Mapping[str, Any], tokens: int, steps: int) -> float:
        """The logarithm of the sampler's shift of sigma for a picture of so many packed tokens; scheduler: its
        config."""
