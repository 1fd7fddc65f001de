"""Questions about images in a checkpoint's own chat template against transformers' processor, from
the prompt to generate, eval, references and the witness; and templates that take no images.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY_CLIP, once, write_tokenizer

Image = pytest.importorskip("PIL.Image")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

from edgemed import plugins
from edgemed.api import PromptForm, prompt_ids, stream
from edgemed.data.image_text_windows import question_prompt
from edgemed.engines.engine import ENGINE, Engine, export
from edgemed.errors import EdgemedError
from edgemed.evaluation.opened_model import evaluate_opened, open_source, start_engine
from edgemed.evaluation.prompting import ONE_LETTER, PromptSettings
from edgemed.evaluation.task import questions
from edgemed.inference.decoding import Sampling
from edgemed.models.chat_template import chat_text
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.tokenizer import open_tokenizer
from edgemed.models.weights import CanonicalWeights
from edgemed.pipeline.references import image_answers
from edgemed.verification.spec import VerifySpec
from edgemed.verification.witness.comparison import compare
from edgemed.vision.image_turn import image_turn
from edgemed.vision.torch_encoder import TorchVisionEncoder

VOCAB = 288
IMAGE = 258
BEGIN = 259
QUESTION = "Is the <b>heart</b> enlarged?\nAnswer 'yes' or 'no'."
# llava-hf/llava-1.5-7b-hf and llava-hf/llava-v1.6-mistral-7b-hf, chat_template.json
TEMPLATES = {
    "llama": (
        "{% for message in messages %}{% if message['role'] != 'system' %}"
        "{{ message['role'].upper() + ': '}}{% endif %}{# Render all images first #}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
        "{{ '<image>\n' }}{% endfor %}{# Render all text next #}"
        "{% if message['role'] != 'assistant' %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{{ content['text'] + ' '}}{% endfor %}{% else %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "mistral": (
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}"
        "{% elif message['role'] == 'user' %}{{ '[INST] ' }}{# Render all images first #}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
        "{{ '<image>\n' }}{% endfor %}{# Render all text next #}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{{ content['text'] }}{% endfor %}{{' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + message['content'][0]['text'] + '<\\s> '}}{% else %}"
        "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
        "{% endfor %}"
    ),
}
PROMPTS = {
    "llama": f"USER: <image>\n{QUESTION} ASSISTANT:",
    "mistral": f"[INST] <image>\n{QUESTION} [/INST]",
}
# name -> a template that takes no images
FOR_TEXTS = {
    "refuses": "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}",
    "prints": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}",
    "drops": "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{% endif %}"
    "{% endfor %}",
}


def written(path: Path, text: str) -> None:
    """A tiny LLaVA as transformers saves it: weights, tokenizer that puts <s> in front, processor
    with the published template.
    """
    from tokenizers import Tokenizer, processors

    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **TINY_CLIP, "num_attention_heads": 1},
        text_config={
            "model_type": text,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 128,
            "vocab_size": VOCAB,
            "max_position_embeddings": 640,
            "bos_token_id": BEGIN,
            "eos_token_id": 256,
        },
        image_token_index=IMAGE,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(path)
    write_tokenizer(path)
    file = path / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens(["<image>", "<s>"])
    assert tokenizer.token_to_id("<s>") == BEGIN
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BEGIN)]
    )
    tokenizer.save(str(file))
    transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
        ),
        transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(file), bos_token="<s>", eos_token="<|endoftext|>"
        ),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATES[text],
    ).save_pretrained(path)


@pytest.fixture(scope="module")
def model(shared: Path) -> Callable[[str], Path]:
    return lambda text: once(shared / f"turn-{text}", lambda path: written(path, text))


@pytest.fixture(scope="module")
def engine(model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Engine:
    params = plugins.load("targets", "onnx").Params(precision="fp32")
    out = tmp_path_factory.mktemp("turn") / "engine"
    return export(open_checkpoint(model("llama")), "onnx", params, out)


def image(seed: int = 1) -> Any:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (60, 70, 3), np.uint8))


def asked(path: Path, text: str, images: int = 1) -> tuple[str, list[int]]:
    """edgemed's prompt of a checkpoint and its ids, the places of the images not repeated."""
    weights = CanonicalWeights(open_checkpoint(path))
    tokenizer = open_tokenizer(path, VOCAB)
    turn = image_turn(weights.family, weights.require_vision(), path, tokenizer, text, images)
    return turn.text, turn.tokens(tokenizer)


def theirs(path: Path, text: str, images: int = 1) -> tuple[str, list[int]]:
    """The same of transformers' processor."""
    processor = transformers.AutoProcessor.from_pretrained(path)
    shown = [{"type": "image", "image": image(n)} for n in range(images)]
    messages = [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]
    template = processor.chat_template or processor.tokenizer.chat_template
    prompt = processor.apply_chat_template(messages, template, add_generation_prompt=True)
    batch = processor.apply_chat_template(
        messages, template, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return prompt, once_each(np.asarray(batch["input_ids"]).reshape(-1).tolist())


def once_each(tokens: list[int]) -> list[int]:
    """Ids with one place for each image, where the prompt has sixteen."""
    ids = []
    places = 0
    for token in tokens:
        if token != IMAGE or places % 16 == 0:
            ids.append(token)
        places += token == IMAGE
    return ids


@pytest.mark.parametrize("text", TEMPLATES)
def test_prompt_and_ids_are_transformers(model: Callable[[str], Path], text: str) -> None:
    path = model(text)
    prompt, ids = asked(path, QUESTION)
    assert prompt == PROMPTS[text]
    assert (prompt, ids) == theirs(path, QUESTION)
    assert ids[0] == BEGIN
    assert asked(path, " Why?\n ", 2) == theirs(path, " Why?\n ", 2)


@pytest.mark.parametrize("place", ["chat_template.json", "tokenizer_config.json"])
def test_the_template_may_stand_elsewhere(
    model: Callable[[str], Path], tmp_path: Path, place: str
) -> None:
    path = Path(shutil.copytree(model("llama"), tmp_path / "model"))
    (path / "chat_template.jinja").unlink()
    file = path / place
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | {"chat_template": TEMPLATES["llama"]}))
    assert asked(path, QUESTION) == theirs(path, QUESTION)
    assert asked(path, QUESTION)[0] == PROMPTS["llama"]


def test_a_begin_token_of_the_template_stands_alone(
    model: Callable[[str], Path], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(model("llama"), tmp_path / "model"))
    (path / "chat_template.jinja").write_text("{{ bos_token }}" + TEMPLATES["llama"])
    prompt, ids = asked(path, QUESTION)
    assert (prompt, ids) == theirs(path, QUESTION)
    assert prompt == f"<s>{PROMPTS['llama']}"
    assert ids.count(BEGIN) == 1
    result = compare(open_checkpoint(path), 0)
    assert result.passed, result.first


@pytest.mark.parametrize("text", TEMPLATES)
def test_the_witness_agrees(model: Callable[[str], Path], text: str) -> None:
    result = compare(open_checkpoint(model(text)), 0)
    assert result.passed, result.first
    rows = {row.what: row for row in result.rows}
    assert (rows["chat with an image"].comparisons, rows["chat with an image"].note) == (2, None)


@pytest.mark.parametrize("text", TEMPLATES)
def test_texts_alone_reach_the_model(model: Callable[[str], Path], text: str) -> None:
    """These templates read lists of contents, and would pass a plain text over."""
    messages = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": QUESTION},
    ]
    listed = [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        for message in messages
    ]
    processor = transformers.AutoProcessor.from_pretrained(model(text))
    expected = processor.apply_chat_template(listed, add_generation_prompt=True)
    assert QUESTION in expected
    assert chat_text(model(text), messages) == expected


@pytest.mark.parametrize("kind", FOR_TEXTS)
def test_a_template_for_texts_leaves_the_familys_form(
    model: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    path = Path(shutil.copytree(model("mistral"), tmp_path / "model"))
    (path / "chat_template.jinja").write_text(FOR_TEXTS[kind])
    # An image's token in the text is none of the template's.
    for text in (QUESTION, "Is <image> normal?"):
        assert asked(path, text)[0] == f"[INST] <image>\n{text} [/INST]"
    (path / "chat_template.jinja").unlink()
    assert asked(path, QUESTION)[0] == f"[INST] <image>\n{QUESTION} [/INST]"


def test_conversation_in_config_json_comes_first(
    model: Callable[[str], Path], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(model("llama"), tmp_path / "model"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"conversation": "huatuo"}))
    assert asked(path, "Why?")[0] == "<|user|>\n<image>\nWhy?\n<|assistant|>\n"
    params = plugins.load("targets", "onnx").Params(precision="fp32")
    made = export(open_checkpoint(path), "onnx", params, tmp_path / "engine")
    ids = prompt_ids(made, "Why?", 1, "chat")
    assert ids == asked(path, "Why?")[1]
    assert json.loads((made.path / ENGINE).read_text())["vision"]["conversation_stated"] is True


def test_a_broken_template_is_named(model: Callable[[str], Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(model("llama"), tmp_path / "model"))
    (path / "chat_template.jinja").write_text("{% for m in messages %}")
    with pytest.raises(EdgemedError, match="the chat template of .* refuses this conversation"):
        asked(path, QUESTION)


def test_the_engine_asks_as_its_source(
    model: Callable[[str], Path], engine: Engine, tmp_path: Path
) -> None:
    path = model("llama")
    assert "conversation_stated" not in json.loads((engine.path / ENGINE).read_text())["vision"]
    prompt, ids = theirs(path, QUESTION)
    assert prompt_ids(engine, QUESTION, 1, "chat") == ids
    assert prompt_ids(engine, QUESTION, 1, "chat", add_special_tokens=False) == ids[1:]
    image().save(tmp_path / "a.png")
    whole = transformers.LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    processor = transformers.AutoProcessor.from_pretrained(path)
    batch = processor(images=image(), text=prompt, return_tensors="pt")
    length = batch["input_ids"].shape[1]
    reply = whole.eval().generate(**batch, max_new_tokens=8, do_sample=False)[0, length:].tolist()
    reply = reply[: reply.index(256)] if 256 in reply else reply
    answer = "".join(
        stream(engine.path, QUESTION, Sampling(max_tokens=8), images=[tmp_path / "a.png"])
    )
    assert answer == engine.tokenizer().decode(reply).rstrip("\ufffd")
    with pytest.raises(EdgemedError, match="places for 2 images, 1 were given"):
        list(
            stream(
                engine.path,
                "What is <image>?",
                Sampling(max_tokens=2),
                images=[tmp_path / "a.png"],
                form=PromptForm("chat"),
            )
        )


def test_eval_calibration_and_references_ask_alike(
    model: Callable[[str], Path], engine: Engine, tmp_path: Path
) -> None:
    path = model("llama")
    image().save(tmp_path / "a.png")
    row = {
        "id": "1",
        "image": "a.png",
        "question": "Which?",
        "options": ["A lung", "Heart"],
        "answer": 1,
        "kind": "o",
        "label": "l",
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    cells = questions(f"cells:{tmp_path / 'rows.jsonl'}")
    question = cells.task.render(cells.examples[0]).context
    if cells.task.lettered:
        question += ONE_LETTER
    expected = theirs(path, question)[1]
    scores = []
    for opened in (start_engine(engine, True, 1), open_source(open_checkpoint(path), True)):
        seen: list[list[int]] = []
        encoder = opened.session.vision
        assert encoder is not None
        see = encoder.see
        encoder.see = lambda tokens, images: seen.append(list(tokens)) or see(tokens, images)
        result = evaluate_opened(opened, cells, "m", "k", "zero-shot", PromptSettings())
        scores.append(result.items[0].scores)
        assert seen == [expected]
        opened.close()
    assert np.allclose(*scores, atol=1e-3)

    weights = CanonicalWeights(open_checkpoint(path))
    tokenizer = open_tokenizer(path, VOCAB)
    album: Any = type("Album", (), {"open": lambda self, name: image()})()
    tokens, _ = question_prompt(
        TorchVisionEncoder(weights), tokenizer, album, {"question": QUESTION, "image": "a.png"}
    )
    assert once_each(tokens) == theirs(path, QUESTION)[1]

    spec = VerifySpec(prompts="medquad-answers", images=1, image_new=2)
    reference = image_answers(open_checkpoint(path), spec, weights.require_vision().pixels)
    first = [int(token) for token in reference.prompts[0]]
    text = tokenizer.decode(first, skip_special_tokens=False)
    assert text.startswith("<s>USER: <image>")
    assert " ASSISTANT:" in text


def test_qwen2_vl_stays_as_it_was(vision_model: Path, tmp_path: Path) -> None:
    """Its published template and its family's form are the same."""
    path = Path(shutil.copytree(vision_model, tmp_path / "model"))
    weights = CanonicalWeights(open_checkpoint(path))
    tokenizer = open_tokenizer(path, weights.decoder.vocab)
    v = weights.require_vision()
    turns = []
    for template in (None, QWEN2_VL):
        if template is not None:
            (path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
            transformers.Qwen2VLImageProcessorPil().save_pretrained(path)
        for text in (QUESTION, "  Why? \n"):
            turn = image_turn(weights.family, v, path, tokenizer, text, 2)
            assert weights.family.chat is not None
            assert turn.text == weights.family.chat(text, 2, v.conversation)
            turns.append(turn.tokens(tokenizer))
    assert turns[:2] == turns[2:]
    result = compare(open_checkpoint(path), 0)
    assert result.passed, result.first
    rows = {row.what: row for row in result.rows}
    assert (rows["chat"].comparisons, rows["chat with an image"].comparisons) == (6, 2)


# Qwen/Qwen2-VL-2B-Instruct, chat_template.json
QWEN2_VL = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}"
    "{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
