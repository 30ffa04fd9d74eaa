"""Files that lie, made from whole LoRAs by faults: in the header, the shapes, the numbers, the names, the metadata."""

import json
import random
import struct

import ml_dtypes
import numpy as np

NAMES = [
    "diffusion_model.layers.0.attention.qkv",
    "transformer.layers.0.attention.to_q",
    "transformer.layers.0.attention.to_k",
    "transformer.layers.0.attention.to_v",
    "lora_unet_layers_0_attention_qkv",
    "lycoris_layers_0_feed_forward_w1",
    "base_model.model.layers.0.attention.o",
    "transformer.base_model.model.layers.0.attention.o",
    "layers.0.feed_forward.w2",
    "transformer.single_transformer_blocks.0.attn.to_q",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1",
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
    "diffusion_model.blocks.0.self_attn.q",
    "lycoris_layers_0_ffn_norm2",
    "oft_unet_single_blocks_0_linear1",
    "",
    "a" * 300,
    "../../etc/passwd",
    "layers.0\u0000x",
]
LOW = [
    ("lora_up.weight", "lora_down.weight"),
    ("lora_B.weight", "lora_A.weight"),
    ("lora_B.default.weight", "lora_A.default.weight"),
    ("lora.up.weight", "lora.down.weight"),
    ("lora_linear_layer.up.weight", "lora_linear_layer.down.weight"),
]
ODD = [
    "alpha", "dora_scale", "lora_magnitude_vector", "lora_mid.weight", "hada_w1_a", "hada_w1_b", "hada_w2_a",
    "hada_w2_b", "hada_t1", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    "diff", "diff_b", "lora_B.bias", "reshape_weight", "oft_blocks", "bias", "weight", "w_norm", "secret",
    "hada_t2", "rescale", "a1.weight", "a2.weight", "b1.weight", "b2.weight", "lokr_t1", "set_weight", "on_input",
    "b_norm", "diff_m", "oft_blocks.0", "oft_blocks.1", "lora_A.other.weight", "lora_B.other.weight", "bias.diff",
]  # fmt: skip
CODES = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F64": np.float64,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
DAMAGED = ["[]", "{", "[" * 5000, '"x"', "null", '{"lora_alpha": "x"}', '{"transformer.lora_alpha": null}']
METADATA = {
    "lora_adapter_metadata": [
        *DAMAGED,
        '{"transformer.lora_alpha": 8, "transformer.r": 4}',
        '{"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"(": 1}}',
        '{"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"(a+)+$": 1, "(.*)*x": 2}}',
        '{"transformer.lora_alpha": 1e400}',
        '{"transformer.lora_alpha": 8, "transformer.alpha_pattern": []}',
    ],
    "ss_network_alpha": ["1", "nan", "x", "1e400", "-1"],
    "ss_network_dim": ["2", "0", "x", "-2"],
    "loraport.family": ["ideogram4", "flux1", "nothing", "../x"],
    "loraport.scales": [*DAMAGED, '{"layers.0.feed_forward.w2": "x"}'],
    "loraport.format": ["loraport-native-1"],
    "loraport.simpletuner.alpha": ["4", "x"],
    "path": ["/etc/passwd", "../../../x", "C:\\x"],
    "modelspec.title": ["\u0000", "x" * 3000, "\ud83d\ude00"],
}


def numbers(rng, shape, dtype):
    with np.errstate(all="ignore"):
        return np.asarray(rng.standard_normal(shape) * 0.1).astype(dtype)


def whole(choose, rng):
    """The tensors of a LoRA of a few modules, with now and then an odd one."""
    tensors = {}
    dtype = CODES[choose.choice(["F32", "F16", "BF16", "F8_E4M3"])]
    for name in choose.sample(NAMES[:16], choose.randint(1, 4)):
        up, down = choose.choice(LOW)
        rank, out, columns = choose.randint(1, 3), choose.choice([6, 12]), choose.choice([4, 8])
        tensors[f"{name}.{down}"] = numbers(rng, (rank, columns), dtype)
        tensors[f"{name}.{up}"] = numbers(rng, (out, rank), dtype)
        if choose.random() < 0.6:
            tensors[f"{name}.alpha"] = np.array(choose.choice([1, 2, 0.5]), np.float32)
    return tensors


def odd_tensors(tensors, choose, rng):
    """Tensors that belong to another kind, of any shape and dtype, some over the good ones."""
    names = [*NAMES, *(key.rpartition(".lora")[0] for key in tensors)]
    for _ in range(choose.randint(1, 4)):
        shape = tuple(choose.choice([0, 1, 2, 3, 4, 6, 12]) for _ in range(choose.randint(0, 4)))
        end = choose.choice([*ODD, *choose.choice(LOW)])
        tensors[f"{choose.choice(names)}.{end}"] = numbers(rng, shape, choose.choice(list(CODES.values())))


def bad_numbers(tensors, choose, rng):
    key = choose.choice(sorted(tensors))
    array = tensors[key]
    if array.size:
        bad = choose.choice([np.nan, np.inf, -np.inf, 0, 1e30, -1e30] if array.dtype.kind in "fV" else [0, 1])
        with np.errstate(all="ignore"):
            array.flat[choose.randrange(array.size)] = np.float32(bad).astype(array.dtype)


def lost(tensors, choose, rng):
    del tensors[choose.choice(sorted(tensors))]


def lying_header(header, choose):
    key = choose.choice(sorted(header))
    entry = header[key]
    if not isinstance(entry, dict) or "shape" not in entry:
        return
    huge = choose.choice([-1, 0, 1, 2**31, 2**62, 2**64, 10**30, 1.5, "4", None, True, []])
    match choose.randrange(8):
        case 0:
            entry["shape"] = [huge, *entry["shape"][1:]]
        case 1:
            entry["shape"] = [*entry["shape"], huge]
        case 2:
            entry["data_offsets"] = [entry["data_offsets"][0], huge]
        case 3:
            entry["data_offsets"] = [huge, entry["data_offsets"][1]]
        case 4:
            entry["dtype"] = choose.choice(["F99", "", None, 3, "I8", "U64", "C64", "F4", "F8_E8M0", *CODES])
        case 5:
            entry.pop(choose.choice(sorted(entry)))
        case 6:
            header[choose.choice(NAMES) + ".alpha"] = dict(entry)  # two tensors of the same bytes
        case 7:
            entry["shape"] = [0, 2**62]
            entry["data_offsets"] = [entry["data_offsets"][0]] * 2


def file_of(seed, faults):
    """The bytes of a file with these faults: tensors, numbers, lost, header, metadata, text, bytes, cut, longer."""
    choose, rng = random.Random(seed), np.random.default_rng(seed)
    tensors = whole(choose, rng)
    for fault, make in (("tensors", odd_tensors), ("numbers", bad_numbers), ("lost", lost)):
        if fault in faults and tensors:
            make(tensors, choose, rng)
    header, parts, offset = {}, [], 0
    codes = {np.dtype(kind): code for code, kind in CODES.items()}
    for key, array in tensors.items():
        header[key] = {
            "dtype": codes[array.dtype],
            "shape": [*array.shape],
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
        parts.append(array.tobytes())
    if "header" in faults and header:
        lying_header(header, choose)
    if "metadata" in faults:
        keys = choose.sample(sorted(METADATA), choose.randint(1, 3))
        header["__metadata__"] = {key: choose.choice(METADATA[key]) for key in keys}
    text = json.dumps(header).encode()
    if "text" in faults:
        at = choose.randrange(len(text))
        text = (
            text[:at]
            + choose.choice([b"\xff", b"[", b'"', b"}", b"9" * 400, b"[" * 3000, b"", b",", b"NaN"])
            + text[at + 1 :]
        )
    raw = bytearray(struct.pack("<Q", len(text)) + text + b"".join(parts))
    if "bytes" in faults:
        for _ in range(choose.randint(1, 5)):
            raw[choose.randrange(len(raw))] = choose.randrange(256)
    if "length" in faults:
        raw[:8] = struct.pack("<Q", choose.choice([0, 1, 2**63, 2**64 - 1, len(text) - 1, len(text) + 8, 100_000_001]))
    if "cut" in faults:
        raw = raw[: choose.randrange(len(raw))]
    if "longer" in faults:
        raw += bytes(choose.randint(1, 64))
    return bytes(raw)


FAULTS = ["tensors", "numbers", "lost", "header", "metadata", "text", "bytes", "length", "cut", "longer"]
