"""Asks a real ComfyUI, on the CPU and in a process of its own, whether it would accept workflows.

python workflow_child.py CHECKOUT FOLDER: FOLDER holds workflows as *.json, and empty model files in models/ that its
loaders may name. report.json gets, for each workflow, what ComfyUI's own check of a prompt says: [] or its complaints.
"""

import asyncio
import importlib.util
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from comfyui_child import UNUSED, Absent

KEEP = ["custom_sampler", "ideogram4", "flux", "sd3", "model_advanced", "hunyuan", "lumina2", "qwen", "wan"]


def main(checkout, folder):
    sys.meta_path.insert(0, Absent({name for name in {*UNUSED, "alembic"} if importlib.util.find_spec(name) is None}))
    sys.path.insert(0, checkout)
    sys.argv = ["comfyui", "--cpu", "--base-directory", str(folder)]
    import comfy.options

    comfy.options.enable_args_parsing()
    import execution
    import nodes

    async def check():
        await nodes.init_public_apis()
        for name in KEEP:
            path = Path(checkout) / "comfy_extras" / f"nodes_{name}.py"
            assert await nodes.load_custom_node(str(path), module_parent="comfy_extras"), path
        report = {}
        for path in sorted(folder.glob("*.json")):
            valid, error, good, node_errors = await execution.validate_prompt("1", json.loads(path.read_text()), None)
            complaints = [error] if error else []
            complaints += [each for found in node_errors.values() for each in found["errors"]]
            outputs = sum(node["class_type"] == "SaveImage" for node in json.loads(path.read_text()).values())
            report[path.stem] = {"valid": valid, "complaints": complaints, "outputs": [len(good), outputs]}
        (folder / "report").write_text(json.dumps(report))

    asyncio.run(check())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
