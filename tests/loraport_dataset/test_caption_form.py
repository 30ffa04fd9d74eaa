from __future__ import annotations

from dataclasses import replace

from loraport.ideogram4 import IDEOGRAM4
from loraport.rules import Setting
from loraport_dataset.captioning.form import Form


def test_a_family_with_plain_captions_gets_one_line_of_text() -> None:
    plain = replace(IDEOGRAM4, caption_format="text", caption_schema=None)
    family = replace(plain, place_trigger=lambda text, word: f"{word} {text}")
    form = Form(Setting(family, trigger_word="mp_dog"))
    assert form.schema is None
    assert form.read("<think>hm</think> A dog\nruns. ").caption == "mp_dog A dog runs."
    assert form.read(" ").caption is None
