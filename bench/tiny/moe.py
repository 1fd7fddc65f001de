"""The tiny MoE-LLaVA on StableLM (MoE-TinyMed's architecture, variant A): its sizes, its prompt,
its losses, and how it is stored under the authors' key names.

transformers has no such model, so StableLM's and CLIP's modules are its own and the sparse layers
are written here from the authors' formula: the two largest of four softmax gates, renormalised. The
same questions as the tiny Qwen2-VL's, asked in the authors' conversation form.
"""

import json
from pathlib import Path

import numpy as np
import torch
from cells import best, options, question
from corpus import PROJECT
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, StableLmConfig, StableLmForCausalLM

EXPERTS = 4
CHOSEN = 2
EVERY = 2
SIDE = 112
PATCH = 14
WIDTH = 192
HIDDEN = 256
BALANCE = 0.01  # weight of the load-balancing loss, as MoE-LLaVA trains
STAGES = (("tower", 560, 64), ("words", 400, 32))  # what, steps, images a step
PEAKS = {"tower": 1.0, "words": 0.6}
# MoE-LLaVA's 'v1' conversation; the features stand where {image} does.
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives"
    " helpful, detailed, and polite answers to the user's questions."
)
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def tokenizer():
    """The quickstart's byte-level BPE; MoE-LLaVA adds no token for images."""
    return Tokenizer.from_file(str(PROJECT / "recipes" / "quickstart" / "model" / "tokenizer.json"))


class SparseMLP(nn.Module):
    """g = softmax of the router in float32; (g1 E1(x) + g2 E2(x)) / (g1 + g2) over the two largest.
    balance: Switch's auxiliary loss of the last call.
    """

    def __init__(self, dense):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList([type(dense)(dense.config) for _ in range(EXPERTS)])
        self.balance = torch.zeros(())
        self.load = torch.zeros(EXPERTS)

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            gates = torch.nn.functional.linear(x.float(), self.gate.weight.float()).softmax(-1)
        kept, chosen = gates.topk(CHOSEN, -1)
        spread = torch.zeros_like(gates).scatter(-1, chosen, kept / kept.sum(-1, keepdim=True))
        first = torch.nn.functional.one_hot(chosen[..., 0], EXPERTS).float().mean((0, 1))
        self.balance = EXPERTS * (gates.mean((0, 1)) * first).sum()
        self.load = (spread > 0).float().sum((0, 1)).detach()
        # All experts for every token: at this size faster than sorting tokens, and the same result.
        return sum(
            spread[..., i : i + 1].to(x.dtype) * expert(x) for i, expert in enumerate(self.experts)
        )


class TinyMoE(nn.Module):
    def __init__(self, vocab):
        super().__init__()
        self.vision = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=WIDTH,
                intermediate_size=4 * WIDTH,
                num_hidden_layers=5,
                num_attention_heads=WIDTH // 64,
                image_size=SIDE,
                patch_size=PATCH,
            )
        )
        self.projector = nn.Sequential(
            nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN)
        )
        self.text = StableLmForCausalLM(
            StableLmConfig(
                vocab_size=vocab,
                hidden_size=HIDDEN,
                intermediate_size=2 * HIDDEN,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=1024,
                use_qkv_bias=True,
                layer_norm_eps=1e-5,
                tie_word_embeddings=False,
                rope_parameters={
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 0.25,
                },
                bos_token_id=0,
                eos_token_id=0,
            )
        )
        for layer in self.text.model.layers[::EVERY]:
            layer.mlp.config = self.text.config
            layer.mlp = SparseMLP(layer.mlp)

    def sparse(self):
        return [layer.mlp for layer in self.text.model.layers if isinstance(layer.mlp, SparseMLP)]

    def features(self, pixels):
        """pixels [n, 3, SIDE, SIDE] -> [n, patches, HIDDEN], from the layer before the last and
        without the class token.
        """
        seen = self.vision(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        return self.projector(seen)

    def forward(self, rows):
        """rows: (features or None, token ids before, token ids after the image, labels after).
        Returns (logits, labels, row) of the positions that count.
        """
        embed = self.text.model.embed_tokens
        hidden = []
        labels = []
        for features, before, after, wanted in rows:
            seen = [] if features is None else [features]
            parts = [
                embed(torch.tensor(before)),
                *(s.to(embed.weight.dtype) for s in seen),
                embed(torch.tensor(after)),
            ]
            hidden.append(torch.cat(parts))
            labels.append(torch.tensor([-100] * (len(hidden[-1]) - len(wanted)) + wanted))
        states = nn.utils.rnn.pad_sequence(hidden, batch_first=True)
        labels = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        mask = torch.arange(states.shape[1])[None] < torch.tensor([len(h) for h in hidden])[:, None]
        found = self.text.model(
            inputs_embeds=states, attention_mask=mask.long(), use_cache=False
        ).last_hidden_state[:, :-1]
        counted = labels[:, 1:] != -100
        return self.text.lm_head(found[counted]), labels[:, 1:][counted], counted.nonzero()[:, 0]


def fresh(tok, seed):
    torch.manual_seed(seed)
    return TinyMoE(tok.get_vocab_size())


def processor():
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=list(MEAN),
        image_std=list(STD),
    )


def squared(image):
    """Padded to a square with CLIP's mean colour, as LLaVA trains."""
    side = max(image.size)
    from PIL import Image

    square = Image.new("RGB", (side, side), tuple(int(255 * m) for m in MEAN))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def pixels(images, process):
    return torch.from_numpy(
        np.asarray(
            process(images=[squared(image) for image in images], return_tensors="np")[
                "pixel_values"
            ],
            np.float32,
        )
    )


def pooled(model, images, process):
    """Mean feature of each image [n, HIDDEN], for the first stage."""
    return model.features(pixels(images, process)).mean(1)


def row(features, asked, answered, tok):
    """What stands before and after the image, and the labels, which count the answer only."""
    encode = lambda text: tok.encode(text, add_special_tokens=False).ids  # noqa: E731
    question = encode(f"\n{asked} ASSISTANT:")
    answer = [*encode(f" {answered}"), tok.token_to_id("<|endoftext|>")]
    return features, encode(f"{SYSTEM} USER: "), question + answer, [-100] * len(question) + answer


def loss_of(model, found, images, tok, process, generator):
    """The question about each image, answered with its class, and the balance of the experts."""
    features = model.features(pixels(images, process))
    logits, labels, _ = model(
        [
            row(seen, question(p, options(p, generator)), p.label, tok)
            for p, seen in zip(found, features, strict=True)
        ]
    )
    return torch.nn.functional.cross_entropy(logits.float(), labels) + BALANCE * sum(
        layer.balance for layer in model.sparse()
    )


def answers(model, asked, tok, process):
    """The option each (picture, options) gets: the one whose words are the likeliest answer."""
    features = model.features(pixels([picture.image() for picture, _ in asked], process))
    rows = [
        row(seen, question(picture, offered), option, tok)
        for (picture, offered), seen in zip(asked, features, strict=True)
        for option in offered
    ]
    logits, labels, owner = model(rows)
    scores = logits.float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    # The token that ends the answer is not part of an option.
    scores = torch.zeros(len(rows)).index_add(
        0, owner, scores * (labels != tok.token_to_id("<|endoftext|>"))
    )
    return best(scores.tolist(), asked)


def facts(model, asked, tok, process):
    """Share of tokens each expert gets by layer and kind of question; accuracy of the first 512
    questions as trained, and with the experts of every sparse layer in another order.
    """
    loads = {}
    for kind in sorted({picture.kind for picture, _ in asked}):
        own = [entry for entry in asked if entry[0].kind == kind][:64]
        totals = [torch.zeros(EXPERTS) for _ in model.sparse()]
        for start in range(0, len(own), 16):
            answers(model, own[start : start + 16], tok, process)
            totals = [
                total + layer.load for total, layer in zip(totals, model.sparse(), strict=True)
            ]
        loads[kind] = [
            [round(share, 4) for share in (total / total.sum()).tolist()] for total in totals
        ]
    asked = asked[:512]

    def accuracy():
        found = [
            option
            for start in range(0, len(asked), 16)
            for option in answers(model, asked[start : start + 16], tok, process)
        ]
        return sum(
            option == picture.label for option, (picture, _) in zip(found, asked, strict=True)
        ) / len(asked)

    before = accuracy()
    for layer in model.sparse():
        layer.experts = nn.ModuleList([*layer.experts[1:], layer.experts[0]])
    return {
        "expert_load": loads,
        "experts_exchanged": {
            "questions": len(asked),
            "accuracy_as_trained": before,
            "accuracy": accuracy(),
        },
    }


def load(folder):
    """The module with the weights of a stored checkpoint, float32."""
    tok = tokenizer()
    kept = load_file(folder / "model.safetensors")
    model = fresh(tok, 0)
    by_name = {name: tensor for name, tensor in stored(model).items() if "position_ids" not in name}
    if set(by_name) != set(kept):
        raise ValueError(
            f"{folder}: other tensors than this architecture has:"
            f" {sorted(set(by_name) ^ set(kept))[:3]}"
        )
    with torch.no_grad():
        for name, tensor in by_name.items():
            tensor.copy_(kept[name])
    return model.eval()


def stored(model):
    """The tensors under the authors' names."""
    found = {}
    for name, tensor in model.text.state_dict().items():
        for old, new in (
            (".mlp.gate.", ".mlp.deepspeed_moe.gate.wg."),
            (".mlp.experts.", ".mlp.deepspeed_moe.experts.deepspeed_experts."),
        ):
            name = name.replace(old, new)
        found[name] = tensor
    for name, tensor in model.projector.state_dict().items():
        found[f"model.mm_projector.image_spatial_proj.{name}"] = tensor
    for name, tensor in model.vision.state_dict().items():
        found[
            f"model.image_tower.image_tower.vision_model.{name.removeprefix('vision_model.')}"
        ] = tensor
    return found


def save(model, tok, out: Path):
    """A checkpoint as MoE-LLaVA's are stored: 16-bit safetensors, config, tokenizer; the tower's
    sizes follow from its tensors.
    """
    out.mkdir(parents=True, exist_ok=True)
    # The router decides by small differences and is kept as it was trained.
    kept = {
        name: tensor.float() if ".gate.wg." in name else tensor.to(torch.bfloat16)
        for name, tensor in stored(model).items()
        if "position_ids" not in name
    }
    save_file(
        {name: tensor.contiguous() for name, tensor in kept.items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    layers = model.text.config.num_hidden_layers
    config = {
        "model_type": "moe_llava_stablelm",
        "architectures": ["MoELLaVAStablelmForCausalLM"],
        "vocab_size": tok.get_vocab_size(),
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
        "hidden_act": "silu",
        "norm_eps": 1e-5,
        "rope_pct": 0.25,
        "rope_theta": 10000,
        "use_qkv_bias": True,
        "tie_word_embeddings": False,
        "bos_token_id": tok.token_to_id("<|endoftext|>"),
        "eos_token_id": tok.token_to_id("<|endoftext|>"),
        "image_projector_type": "mlp2x_gelu",
        "mm_image_tower": "openai/clip-vit-large-patch14-336",
        "mm_hidden_size": WIDTH,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "moe": {
            "moe_enable": True,
            "moe_mode": "sparse",
            "moe_layers_idx": list(range(0, layers, EVERY)),
            "num_experts": [EXPERTS] * (layers // EVERY),
            "top_k_experts": CHOSEN,
            "capacity_factor": 1.5,
            "eval_capacity_factor": 2.0,
            "min_capacity": 0,
            "use_residual": False,
            "router_aux_loss_coef": BALANCE,
        },
    }
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tok.save(str(out / "tokenizer.json"))
    known = {
        "eos_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1024,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(known, indent=1) + "\n")
    processor().save_pretrained(out)
