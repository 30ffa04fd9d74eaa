"""The numbers of a dataset for a terminal and as plain data, and the advice that follows from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from loraport.advice import RANKS_RANGE, SetFacts, advice_for, many_images, together
from loraport.disk import size_text
from loraport.sets import image_sets
from loraport_dataset.display import totals
from loraport_dataset.findings import printable
from loraport_dataset.stats import GRID, Stats, areas, general_advice, spread

if TYPE_CHECKING:
    from loraport.advice import Advice
    from loraport.spec.models import TrainSpec
    from loraport_dataset.findings import Report

_BUCKETS = 8  #: that a terminal is told, the fullest


def advice_of(spec: TrainSpec, stats: list[Stats]) -> Advice:
    """The advice for a spec from the very sizes and captions of its images."""
    facts = [
        SetFacts(one, each.trainable, each.pixels, sum(each.tokens))
        for one, each in zip(image_sets(spec.dataset), stats, strict=False)  # held-out images come last
    ]
    return advice_for(spec, facts=together(spec, facts, exact=True))


def show(stats: list[Stats], report: Report, advice: Advice | None) -> None:
    """Print a few lines on each set, the findings in one, and the advice."""
    for each in stats:
        of = each.source
        typer.secho(f"{printable(str(of.folder))}" + (f" ({of.title})" if len(stats) > 1 else ""), bold=True)
        for heading, text in _lines(each):
            typer.echo(f"  {heading:9} {printable(text)}")
    typer.echo(f"{totals(report)}: loraport dataset check tells them.")
    if advice is not None:
        typer.secho("\n" + "\n".join(f"{heading}: {text}" for heading, text in advice.lines()), dim=True)
        return
    typer.secho("\nAdvice (public guides, at batch size 1):", dim=True)
    for purpose, range_text, steps in general_advice(stats):
        typer.secho(f"  {steps} steps for {purpose} ({range_text})", dim=True)
    if many := many_images(sum(each.trainable for each in stats)):
        typer.secho(f"  {many}", dim=True)
    typer.secho(f"  a rank of {RANKS_RANGE}", dim=True)


def to_dict(stats: list[Stats], report: Report, advice: Advice | None) -> dict[str, Any]:
    """All numbers as plain data for JSON."""
    return {
        "version": 1,
        "sets": [_set(each) for each in stats],
        "findings": {name: value for name, value in report.summary().items() if name != "datasets"},
        "advice": advice.to_dict()
        if advice is not None
        else [{"purpose": purpose, "range": text, "steps": steps} for purpose, text, steps in general_advice(stats)],
    }


def _lines(stats: Stats) -> list[tuple[str, str]]:
    middle, tokens = spread(areas(stats.sizes).elements()), spread(stats.tokens)
    found = [("images", f"{stats.images:,}, {size_text(stats.bytes)}" + _but(stats))]
    if middle:
        least, median, most = (f"{middle[name] / 1e6:.2g}" for name in ("least", "median", "most"))
        found.append(("sizes", f"{least} to {most} megapixels, {median} in the middle"))
    fullest = sorted(stats.buckets.items(), key=lambda item: (-item[1].images, item[0]))
    told = ", ".join(f"{width}x{height}: {of.images:,}" for (width, height), of in fullest[:_BUCKETS])
    more = f" and {len(fullest) - _BUCKETS} more" if len(fullest) > _BUCKETS else ""
    found.append(("buckets", f"{told}{more}" if told else "none"))
    if tokens:
        lengths = f"{tokens['least']:,} to {tokens['most']:,} tokens, {tokens['median']:,} in the middle"
        found.append(("captions", f"{lengths}; {stats.source.tokens or 'estimated'}"))
    boxes = {
        "of things": stats.heat["obj"].boxes,
        "of text": stats.heat["text"].boxes,
        "unusable": stats.unusable_boxes,
    }
    if any(boxes.values()):
        found.append(("boxes", ", ".join(f"{count:,} {what}" for what, count in boxes.items() if count)))
    colours = [colour for colour, _ in (stats.style_colours + stats.element_colours).most_common(6)]
    if colours:
        found.append(("colours", " ".join(colours)))
    return found


def _but(stats: Stats) -> str:
    faults = {
        "cannot be read": stats.unreadable,
        "too small for any bucket": stats.too_small,
        "without a caption that can be used": stats.uncaptioned,
    }
    return "".join(f"; {count:,} {fault}" for fault, count in faults.items() if count)


def _set(stats: Stats) -> dict[str, Any]:
    setting, source = stats.setting, stats.source
    return {
        "set": source.title,
        "folder": str(source.folder),
        "family": setting.family.name,
        "resolution": setting.resolution,
        "images": stats.images,
        "unreadable": stats.unreadable,
        "too_small": stats.too_small,
        "without_caption": stats.uncaptioned,
        "bytes": stats.bytes,
        "formats": dict(stats.formats.most_common()),
        "sizes": [{"size": size, "images": count} for size, count in stats.sizes.most_common()],
        "buckets": [
            {
                "size": size,
                "images": of.images,
                "scale": round(of.scale / of.images, 4),
                "cropped": round(of.cropped / of.images, 4),
                "most_cropped": round(of.most_cropped, 4),
            }
            for size, of in sorted(stats.buckets.items(), key=lambda item: -item[1].images)
        ],
        "tokens": {"exact": setting.count_tokens is not None, "source": source.tokens, "spread": spread(stats.tokens)},
        "json_captions": stats.json_captions,
        "media": dict(stats.media.most_common()),
        "elements_a_caption": {str(count): captions for count, captions in sorted(stats.elements.items())},
        "style_colours": dict(stats.style_colours.most_common()),
        "element_colours": dict(stats.element_colours.most_common()),
        "boxes": {
            "unusable": stats.unusable_boxes,
            "grid": GRID,
            **{kind: {"boxes": heat.boxes, "covering": heat.rows()} for kind, heat in stats.heat.items()},
        },
    }
