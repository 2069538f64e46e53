"""A comparison in plain English, at most five sentences, and what each score means: for terminal, page and Markdown."""

from collections.abc import Sequence
from statistics import fmean

from infer.report.cells import number, size
from infer.report.means import by_memory, score_names, score_of, summary_of
from infer.report.results import Comparison, Estimate, Summary

MEANING = {
    "psnr": ("likeness of the pixels in dB, from 30 on hardly to be seen", "higher"),
    "ssim": ("likeness of structures, up to 1", "higher"),
    "latents": ("distance before decoding, as a share", "lower"),
    "lpips": ("distance as a network sees it", "lower"),
    "kept_psnr": ("likeness to the reference outside of the mask in dB: what should not have changed", "higher"),
    "kept_lpips": ("distance from the reference outside of the mask, as a network sees it", "lower"),
    "changed": ("difference from the reference within the mask, 0 to 1: near 0 nothing was edited", "higher"),
    "target_psnr": ("likeness to the target in dB", "higher"),
    "target_ssim": ("likeness to the target's structures, up to 1", "higher"),
    "target_lpips": ("distance from the target as a network sees it", "lower"),
    "clip_t": ("how well the picture fits its prompt (CLIP)", "higher"),
    "clip_i": ("likeness to the training pictures (CLIP)", "higher"),
    "dino": ("likeness to the training pictures (DINO)", "higher"),
    "image_reward": ("what people are taken to prefer", "higher"),
    "kid": ("distance of all pictures together from the training pictures", "lower"),
    "cmmd": ("distance of all pictures together from the training pictures, by CLIP", "lower"),
    "nearest_rms": ("distance to the nearest training picture: near 0 it was learned by heart", "higher"),
    "nearest_dino": ("likeness to the nearest training picture: near 1 it was learned by heart", "lower"),
}
"""Of each kind of score: what it is, and which way is better."""
ELSEWHERE = {"drift": "unrelated prompts", "bleed": "prompts of the class"}
FEW = 30  # pictures a variant below which differences are easily chance


def meaning(name: str) -> str:
    """What a score is and which way is better, in one line; of the user's own scores that it is theirs."""
    where = next((prefix for prefix in ELSEWHERE if name.startswith(f"{prefix}_")), None)
    kind, _, other = name.removeprefix(f"{where}_").partition("_")
    if name in MEANING:
        what, better = MEANING[name]
        return f"{what}; {better} is better"
    if kind not in MEANING:
        own = "a score of your own (`scores`)"
        return own if where is None else f"{own}: what the adapter changes of it on {ELSEWHERE[where]}; 0 is best"
    what, better = MEANING[kind]
    if where is not None:
        said = f"{what}, to the picture without the adapter on {ELSEWHERE[where]}"
        return f"{said}; {better} is better: it leaks less"
    if other == "base":
        return f"{what}, to the picture without the adapter: how much it changes, neither good nor bad"
    return f"{what}, to the picture at {other}; {better} is better"


def arrow(name: str) -> str:
    """Which way is better, as a sign behind a column's name; nothing where neither is."""
    said = meaning(name)
    return " ↑" if "higher is better" in said else " ↓" if "lower is better" in said else ""


def in_words(comparison: Comparison) -> list[str]:
    """At most five sentences: what was compared, what precision costs, what the adapter did, what to trust."""
    entries = summary_of(comparison)
    names = by_memory(comparison.rows)
    return [_compared(comparison, names), *_cost(entries, names), *_adapter(entries), _trust(comparison, entries)]


def unmeasured(comparison: Comparison) -> str:
    """What was not measured, grouped by the reason, in one line; empty if all was."""
    reasons: dict[str, list[str]] = {}
    for name, why in (comparison.absent or {}).items():
        reasons.setdefault(why, []).append(name)
    parts = "; ".join(f"{', '.join(found)} ({why})" for why, found in reasons.items())
    return f"Not measured: {parts}." if parts else ""


def _compared(comparison: Comparison, names: Sequence[str]) -> str:
    rows = comparison.rows
    adapters = [name for name in dict.fromkeys(row.adapter for row in rows) if name is not None]
    how = f", without an adapter and with {' and '.join(adapters)}" if adapters else ""
    prompts, seeds = ({getattr(row, what) for row in rows} for what in ("asked", "seed"))
    many = f"{len(prompts)} prompt{'s' * (len(prompts) > 1)} and {len(seeds)} seed{'s' * (len(seeds) > 1)}"
    drawn = f"{len(rows)} picture{'s' * (len(rows) > 1)}"
    return f"{drawn} were drawn at {_listed(names)}{how}, from the same {many}."


def _cost(entries: Sequence[Summary], names: Sequence[str]) -> list[str]:
    """What each other precision saves and changes against bf16, where that was drawn."""
    bare = {entry.precision: entry for entry in entries if entry.adapter is None} or {e.precision: e for e in entries}
    whole = bare.get("bf16")
    parts: list[str] = []
    for name in names:
        if whole is None or name == "bf16" or name not in bare:
            continue
        first = not parts
        share = f"{name}{' takes' if first else ''} {100 * bare[name].weights_bytes / whole.weights_bytes:.0f} %"
        like = score_of(bare[name], "psnr_bf16")
        how = "the likeness of its pictures to bf16's is {} dB" if first else "{} dB"
        parts.append(share + (" of that" if first else "") + (f" ({how.format(number(like.mean))})" if like else ""))
    if not parts or whole is None:
        return []
    hint = "; from 30 dB on the eye hardly sees a difference" if any("dB" in part for part in parts) else ""
    return [f"The transformer's weights take {size(whole.weights_bytes)} in bf16; {_listed(parts)}{hint}."]


def _adapter(entries: Sequence[Summary]) -> list[str]:
    """What an adapter changed for certain: scores whose paired difference from the base has limits on one side of 0."""
    own: dict[str, list[Estimate]] = {}
    changes: dict[str, list[float]] = {}
    for entry in entries:
        if entry.adapter is None:
            continue
        if (change := score_of(entry, "psnr_base")) is not None:
            changes.setdefault(entry.adapter, []).append(change.mean)
        for name, found in (entry.differences or {}).get("base", {}).items():
            if name in MEANING or name.partition("_")[0] not in MEANING:  # no distance to another picture
                own.setdefault(f"{entry.adapter} {name}", []).append(found)
    said = []
    for adapter in dict.fromkeys(entry.adapter for entry in entries if entry.adapter is not None):
        sure = []
        for key, estimates in own.items():
            if key.startswith(f"{adapter} ") and all(map(_certain, estimates)):
                mean = fmean(one.mean for one in estimates)
                sure.append(f"{key.removeprefix(f'{adapter} ')} by {mean:+.3g}")
        likeness = f" (likeness {number(fmean(changes[adapter]))} dB)" if adapter in changes else ""
        parts = [f"with {adapter} the pictures depart from those without it{likeness}"]
        parts += [f"beyond chance it changes {_listed(sure)}"] if sure else []
        for kind, where in ELSEWHERE.items():
            alike = [entry.scores.get(f"{kind}_psnr") for entry in entries if entry.adapter == adapter]
            leaks = [value for value in alike if value is not None]
            higher = "the higher, the less it leaks"
            parts += [f"on {where} the likeness is {number(fmean(leaks))} dB ({higher})"] if leaks else []
        said.append(_listed(parts))
    return [f"{_upper('; '.join(said))}."] if said else []


def _trust(comparison: Comparison, entries: Sequence[Summary]) -> str:
    images = min(entry.images for entry in entries)
    few = f"{images} picture{'s' * (images > 1)} a row {'are' if images > 1 else 'is'}"
    if images < FEW:
        few += " few: trust differences whose 95 % limits leave out 0, and draw more prompts or seeds for the others"
    else:
        few += " enough for differences whose 95 % limits leave out 0"
    return f"{few}; seconds hold for {comparison.device} alone."


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _certain(found: Estimate) -> bool:
    return found.low is not None and found.high is not None and (found.low > 0 or found.high < 0)


def _listed(parts: Sequence[str]) -> str:
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]


def explained_scores(entries: Sequence[Summary]) -> list[tuple[str, str]]:
    """Each score that was measured, with its meaning."""
    return [(name, meaning(name)) for name in score_names(entries)]
