"""An adapter to train: its settings, checked without torch."""

import re
from dataclasses import dataclass

from infer.adapter.factors import NAMES
from infer.adapter.targets import PRESETS
from infer.program.bounds import check_most
from infer.program.no_effect import refuse_idle
from infer.program.paths import expand

RECOVERY = "recovery"
"""The name of the adapter that gives back what quantization took; it stays on beside every other."""
INITS = {"default": True, "gaussian": "gaussian", "orthogonal": True, "residual": True, "loftq": True}
FROM_ERROR = ("residual", "loftq")


@dataclass
class Adapter:
    """An adapter to train: LoRA (Hu et al. 2021), or LoKr, LoHa or OFT (infer/adapter/factors.py)."""

    rank: int = 16
    """Size of the adapter: 4 to 16 for a style or a thing, 32 to 64 for much that is new. LoKr's factor w2 is whole
    where the rank is half of its size or more; OFT has none."""
    alpha: float = 16.0
    """Strength: the update is alpha / rank x B A, for LoKr and LoHa alike; OFT has none."""
    dropout: float = 0.0
    """Share of the adapter's inputs that are set to 0 in training."""
    rslora: bool = False
    """Strength alpha / sqrt(rank) (Kalajdzievski 2023), so that high ranks learn as fast."""
    dora: bool = False
    """Learn each weight column's magnitude apart from its direction (Liu et al. 2024); slower."""
    init: str = "default"
    """default (Kaiming-uniform A, zero B), gaussian (normal A, zero B) or orthogonal; or from the quantization error
    (infer/adapter/error_init.py): residual (its best approximation of this rank) or loftq (quantized again around
    it)."""
    targets: str = "attention"
    """A preset (attention, attention+mlp, double, single, all) or a regular expression over whole layer names."""
    start: str | None = None
    """A LoRA file of any program to go on from; null starts anew. Of a higher rank or more layers, the rest is new."""
    recovery: str | None = None
    """A recovery adapter (infer/recover.py) that stays on, frozen, beside this one; null uses none."""
    kind: str = "lora"
    """lora, lokr, loha or oft; the last three train on diffusers' own layers, without the fast path."""
    factor: int = 16
    """LoKr's: the sides of w1, where they divide a layer's; -1: near the root of the layer's sides."""
    block: int = 32
    """OFT's: how many inputs are turned together; must divide every layer's."""

    def __post_init__(self) -> None:
        check_most(self, "adapter.", rank=2**16, alpha=10**6, factor=2**16, block=2**10)
        expand(self, "start", "recovery")
        if self.kind not in NAMES:
            raise ValueError(f"adapter.kind is {self.kind!r}; choose one of {', '.join(NAMES)}")
        self._refuse_others()
        if self.rank < 1:
            raise ValueError(f"adapter.rank is {self.rank}; it must be 1 or more")
        if not self.alpha > 0:
            raise ValueError(f"adapter.alpha is {self.alpha}; it must be above 0 (alpha = rank is strength 1)")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapter.dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.init not in INITS:
            raise ValueError(f"adapter.init is {self.init!r}; choose one of {', '.join(INITS)}")
        if self.init == "orthogonal" and self.rank % 2:
            raise ValueError(f"adapter.rank is {self.rank}; orthogonal initialisation needs an even rank")
        if self.init != "default" and self.start is not None:
            raise ValueError(f"adapter.init is {self.init} and adapter.start is given; choose one of them")
        if self.init in FROM_ERROR and (self.dora or self.recovery is not None):
            other = "adapter.dora" if self.dora else "adapter.recovery"
            raise ValueError(
                f"adapter.init={self.init} is not made for {other}; set adapter.init=default, or leave it out"
            )
        if self.factor != -1 and self.factor < 1:
            raise ValueError(f"adapter.factor is {self.factor}; it must be 1 or more, or -1")
        if self.block < 2:
            raise ValueError(f"adapter.block is {self.block}; it must be 2 or more")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(
                f"adapter.targets {self.targets!r} is neither a preset ({', '.join(PRESETS)}) nor a regular "
                f"expression: {error}"
            ) from error

    @property
    def name(self) -> str:
        """What it is called: LoRA, DoRA, LoKr, LoHa or OFT."""
        return "DoRA" if self.dora else NAMES[self.kind]

    def words(self) -> str:
        """Its kind and size."""
        if self.kind == "oft":
            return f"{self.name}, blocks of {self.block}"
        factor = f", factor {self.factor}" if self.kind == "lokr" else ""
        return f"{self.name}, rank {self.rank}{factor}, alpha {self.alpha:g}"

    def _refuse_others(self) -> None:
        """Raises:
        ValueError: a setting belongs to another kind of adapter.
        """
        if self.kind != "lora":
            reason = f"adapter.kind is {self.kind}, and it belongs to LoRA"
            refuse_idle(self, "adapter.", ("dropout", "rslora", "dora", "init"), reason)
            if self.recovery is not None:
                raise ValueError(
                    f"adapter.recovery is {self.recovery!r}, which is a LoRA adapter, and PEFT has no LoRA beside "
                    f"adapter.kind={self.kind}; set adapter.recovery=null, or adapter.kind=lora"
                )
        if self.kind == "oft":
            refuse_idle(self, "adapter.", ("rank", "alpha"), "adapter.kind is oft, whose size is adapter.block")
        for kind, setting in (("lokr", "factor"), ("oft", "block")):
            if self.kind != kind:
                refuse_idle(self, "adapter.", (setting,), f"adapter.kind is {self.kind}, and it belongs to {kind}")
