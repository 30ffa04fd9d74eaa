"""Lets a trainer's own code write LoRA files, in a process of its own, and writes down what they mean to it.

python trainers_child.py TRAINER CHECKOUT FOLDER: FOLDER/cases.json holds, by case, the modules of a model with their
shapes, the classes of the containers that the trainer looks for, and how its network is made. FOLDER/CASE.safetensors
gets what it saves, and FOLDER/CASE.expected what each module then computes more on unit inputs: its ΔW.
"""

import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
from comfyui_child import Absent

#: What the trainers import at the top of the files that are needed here, and do not use there.
UNUSED = {"torchvision", "cv2", "optimum", "torchao", "toml", "oyaml", "dotenv", "flatten_json", "lpips", "k_diffusion"}
UNUSED |= {"controlnet_aux", "albumentations", "av", "torchaudio", "scipy", "tqdm", "timm", "kornia"}

#: Kinds of tensors that ai-toolkit asks about, and where they are from.
QUANTISED = {
    "QTensor": "optimum.quanto",
    "QBytesTensor": "optimum.quanto",
    "AffineQuantizedTensor": "torchao.dtypes",
}


def build(modules, classes):
    """A model with these modules and nothing else: random weights, containers of the given class names."""
    torch.manual_seed(0)
    root = type("Model", (torch.nn.Module,), {})()
    for name, shape in modules.items():
        parent, path = root, ""
        *containers, last = name.split(".")
        for each in containers:
            path = f"{path}.{each}".lstrip(".")
            if each not in parent._modules:
                kind = next((kind for pattern, kind in classes.items() if re.fullmatch(pattern, path)), "Box")
                parent.add_module(each, type(kind, (torch.nn.Module,), {})())
            parent = parent._modules[each]
        rows, columns, *kernel = shape
        made = torch.nn.Conv2d(columns, rows, kernel) if kernel else torch.nn.Linear(columns, rows, bias=False)
        parent.add_module(last, made)
    return root


def changes(model, before):
    """ΔW of every module, from what it computes now beyond its weight."""
    found = {}
    for name, module in model.named_modules():
        weight = before.get(name)
        if weight is None:
            continue
        with torch.no_grad():
            if weight.ndim == 2:
                now = module(torch.eye(weight.shape[1])).T
            else:
                # A unit input the size of the kernel, for each number of the kernel.
                units = torch.eye(weight[0].numel()).reshape(-1, *weight.shape[1:])
                bias = 0 if module.bias is None else module.bias
                now = (module(units)[:, :, 0, 0] - bias).T.reshape(weight.shape)
        change = (now - weight).contiguous()
        if change.norm() > 1e-4 * weight.norm():
            found[name] = change
    return found


def weights(model):
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {name: m.weight.detach().clone() for name, m in model.named_modules() if isinstance(m, kinds)}


def randomised(network):
    torch.manual_seed(1)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network.eval()


def musubi(case, unet, encoders, path):
    module = importlib.import_module(f"musubi_tuner.networks.{case['network']}")
    network = module.create_arch_network(1.0, 4, 1.5, None, [], unet, **case.get("options", {}))
    network.apply_to([], unet, False, True)
    randomised(network).save_weights(str(path), torch.float32, {"ss_network_dim": "4"})
    return network


def sd_scripts(case, unet, encoders, path):
    module = importlib.import_module(f"networks.{case['network']}")
    network = module.create_network(1.0, 4, 1.5, None, encoders, unet, **case.get("options", {}))
    network.apply_to(encoders, unet, bool(encoders), True)
    state = randomised(network).state_dict()
    # Its `save_weights` adds hashes to the metadata, by code that imports all of the trainer.
    state = {key: tensor.detach().clone().contiguous() for key, tensor in state.items()}
    save_file(state, str(path), {"ss_network_module": f"networks.{case['network']}"})
    return network


def ai_toolkit(case, unet, encoders, path):
    for kind, package in QUANTISED.items():
        module = importlib.import_module(package)
        if not isinstance(getattr(module, kind), type):  # an absent package: no tensor is of its kinds
            setattr(module, kind, type(kind, (), {}))
    special = importlib.import_module("toolkit.lora_special")

    class Base:
        """The part of its models that renames, as those of its transformers do."""

        use_old_lokr_format = False

        def convert_lora_weights_before_save(self, state):
            return {key.replace("transformer.", case["prefix"], 1): value for key, value in state.items()}

    config = SimpleNamespace(lokr_factor=4, lokr_full_rank=True, old_lokr_format=False, all_layers=False)
    options = {"network_type": case["type"], "network_config": config, "target_lin_modules": ["Model"]}
    model = Base()
    network = special.LoRASpecialNetwork(
        None, unet, lora_dim=4, alpha=1.5, train_text_encoder=False, is_transformer=True, base_model=model, **options
    )
    network.apply_to(None, unet, False, True)
    randomised(network).save_weights(str(path), torch.float32, {"software": json.dumps({"name": "ai-toolkit"})})
    network.force_to("cpu", torch.float32)
    network.is_active = True
    network._update_torch_multiplier()
    return network, model


TRAINERS = {"musubi": musubi, "sd-scripts": sd_scripts, "ai-toolkit": ai_toolkit}
SOURCES = {"musubi": "src", "sd-scripts": "", "ai-toolkit": ""}


def encoders_of(kinds):
    """Tiny text encoders of transformers."""
    import transformers

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = []
    for kind in kinds:
        torch.manual_seed(len(made))
        if kind == "t5":
            config = transformers.T5Config(
                d_model=8, d_ff=16, d_kv=4, num_heads=2, num_layers=2, vocab_size=20, feed_forward_proj="gated-gelu"
            )
            made.append(transformers.T5EncoderModel(config))
        else:
            config = transformers.CLIPTextConfig(**sizes, vocab_size=20, max_position_embeddings=8)
            made.append(transformers.CLIPTextModel(config))
    return made


def main(trainer, checkout, folder):
    sys.path.insert(0, str(checkout / SOURCES[trainer]))
    missing = {name for name in UNUSED if importlib.util.find_spec(name) is None}
    sys.meta_path.insert(0, Absent(missing))
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        models = {"": build(case["modules"], case["classes"])}
        models |= {f"{number}:": each for number, each in enumerate(encoders_of(case.get("encoders", [])))}
        before = {prefix: weights(model) for prefix, model in models.items()}
        unet, *encoders = models.values()
        kept = TRAINERS[trainer](case, unet, encoders, folder / f"{name}.safetensors")
        changed = {prefix: changes(model, before[prefix]) for prefix, model in models.items()}
        expected = {f"{prefix}{each}": change for prefix, found in changed.items() for each, change in found.items()}
        save_file(expected, str(folder / f"{name}.expected"))
        del kept


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
