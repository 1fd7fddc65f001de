"""How well the expected KL divergence of one quantized matrix agrees with the measured one, on the
quickstart model. The expected one is that of edgemed/quantization/sensitivity.py.

Every layer matrix is quantized alone, at several widths, and the model's scores are compared with
its own before: python bench/quality/sensitivity.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))
from records import save

MODEL = ROOT / "recipes/quickstart/model"
CARD = "pubmedqa-abstracts"
WINDOWS = 16
LENGTH = 128
GROUP = 64


def main() -> None:
    import torch

    from edgemed.data.text_sets import calibration_sequences
    from edgemed.models.checkpoint import open_checkpoint
    from edgemed.models.tokenizer import open_tokenizer
    from edgemed.models.torch_decoder import block, embed, load_layer, norm, output_head
    from edgemed.models.weights import CanonicalWeights
    from edgemed.quantization.gptq import Solution
    from edgemed.quantization.grids import rtn
    from edgemed.quantization.sensitivity import sensitivities

    weights = CanonicalWeights(open_checkpoint(MODEL), fold=True)
    d = weights.decoder
    windows = torch.tensor(
        calibration_sequences(CARD, open_tokenizer(MODEL, d.vocab), WINDOWS, LENGTH)
    )
    layers = [load_layer(weights, n) for n in range(d.layers)]
    (final, matrix, bias) = output_head(weights)

    def answers(x: torch.Tensor, start: int) -> torch.Tensor:
        for n in range(start, d.layers):
            x = block(d, layers[n], n, x)
        return torch.nn.functional.linear(
            norm(d, final, "final_norm", x), matrix, bias
        ).log_softmax(-1)

    with torch.inference_mode():
        hidden = [embed(weights, windows)]
        for n in range(d.layers):
            hidden.append(block(d, layers[n], n, hidden[-1]))
        source = answers(hidden[-1], d.layers)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for n, found in sensitivities(weights, windows.tolist(), Path(folder)):
            for name, sensitivity in found.items():
                for bits in (2, 3, 4):
                    quantized = Solution(*rtn(sensitivity.weight, bits, GROUP)).dense(bits)
                    float_matrix = layers[n][name]
                    layers[n][name] = (quantized, float_matrix[1])
                    with torch.inference_mode():
                        other = answers(hidden[n], n)
                    layers[n][name] = float_matrix
                    rows.append(
                        {
                            "matrix": f"layers.{n}.{name}",
                            "bits": bits,
                            "expected": sensitivity.loss(quantized),
                            "measured": float((source.exp() * (source - other)).sum(-1).mean()),
                        }
                    )
    facts = {}
    for bits in (2, 3, 4):
        expected, measured = (
            np.array([row[key] for row in rows if row["bits"] == bits])
            for key in ("expected", "measured")
        )
        ranks = [np.argsort(np.argsort(values)) for values in (expected, measured)]
        ratio = expected / measured
        facts[f"{bits} bits"] = {
            "rank_correlation": float(np.corrcoef(*ranks)[0, 1]),
            "ratio_median": float(np.median(ratio)),
            "ratio_min": float(ratio.min()),
            "ratio_max": float(ratio.max()),
        }
    save(
        "quality_sensitivity",
        {
            "model": "quickstart",
            "card": CARD,
            "windows": WINDOWS,
            "length": LENGTH,
            "group": GROUP,
            "agreement": facts,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
