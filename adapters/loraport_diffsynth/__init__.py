"""DiffSynth-Studio behind LoraPort's port."""
