"""Calibration on questions about images: windows as the model reads them, and every pass over them
with the positions its images give.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, write_model

torch = pytest.importorskip("torch")
pytest.importorskip("PIL.Image")

from edgemed.data.image_sets import calibration_digests, image_rows, images_album
from edgemed.data.image_text_windows import calibration_samples
from edgemed.data.text_sets import read_jsonl
from edgemed.errors import EdgemedError
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.tokenizer import encode, open_tokenizer
from edgemed.models.torch_decoder import (
    TorchSession,
    block,
    embed_sequences,
    load_layer,
    norm,
    output_head,
)
from edgemed.models.weights import CanonicalWeights
from edgemed.quantization.hidden_states import Activations
from edgemed.quantization.importance_matrix import importance
from edgemed.quantization.layerwise import awq_layer, gptq_layer, integers
from edgemed.quantization.sensitivity import sensitivities
from edgemed.quantization.smoothquant import smooth_layer
from edgemed.steps import quantize
from edgemed.vision.preprocessing import prompt_tokens
from edgemed.vision.torch_encoder import TorchVisionEncoder

CARD = "vqa-rad-questions"
SAMPLES = 3
LENGTH = 400


@pytest.fixture(scope="module")
def weights(vision_model: Path) -> CanonicalWeights:
    return CanonicalWeights(open_checkpoint(vision_model), fold=True)


@pytest.fixture(scope="module")
def windows(weights: CanonicalWeights) -> list:
    return calibration_samples(weights, CARD, SAMPLES, LENGTH)


def scored(weights: CanonicalWeights, x: torch.Tensor) -> np.ndarray:
    final, matrix, bias = output_head(weights)
    return torch.nn.functional.linear(norm(weights.decoder, final, "final_norm", x), matrix, bias)[
        0
    ].numpy()


def test_a_window_is_the_beginning_of_its_turns(weights: CanonicalWeights, windows: list) -> None:
    """Turn after turn, as if the whole conversation were one prompt."""
    vision_encoder = TorchVisionEncoder(weights)
    tokenizer = open_tokenizer(weights.checkpoint.path, weights.decoder.vocab)
    album = images_album(CARD)
    rows = iter(image_rows(CARD))
    ids = []
    images = []
    tokens, seen = windows[0]
    assert len(windows) == SAMPLES
    assert all(
        len(t) == LENGTH == p.positions.shape[1] and len(p.features) == t.count(p.token)
        for t, p in windows
    )
    while not images or len(vision_encoder.see(ids, images)[0]) < LENGTH:
        row = next(rows)
        ids += (
            prompt_tokens(
                tokenizer,
                vision_encoder.family.chat(row["question"], 1, vision_encoder.v.conversation),
                vision_encoder.v,
            )
            + encode(tokenizer, row["answer"])
            + [weights.decoder.eos]
        )
        images.append(album.open(row["image"]))
    whole, pictures = vision_encoder.see(ids, images)
    assert len(images) > 1, "a window that holds one turn would not show how they are joined"
    assert tokens == whole[:LENGTH]
    assert np.array_equal(seen.positions, pictures.positions[:, :LENGTH])
    assert np.array_equal(seen.features, pictures.features[: len(seen.features)])
    assert (seen.positions[0] != np.arange(LENGTH)).any(), (
        "an image takes less room in positions than it has tokens"
    )


def test_passes_over_them_are_the_models(weights: CanonicalWeights, windows: list) -> None:
    d = weights.decoder
    session = TorchSession(weights)
    squares = torch.zeros(d.hidden)
    columns = importance(weights, windows)
    for window in windows:
        session.rewind(0)
        right = session.prefill(window[0], every=True, pictures=window[1]).copy()
        ((x, angles),) = embed_sequences(weights, [window])
        with torch.inference_mode():
            for n in range(d.layers):
                layer = load_layer(weights, n)
                if n == 1:
                    squares += norm(d, layer, "attn_norm", x).square().sum((0, 1))
                x = block(d, layer, n, x, angles=angles)
        assert np.abs(scored(weights, x) - right).max() < 1e-4 * np.abs(right).max()
    assert np.abs(columns["layers.1.qkv"] / (squares / SAMPLES / LENGTH).numpy() - 1).max() < 1e-4


@pytest.mark.parametrize("method", [gptq_layer, awq_layer, smooth_layer])
def test_rounded_layers_see_the_same_positions(
    weights: CanonicalWeights, windows: list, tmp_path: Path, method
) -> None:
    d = weights.decoder
    session = TorchSession(weights)
    errors = {}
    own = dict.fromkeys(d.matrices(0), (8, 32))
    params = quantize.Params(
        "gptq",
        bits=8,
        group=32,
        clip=True,
    )
    rounds = {
        gptq_layer: lambda n, x: gptq_layer(weights, n, x, None, integers(own, params), params),
        awq_layer: lambda n, x: awq_layer(weights, n, x, own, params),
        smooth_layer: lambda n, x: smooth_layer(weights, n, x, own, True, 0.5),
    }
    for turned in (True, False):
        angles = [turned for _, turned in embed_sequences(weights, windows)]
        x = Activations(
            tmp_path,
            f"{method.__name__}-{turned}",
            (SAMPLES, LENGTH, d.hidden),
            False,
            angles if turned else None,
        )
        with torch.inference_mode():
            for i, window in enumerate(windows):
                x.write(i, next(embed_sequences(weights, [window]))[0])
            x.commit()
            for n in range(d.layers):
                rounds[method](n, x)
                x.commit()
            session.rewind(0)
            right = session.prefill(windows[0][0], every=True, pictures=windows[0][1])
            errors[turned] = np.abs(scored(weights, x.read(0)) - right).max() / np.abs(right).max()
    assert errors[True] < 0.05 < errors[False], "eight bits cost little, other positions do not"


def test_sensitivity_reads_the_same_inputs(
    weights: CanonicalWeights, windows: list, tmp_path: Path
) -> None:
    columns = importance(weights, windows)
    for n, found in sensitivities(weights, windows, tmp_path):
        for name, sensitivity in found.items():
            assert np.allclose(
                sensitivity.moment.diagonal().numpy() / 2, columns[f"layers.{n}.{name}"], rtol=1e-3
            ), (n, name)


@pytest.mark.parametrize("method", ["gptq", "awq", "budget"])
def test_a_model_that_sees_is_quantized_on_images(
    vision_model: Path, tmp_path: Path, method: str
) -> None:
    text = (
        {"method": "auto", "budget": "5bpw"}
        if method == "budget"
        else {"method": method, "group": 32}
    )
    params = quantize.Params(
        **text,
        calibration=CARD,
        samples=SAMPLES,
        length=LENGTH,
    )
    (tmp_path / "packed").mkdir()
    notes = quantize.run(open_checkpoint(vision_model), tmp_path / "packed", params)
    assert set(quantize.inputs(params)) == {"calibration", "images"}
    assert CanonicalWeights(open_checkpoint(tmp_path / "packed")).vision
    assert all(0 < found["output"] < 0.2 for found in notes["errors"].values())


def test_several_sets_take_turns(weights: CanonicalWeights, windows: list) -> None:
    mixed = calibration_samples(weights, f"{CARD},medquad-answers", 5, LENGTH)
    assert [pictures is not None for _, pictures in mixed] == [True, False, True, False, True]
    assert mixed[2][0] == windows[1][0]
    assert mixed[3] == calibration_samples(weights, "medquad-answers", 2, LENGTH)[1]
    assert set(calibration_digests(f"medquad-answers,{CARD}")) == {
        "calibration",
        "calibration 2",
        "images 2",
    }


def test_a_file_with_a_comma_in_its_name_is_one_set(
    weights: CanonicalWeights, tmp_path: Path
) -> None:
    file = tmp_path / "notes, 2026.jsonl"
    file.write_text(json.dumps({"text": "a" * 64}) + "\n")
    assert len(calibration_samples(weights, str(file), 1, 32)) == 1
    assert set(calibration_digests(str(file))) == {"calibration"}


def test_bad_input(weights: CanonicalWeights, tmp_path: Path) -> None:
    with pytest.raises(EdgemedError, match="for 11 samples of 1000 tokens, 500 are asked for"):
        calibration_samples(weights, CARD, 500, 1000)
    with pytest.raises(EdgemedError, match="1 samples of 2 calibration sets leave one out"):
        calibration_samples(weights, f"medquad-answers,{CARD}", 1, 16)
    text = CanonicalWeights(open_checkpoint(write_model(tmp_path / "text")))
    with pytest.raises(EdgemedError, match="has images, and .* reads text only"):
        calibration_samples(text, CARD, 1, 16)
    row = read_jsonl(ROOT / "calibration" / CARD / "calibration.jsonl")[0]
    (tmp_path / "own.jsonl").write_text(json.dumps({**row, "image": "none.png"}) + "\n")
    with pytest.raises(EdgemedError, match="none.png"):
        calibration_digests(str(tmp_path / "own.jsonl"))
