"""LoRA dialects: reading what trainers write, writing what ComfyUI loads."""
