from loraport_convert.plugin import register_dialects


def test_the_plugin_brings_its_dialects():
    found = []
    register_dialects(found.append)
    assert [dialect.name for dialect in found] == [
        "comfyui",
        "peft",
        "diffusers",
        "kohya",
        "lycoris",
        "ai-toolkit",
        "onetrainer",
        "diffsynth",
        "old-diffusers",
        "bare",
    ]
