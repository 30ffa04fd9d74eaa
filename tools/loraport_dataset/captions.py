"""The rules over one caption's text, without a folder."""

from __future__ import annotations

from loraport.caption_json import make_caption
from loraport.rules import Finding, Setting
from loraport_dataset.checking import caption_findings


def check_caption(text: str, family: str = "ideogram4") -> list[Finding]:
    """What the family's caption rules find in a text; none for a caption as the model was taught it.

    Raises SpecError for a family that is not installed.
    """
    from loraport_dataset.sources import find_family

    setting = Setting(find_family(family))
    extension = "json" if setting.family.caption_format == "json" else "txt"
    return caption_findings(make_caption(f"caption.{extension}", text, setting.family.caption_format), setting)
