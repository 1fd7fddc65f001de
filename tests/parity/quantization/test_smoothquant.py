"""SmoothQuant and engines of precision w8a8: the smoothing is the paper's and changes nothing in
floats, and engines compute what integers of these scales give.

Engines are compared with the torch decoder whose inputs are rounded in the very same way, so a
wrong scale or zero shows at once; that smoothing is worth it is shown on a model that was given
outlier channels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import cli, on_q8_grid, refused, rewrite, tokens, write_model

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from edgemed.engines.engine import export
from edgemed.errors import EdgemedError
from edgemed.inference.decoding import log_softmax
from edgemed.models.checkpoint import Checkpoint, open_checkpoint
from edgemed.models.torch_decoder import block, embed, linear, load_layer, logits, norm, output_head
from edgemed.models.weights import CanonicalWeights
from edgemed.quantization.smoothquant import scale
from edgemed.steps import quantize
from edgemed.targets import onnx, tensorrt

IDS = tokens(80)
FAMILIES = {
    "gpt2": {},
    "llama": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
}


def outliers(model: Path, out: Path) -> Path:
    """Two channels of every attention and MLP input forty times as large as the others, and what
    reads them forty times smaller: the same function.
    """

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name, value in tensors.items():
            if "ln_1." in name or "ln_2." in name:
                value[:2] *= 40
            if "c_attn.weight" in name or "c_fc.weight" in name:
                value[:2] /= 40
        return tensors

    return rewrite(model, out, change)


@pytest.fixture(scope="module", params=FAMILIES)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[CanonicalWeights, Checkpoint, Path]:
    """(source, its smoothquant checkpoint, the calibration text)."""
    folder = tmp_path_factory.mktemp(f"smooth-{request.param}")
    text = folder / "text.txt"
    text.write_text(" ".join(chr(33 + (7 * i * i + i // 3) % 90) * (1 + i % 3) for i in range(900)))
    source = write_model(folder / "model", family=request.param, **FAMILIES[request.param])
    source = outliers(source, folder / "outliers") if request.param == "gpt2" else source
    (folder / "out").mkdir()
    quantize.run(
        open_checkpoint(source),
        folder / "out",
        quantize.Params(
            "smoothquant",
            8,
            -1,
            str(text),
            samples=6,
            length=64,
        ),
    )
    return (
        CanonicalWeights(open_checkpoint(source), fold=True),
        open_checkpoint(folder / "out"),
        text,
    )


def by_hand(
    weights: CanonicalWeights, rounded: Callable[[str, torch.Tensor], torch.Tensor], grid: bool
) -> np.ndarray:
    """Scores of IDS where what each matrix reads is first put through rounded(canonical name,
    x).
    """
    d = weights.decoder
    x = embed(weights, torch.tensor([IDS])) if not grid else None
    if grid:
        table = weights.table
        weights.table = lambda name: table(name).half().float()
        x = embed(weights, torch.tensor([IDS]))
        weights.table = table
    for n in range(d.layers):
        x = block(
            d,
            load_layer(weights, n),
            n,
            x,
            product=lambda layer, name, x, n=n: linear(
                layer, name, rounded(f"layers.{n}.{name}", x)
            ),
        )
    final, matrix, bias = output_head(weights)
    return torch.nn.functional.linear(
        norm(d, final, "final_norm", x), on_q8_grid(matrix) if grid else matrix, bias
    )[0].numpy()


def per_token(name: str, x: torch.Tensor) -> torch.Tensor:
    step = torch.maximum(x.amax(-1, keepdim=True) / 127, -x.amin(-1, keepdim=True) / 128).clamp_min(
        1e-12
    )
    return (x / step).round().clamp(-128, 127) * step


def kl(p: np.ndarray, q: np.ndarray) -> float:
    p = log_softmax(p)
    q = log_softmax(q)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def scores(checkpoint: Checkpoint, target: str, params: object, out: Path) -> np.ndarray:
    session = export(checkpoint, target, params, out).open(1)
    found = session.prefill(IDS, every=True).copy()
    session.close()
    return found


def test_the_scale_is_equation_4() -> None:
    x = torch.rand(5) * 9
    weight = torch.randn(7, 5)
    found = scale(x, weight, 0.3)
    np.testing.assert_allclose(
        found,
        [float(x[j]) ** 0.3 / np.abs(weight[:, j].numpy()).max() ** 0.7 for j in range(5)],
        rtol=1e-5,
    )


def test_norms_take_what_weights_give_back(made: tuple[CanonicalWeights, Checkpoint, Path]) -> None:
    source, checkpoint, _ = made
    smoothed = CanonicalWeights(checkpoint)
    for n in range(source.decoder.layers):
        for of, read in (("attn_norm", "qkv"), ("mlp_norm", "up")):
            s = source.norm(f"layers.{n}.{of}")[0] / smoothed.norm(f"layers.{n}.{of}")[0]
            before = source.matrix(f"layers.{n}.{read}").dense() * s
            after = smoothed.matrix(f"layers.{n}.{read}").dense()
            # Not the rows that made room for the next fold: v's for `o`, those of a gated `up` for
            # `down`.
            rows = slice(
                0,
                source.decoder.q_size + source.decoder.kv_size
                if read == "qkv"
                else source.decoder.ffn,
            )
            assert float((before - after)[rows].norm() / before[rows].norm()) < 0.02, (n, of)
            assert float(s.max() / s.min()) > 1.5


def test_ranges_are_what_the_smoothed_matrices_read(
    made: tuple[CanonicalWeights, Checkpoint, Path],
) -> None:
    """On the calibration text itself, computed by the source with the norms of the result."""
    source, checkpoint, _ = made
    smoothed = CanonicalWeights(checkpoint)
    assert set(smoothed.activation_ranges) == {
        f"layers.{n}.{name}"
        for n in range(source.decoder.layers)
        for name in ("qkv", "o", "up", "down")
    }
    largest: dict[str, float] = {}

    def keep(name: str, x: torch.Tensor) -> torch.Tensor:
        largest[name] = max(largest.get(name, 0), float(x.abs().max()))
        return x

    by_hand(smoothed, keep, grid=False)
    # Random tokens are other text than that of the calibration: of one size all the same.
    assert all(
        0.3 < largest[name] / found < 3 for name, found in smoothed.activation_ranges.items()
    ), (largest, smoothed.activation_ranges)


def test_onnx_rounds_token_by_token(
    made: tuple[CanonicalWeights, Checkpoint, Path], tmp_path: Path
) -> None:
    _, checkpoint, _ = made
    found = scores(checkpoint, "onnx", onnx.Params("w8a8", accuracy_level=1), tmp_path / "engine")
    right = by_hand(CanonicalWeights(checkpoint), per_token, grid=True)
    exact = by_hand(CanonicalWeights(checkpoint), lambda name, x: x, grid=True)
    # A value on the border between two integers may fall to either side; what is left out would
    # show ten times as much.
    assert kl(right, found) < 0.05 * kl(right, exact)


def test_tensorrt_rounds_with_the_scales_of_the_checkpoint(
    made: tuple[CanonicalWeights, Checkpoint, Path], tmp_path: Path
) -> None:
    _, checkpoint, _ = made
    ranges = CanonicalWeights(checkpoint).activation_ranges

    def static(name: str, x: torch.Tensor) -> torch.Tensor:
        return (x / (ranges[name] / 127)).round().clamp(-128, 127) * (ranges[name] / 127)

    found = scores(
        checkpoint,
        "tensorrt",
        tensorrt.Params(precision="w8a8", activations="fp32"),
        tmp_path / "engine",
    )
    right = by_hand(CanonicalWeights(checkpoint), static, grid=False)
    exact = by_hand(CanonicalWeights(checkpoint), lambda name, x: x, grid=False)
    assert kl(right, found) < 0.05 * kl(right, exact)
    text = (tmp_path / "engine" / "manifest.json").read_text()
    assert '"precision"' in text
    assert "QuantizeLinear" in text


def test_smoothing_pays_where_channels_stand_out(
    made: tuple[CanonicalWeights, Checkpoint, Path], tmp_path: Path
) -> None:
    source, checkpoint, _ = made
    if source.decoder.gated:
        pytest.skip("only the other model has outlier channels")
    right = logits(source, torch.tensor([IDS]))[0].numpy()
    rounded = scores(
        source.checkpoint, "onnx", onnx.Params("w8a8", accuracy_level=1), tmp_path / "rounded"
    )
    smoothed = scores(
        checkpoint, "onnx", onnx.Params("w8a8", accuracy_level=1), tmp_path / "smoothed"
    )
    assert kl(right, smoothed) < 0.3 * kl(right, rounded)


def test_what_is_refused(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The patient was given aspirin. " * 200)
    refused(
        cli(
            "quantize",
            model,
            "--out",
            tmp_path / "out",
            "--method",
            "smoothquant",
            "--set",
            "bits=8",
            "--set",
            "group=-1",
        ),
        "smoothquant needs calibration text",
    )
    checkpoint = open_checkpoint(model)
    for wrong in ({"bits": 4}, {"group": 32}, {"alpha": 1.5}, {"budget": "8bpw"}):
        with pytest.raises(EdgemedError, match="int8 with one scale per output"):
            quantize.run(
                checkpoint,
                tmp_path / "out",
                quantize.Params(
                    "smoothquant", **{"bits": 8, "group": -1, "calibration": str(text), **wrong}
                ),
            )
    experts = open_checkpoint(write_model(tmp_path / "experts", family="moe_llava"))
    with pytest.raises(EdgemedError, match="not written for mixtures of experts"):
        quantize.run(
            experts,
            tmp_path / "out",
            quantize.Params(
                "smoothquant",
                8,
                -1,
                str(text),
                samples=2,
                length=32,
            ),
        )
    with pytest.raises(EdgemedError, match="w8a8 is not written for mixtures of experts"):
        export(experts, "onnx", onnx.Params("w8a8"), tmp_path / "engine")
    with pytest.raises(EdgemedError, match="scales of the activations from calibration"):
        export(checkpoint, "tensorrt", tensorrt.Params(precision="w8a8"), tmp_path / "engine")
    (tmp_path / "int8").mkdir()
    quantize.run(checkpoint, tmp_path / "int8", quantize.Params("rtn", 8, 32))
    with pytest.raises(
        EdgemedError,
        match="w8a8 takes symmetric int8 with one scale per output, the checkpoint holds int8 g32",
    ):
        export(open_checkpoint(tmp_path / "int8"), "onnx", onnx.Params("w8a8"), tmp_path / "engine")
