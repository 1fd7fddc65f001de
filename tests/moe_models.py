"""Tiny mixtures of experts under their authors' key names, and what they must give: transformers'
layers with the papers' formula in place of the MLPs.

Independent of the package under test: transformers has no such models, so the formula is written
here a second time, one token at a time.
"""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import write_model
from safetensors.torch import load_file

LAYERS = 3
# Published models of the family, by name: text model, whether there is a meta expert.
MODELS = {
    "moe-tinymed": ("StableLm", False),
    "med-moe": ("StableLm", True),
    "moe-tinymed-phi": ("Phi", False),
    "med-moe-phi": ("Phi", True),
    "moe-llava-qwen": ("Qwen2", False),
}
EXPERT = "deepspeed_moe.experts.deepspeed_experts."
ROUTER = "deepspeed_moe.gate.wg"
META = "meta_moe."


def write(path: Path, name: str, seed: int = 0, **changes: object) -> Path:
    numbers: dict[str, object] = {"num_hidden_layers": LAYERS}
    if name != "moe-llava-qwen":  # Qwen (1) has as many of them as heads
        numbers["num_key_value_heads"] = 2
    return write_model(path, family=name, seed=seed, **{**numbers, **changes})


def one_mlp(tensors: dict[str, torch.Tensor], at: str, x: torch.Tensor) -> torch.Tensor:
    """An MLP of StableLM, Phi or Qwen, whichever the names at `at` say."""
    functional = torch.nn.functional
    if f"{at}fc1.weight" in tensors:
        hidden = functional.gelu(
            x @ tensors[f"{at}fc1.weight"].T + tensors[f"{at}fc1.bias"], approximate="tanh"
        )
        return hidden @ tensors[f"{at}fc2.weight"].T + tensors[f"{at}fc2.bias"]
    if f"{at}w1.weight" in tensors:
        return (
            x @ tensors[f"{at}w1.weight"].T * functional.silu(x @ tensors[f"{at}w2.weight"].T)
        ) @ tensors[f"{at}c_proj.weight"].T
    return (
        functional.silu(x @ tensors[f"{at}gate_proj.weight"].T)
        * (x @ tensors[f"{at}up_proj.weight"].T)
    ) @ tensors[f"{at}down_proj.weight"].T


def sparse(tensors: dict[str, torch.Tensor], at: str, x: torch.Tensor) -> torch.Tensor:
    """A sparse layer's output for x [.., hidden]: two experts renormalised, or one and the meta
    expert.
    """
    flat = x.reshape(-1, x.shape[-1])
    out = []
    count = len({key.split(".")[-3] for key in tensors if key.startswith(at + EXPERT)})
    for token in flat:
        scores = tensors[f"{at}{ROUTER}.weight"].float() @ token.float() + tensors.get(
            f"{at}{ROUTER}.bias", torch.zeros(count)
        )
        gates = scores.softmax(0)
        best = gates.argsort(descending=True)
        if any(key.startswith(at + META) for key in tensors):
            out.append(
                gates[best[0]] * one_mlp(tensors, f"{at}{EXPERT}{best[0]}.", token)
                + one_mlp(tensors, f"{at}{META}", token)
            )
        else:
            total = gates[best[0]] + gates[best[1]]
            out.append(
                sum(gates[e] * one_mlp(tensors, f"{at}{EXPERT}{e}.", token) for e in best[:2])
                / total
            )
    return torch.stack(out).reshape(x.shape)


class Mlp(torch.nn.Module):
    def __init__(self, tensors: dict[str, torch.Tensor], at: str):
        super().__init__()
        self.tensors = tensors
        self.at = at

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (
            sparse if any(key.startswith(self.at + EXPERT) for key in self.tensors) else one_mlp
        )(self.tensors, self.at, x)


def reference(path: Path, config: dict[str, object], base: str) -> torch.nn.Module:
    """transformers' model of `base` with the checkpoint's weights, its MLPs replaced."""
    import transformers

    tensors = {key: tensor.float() for key, tensor in load_file(path / "model.safetensors").items()}
    numbers = {
        key: config[key]
        for key in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vocab_size",
            "intermediate_size",
        )
    } | {"tie_word_embeddings": False, "pad_token_id": None}
    if base == "Qwen2":
        numbers |= {
            "num_key_value_heads": config["num_attention_heads"],
            "rms_norm_eps": config["layer_norm_epsilon"],
            "rope_theta": config["rotary_emb_base"],
            "max_position_embeddings": config["seq_length"],
            "use_sliding_window": False,
        }
    else:
        keys = (
            "num_key_value_heads",
            "max_position_embeddings",
            "hidden_act",
            "layer_norm_eps",
            "rope_theta",
            "partial_rotary_factor",
        )
        numbers |= {key: config[key] for key in keys} | (
            {"use_qkv_bias": True} if base == "StableLm" else {}
        )
    model = getattr(transformers, f"{base}ForCausalLM")(
        getattr(transformers, f"{base}Config")(**numbers)
    ).eval()
    state = model.state_dict()
    found = {}
    for key in state:
        if ".mlp." in key:
            continue
        there = key
        if base == "Qwen2":
            for ours, theirs in (
                ("model.embed_tokens", "transformer.wte"),
                ("model.layers", "transformer.h"),
                ("model.norm", "transformer.ln_f"),
                ("input_layernorm", "ln_1"),
                ("post_attention_layernorm", "ln_2"),
                ("self_attn.o_proj", "attn.c_proj"),
            ):
                there = there.replace(ours, theirs)
            if any(f"{part}_proj" in key for part in "qkv"):
                joined = tensors[
                    there.split("self_attn")[0] + "attn.c_attn." + key.rsplit(".", 1)[1]
                ]
                found[key] = joined.chunk(3)["qkv".index(key.split("_proj")[0][-1])]
                continue
        found[key] = tensors[there] if there in tensors else torch.zeros_like(state[key])
        assert there in tensors or there == "lm_head.bias", there
    model.load_state_dict(found, strict=False)
    for n, layer in enumerate(model.model.layers):
        layer.mlp = Mlp(
            tensors, f"transformer.h.{n}.mlp." if base == "Qwen2" else f"model.layers.{n}.mlp."
        )
    return model
