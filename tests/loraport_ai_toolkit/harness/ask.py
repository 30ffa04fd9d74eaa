"""Runs in ai-toolkit's interpreter: what its own classes make of configurations and captions. JSON in, JSON out.

`python ask.py CHECKOUT` reads {"configs": [paths], "captions": [texts as staged],
"text_encoders": [folders]}, each if wanted, from standard input.
"""

import ast
import inspect
import json
import os
import sys
import textwrap

checkout = sys.argv[1]
sys.path.insert(0, checkout)
import run  # noqa: E402 - the harness's

run.install()
answer_to, sys.stdout = sys.stdout, sys.stderr

import torch  # noqa: E402
from extensions_built_in.diffusion_models.ideogram4.ideogram4 import Ideogram4Model  # noqa: E402
from extensions_built_in.sd_trainer.DiffusionTrainer import DiffusionTrainer  # noqa: E402
from toolkit import config_modules as modules  # noqa: E402
from toolkit.config import get_config  # noqa: E402
from toolkit.dataloader_mixins import CaptionProcessingDTOMixin  # noqa: E402
from toolkit.ideogram_caption import digest_caption_string  # noqa: E402
from toolkit.lora_special import LoRASpecialNetwork  # noqa: E402
from toolkit.optimizer import get_optimizer  # noqa: E402
from toolkit.scheduler import get_lr_scheduler  # noqa: E402
from toolkit.util.quantize import get_qtype  # noqa: E402
from transformers import AutoModel  # noqa: E402

SECTIONS = {
    "network": modules.NetworkConfig,
    "save": modules.SaveConfig,
    "train": modules.TrainConfig,
    "model": modules.ModelConfig,
    "sample": modules.SampleConfig,
    "logging": modules.LoggingConfig,
}


def keys_read(owner, methods=("get", "get_conf")):
    """Every text that a class's code passes first to a method called get or get_conf."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    return {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in methods
        and node.args
        and isinstance(node.args[0], ast.Constant)
    }


def read_by():
    read = {name: keys_read(owner) for name, owner in SECTIONS.items()}
    read["datasets"] = keys_read(modules.DatasetConfig)
    read["train.ema_config"] = keys_read(modules.EMAConfig)
    read["train.validation_config"] = keys_read(modules.ValidationConfig)
    read["sample.samples"] = keys_read(modules.SampleItem)
    read["model.model_kwargs"] = keys_read(Ideogram4Model)
    read["network.network_kwargs"] = set(inspect.signature(LoRASpecialNetwork.__init__).parameters)
    read["process"] = {"type"}.union(*(keys_read(owner) for owner in DiffusionTrainer.__mro__ if owner is not object))
    return {name: sorted(keys) for name, keys in read.items()}


def plain(value):
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return (
        {key: plain(one) for key, one in vars(value).items()}
        if type(value).__module__.startswith("toolkit")
        else str(value)
    )


def rates(train):
    """The learning rate of each step, by ai-toolkit's own optimizer and scheduler, driven as its loop drives them."""
    parameters = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": train.lr}]
    name = "adamw" if train.optimizer.endswith("8bit") or train.optimizer == "prodigy" else train.optimizer
    optimizer = get_optimizer(parameters, name, learning_rate=train.lr, optimizer_params=dict(train.optimizer_params))
    scheduler = get_lr_scheduler(train.lr_scheduler, optimizer, **train.lr_scheduler_params, total_iters=train.steps)
    optimizer.zero_grad()
    scheduler.step(0)
    found = []
    for _ in range(train.steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def parsed(path):
    config = get_config(path)
    process = config["config"]["process"][0]
    objects = {name: owner(**process[name]) for name, owner in SECTIONS.items()}
    datasets = [modules.DatasetConfig(**one) for one in modules.preprocess_dataset_raw_config(process["datasets"])]
    modules.validate_configs(objects["train"], objects["model"], objects["save"], datasets)
    if objects["model"].quantize:
        get_qtype(objects["model"].qtype), get_qtype(objects["model"].qtype_te)
    found = {name: plain(one) for name, one in objects.items()}
    return {**found, "datasets": plain(datasets), "process": process, "rates": rates(objects["train"])}


def caption(text):
    item = object.__new__(CaptionProcessingDTOMixin)
    item.raw_caption, item.trigger_word, item.is_reg = text, None, False
    item.dataset_config = modules.DatasetConfig(folder_path="x", cache_text_embeddings=True)
    return digest_caption_string(item.get_caption())


def spread_of_weights(folder):
    """Of a matrix of a text encoder's first layer, loaded as ai-toolkit loads it."""
    encoder = AutoModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    return encoder.language_model.layers[0].self_attn.q_proj.weight.float().std().item()


asked = json.load(sys.stdin)
os.chdir(checkout)
answer = {
    "configs": [parsed(path) for path in asked.get("configs", [])],
    "captions": [caption(text) for text in asked.get("captions", [])],
    "text_encoders": [spread_of_weights(folder) for folder in asked.get("text_encoders", [])],
    "read": read_by(),
}
json.dump(answer, answer_to)
