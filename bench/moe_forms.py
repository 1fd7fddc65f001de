"""Forms of a mixture of experts on ONNX Runtime's CPU, at true dimensions with random weights:
which is fastest at decode and at prefill.

Every form is checked against the first before it is timed; they take turns in each round, and the
layers are many enough that the weights do not fit a cache. Run: python bench/moe_forms.py --model
moe-tinymed --bits 4 (random weights: a speed, nothing else)
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from records import paired_ratio, save, spread

from edgemed.models.architecture import DecoderConfig
from edgemed.models.weights import CanonicalWeights, Dense, Packed
from edgemed.onnx.decoder_graph import Graph, Precision, mlp, one_mlp, shares, used
from edgemed.onnx.ort_dialect import MS, OrtDialect
from edgemed.planning.inspect import described


class Random:
    """Weights of the sparse layers alone: random integers with one scale, made when they are asked
    for and the same each time.
    """

    def __init__(self, d: DecoderConfig, biases: bool, bits: int, group: int):
        self.decoder = d
        self.biases = biases
        self.bits = bits
        self.group = group

    def matrix(self, name: str) -> Dense | Packed:
        d = self.decoder
        last = name.split(".")[-1]
        random = np.random.default_rng(sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31)
        rows, columns = {
            "up": ((2 if d.gated else 1) * d.ffn, d.hidden),
            "down": (d.hidden, d.ffn),
            "router": (d.experts.count, d.hidden),
        }[last]
        bias = (
            torch.from_numpy(random.standard_normal(rows, np.float32) * 0.1)
            if (self.biases if last != "router" else d.experts.router_bias)
            else None
        )
        if last == "router":
            return Dense(
                torch.from_numpy(random.standard_normal((rows, columns), np.float32) * 0.2), bias
            )
        q = torch.from_numpy(random.integers(0, 1 << self.bits, (rows, columns), np.uint8))
        zero = 1 << (self.bits - 1)
        shape = (rows, columns // self.group)
        return Packed(
            q,
            torch.full(shape, 0.02 * 4 / (1 << self.bits)),
            torch.full(shape, zero, dtype=torch.uint8),
            None,
            self.bits,
            self.group,
            bias,
        )


class All(OrtDialect):
    """Every expert computes every token."""

    def experts(self, graph: Graph, weights: Any, n: int, x: str, gates: str, chosen: str) -> str:
        found = []
        for j, share in enumerate(shares(graph, weights.decoder, n, gates, chosen)):
            at = f"layers.{n}.experts.{j}"
            found.append(
                graph.node("Mul", [one_mlp(graph, self, weights, at, x), share], f"{at}.made")
            )
        return graph.node("Sum", found, f"layers.{n}.experts")


class Branches(OrtDialect):
    """The dialect's form inside one If per expert."""

    def experts(self, graph: Graph, weights: Any, n: int, x: str, gates: str, chosen: str) -> str:
        name = f"layers.{n}"
        node = graph.node
        d = weights.decoder
        rows = node(
            "Reshape", [x, graph.constant(f"{name}.flat", np.array([-1, d.hidden]))], f"{name}.rows"
        )
        y = node(
            "Mul",
            [rows, graph.constant(f"{name}.nothing", np.zeros(1, np.float32))],
            f"{name}.none",
        )
        tokens = graph.constant(f"{name}.tokens", np.array([-1]))
        for j, share in enumerate(shares(graph, d, n, gates, chosen)):
            at = f"{name}.experts.{j}"

            def then(at: str = at, share: str = share, y: str = y) -> str:
                gate = node("Reshape", [share, tokens], f"{at}.gates")
                place = node(
                    "Transpose",
                    [node("NonZero", [gate], f"{at}.index")],
                    f"{at}.place",
                    perm=[1, 0],
                )
                weight = node(
                    "Unsqueeze",
                    [node("GatherND", [gate, place], f"{at}.gate_rows"), tokens],
                    f"{at}.weight_rows",
                )
                made = node(
                    "Mul",
                    [
                        one_mlp(
                            graph, self, weights, at, node("GatherND", [rows, place], f"{at}.taken")
                        ),
                        weight,
                    ],
                    f"{at}.made",
                )
                return node("ScatterND", [y, place, made], f"{at}.added", reduction="add")

            y = graph.either(used(graph, n, share), f"{at}.sum", then, y)
        return node(
            "Unsqueeze", [y, graph.constant(f"{name}.batch", np.array([0]))], f"{name}.experts"
        )


def stacked(
    weights: Any, n: int, part: str, bits: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(packed uint8 [experts, out, in * bits / 8], scales [experts, out, groups], biases [experts,
    out] or None).
    """
    q = []
    scales = []
    biases = []
    for j in range(weights.decoder.experts.count):
        matrix = weights.matrix(f"layers.{n}.experts.{j}.{part}")
        ints = matrix.q.numpy()
        q.append(ints if bits == 8 else ints[:, 0::2] | ints[:, 1::2] << 4)
        scales.append(matrix.scales.numpy())
        biases.append(None if matrix.bias is None else matrix.bias.numpy())
    return np.stack(q), np.stack(scales), None if biases[0] is None else np.stack(biases)


class QMoE(OrtDialect):
    """ONNX Runtime's own operator."""

    def experts(self, graph: Graph, weights: Any, n: int, x: str, gates: str, chosen: str) -> str:
        name = f"layers.{n}"
        d = weights.decoder
        p = graph.precision
        rows = graph.node(
            "Reshape", [x, graph.constant(f"{name}.flat", np.array([-1, d.hidden]))], f"{name}.rows"
        )
        shares(graph, d, n, gates, chosen)
        table = graph.node(
            "Reshape",
            [f"{name}.table", graph.constant(f"{name}.wide", np.array([-1, d.experts.count]))],
            f"{name}.gate_table",
        )
        inputs = [rows, table]
        for part in ("up", "down"):
            q, scales, bias = stacked(weights, n, part, p.bits)
            if part == "up" and d.gated:  # gate and up rows alternate
                q, scales = (
                    np.stack([a[:, : d.ffn], a[:, d.ffn :]], 2).reshape(a.shape)
                    for a in (q, scales)
                )
            inputs += [
                graph.constant(f"{name}.{part}.q", q),
                graph.constant(f"{name}.{part}.scales", scales),
                "" if bias is None else graph.constant(f"{name}.{part}.bias", bias),
            ]
        inputs += [""] * 6 + [table]
        act = (
            {
                "activation_type": "swiglu",
                "swiglu_fusion": 1,
                "activation_alpha": 1.0,
                "activation_beta": 0.0,
            }
            if d.gated
            else {"activation_type": "gelu"}
        )
        y = graph.node(
            "QMoE",
            inputs,
            f"{name}.qmoe",
            domain=MS,
            k=d.experts.active,
            normalize_routing_weights=0,
            expert_weight_bits=p.bits,
            block_size=p.group,
            accuracy_level=p.accuracy_level,
            **act,
        )
        return graph.node(
            "Unsqueeze", [y, graph.constant(f"{name}.batch", np.array([0]))], f"{name}.experts"
        )


class Blocks(OrtDialect):
    """One token: the chosen experts' packed blocks are gathered and multiplied; nothing can be
    prepared when the model is loaded.
    """

    def experts(self, graph: Graph, weights: Any, n: int, x: str, gates: str, chosen: str) -> str:
        name = f"layers.{n}"
        node = graph.node
        d = weights.decoder
        p = graph.precision
        found = []
        tables = {}
        for part in ("up", "down"):
            q, scales, bias = stacked(weights, n, part, p.bits)
            q = q.reshape(*q.shape[:2], -1, p.group * p.bits // 8)
            tables[part] = [
                graph.constant(f"{name}.{part}.q", q),
                graph.constant(f"{name}.{part}.scales", scales),
                None if bias is None else graph.constant(f"{name}.{part}.bias", bias),
            ]
        axes = graph.constant(f"{name}.axes", np.array([0, 1]))
        for slot in range(d.experts.active):
            at = f"{name}.slot.{slot}"
            number = graph.constant(f"{at}.number", np.array([slot]), dims=())
            expert = node(
                "Squeeze",
                [node("Gather", [chosen, number], f"{at}.expert", axis=2), axes],
                f"{at}.index",
            )
            gate = node(
                "Squeeze",
                [node("Gather", [gates, number], f"{at}.gate_of", axis=2), axes],
                f"{at}.gate",
            )

            def product(part: str, x: str, at: str = at, expert: str = expert) -> str:
                parts = [
                    node("Gather", [table, expert], f"{at}.{part}.{k}", axis=0)
                    for k, table in enumerate(tables[part])
                    if table
                ]
                inputs = [x, *parts[:2], "", "", *parts[2:]]
                while not inputs[-1]:
                    inputs.pop()
                rows, columns = (
                    ((2 if d.gated else 1) * d.ffn, d.hidden) if part == "up" else (d.hidden, d.ffn)
                )
                return node(
                    "MatMulNBits",
                    inputs,
                    f"{at}.{part}",
                    domain=MS,
                    K=columns,
                    N=rows,
                    bits=p.bits,
                    block_size=p.group,
                    accuracy_level=p.accuracy_level,
                )

            y = product("up", x)
            if d.gated:
                node("Split", [y], f"{at}.halves", [f"{at}.g", f"{at}.u"], axis=-1, num_outputs=2)
                y = node(
                    "Mul",
                    [self.activation(graph, d, f"{at}.act", f"{at}.g"), f"{at}.u"],
                    f"{at}.gated",
                )
            else:
                y = self.activation(graph, d, f"{at}.act", y)
            found.append(node("Mul", [product("down", y), gate], f"{at}.made"))
        return node("Sum", found, f"{name}.experts") if len(found) > 1 else found[0]


FORMS: dict[str, type[OrtDialect]] = {
    "gathers": OrtDialect,
    "branches": Branches,
    "qmoe": QMoE,
    "blocks": Blocks,
    "all": All,
}


def build(
    form: str, weights: Any, layers: int, folder: Path, precision: Precision
) -> ort.InferenceSession:
    graph = Graph(folder, precision)
    dialect = FORMS[form]()
    d = weights.decoder
    graph.value("inputs", "x", graph.float_type, [1, "new", d.hidden])
    x = "x"
    ones = graph.constant("ones", np.ones(d.hidden, np.float32))
    for n in range(layers):
        read = graph.node("LayerNormalization", [x, ones], f"layers.{n}.norm", axis=-1)
        x = graph.node("Add", [x, mlp(graph, dialect, weights, n, read)], f"layers.{n}.out")
    graph.node("Identity", [x], "y")
    graph.value("outputs", "y", graph.float_type, [1, "new", d.hidden])
    graph.save(form, dialect)
    options = ort.SessionOptions()
    options.intra_op_num_threads = args.threads
    options.log_severity_level = 3
    return ort.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )


def main() -> None:
    published = CanonicalWeights(described(args.model))
    d = published.unfolded
    d = replace(
        d,
        layers=args.layers,
        experts=replace(d.experts, layers=tuple(range(args.layers)), shared=False),
    )
    weights = Random(d, published.parts["layers.1.up"].bias, args.bits, args.group)
    precision = Precision(bits=args.bits, group=args.group, accuracy_level=args.accuracy_level)
    random = np.random.default_rng(0)
    inputs = {
        new: [
            random.standard_normal((1, new, d.hidden), dtype=np.float32)
            for _ in range(16 if new == 1 else 1)
        ]
        for new in args.tokens
    }
    sessions: dict[str, ort.InferenceSession] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        expected: np.ndarray | None = None
        for form in args.forms:
            (Path(folder) / form).mkdir()
            sessions[form] = build(form, weights, args.layers, Path(folder) / form, precision)
            found = np.concatenate([sessions[form].run(None, {"x": x})[0] for x in inputs[1]])
            expected = found if expected is None else expected
            print(
                f"{form}: largest difference {np.abs(found - expected).max():.2e} of"
                f" {np.abs(expected).max():.2f}",
                flush=True,
            )
        times: dict[str, list[float]] = {}
        for _ in range(args.rounds):
            for new, xs in inputs.items():
                for form, session in sessions.items():
                    if form == "blocks" and new > 1:
                        continue
                    time.sleep(0.1)  # threads of the other session stop spinning
                    session.run(None, {"x": xs[0]})
                    started = time.perf_counter()
                    for x in xs:
                        session.run(None, {"x": x})
                    times.setdefault(f"{form} {new}", []).append(
                        (time.perf_counter() - started) / len(xs)
                    )
    first = args.forms[0]
    save(
        "moe_forms",
        {
            "model": args.model,
            "random_weights": True,
            "bits": args.bits,
            "group": args.group,
            "accuracy_level": args.accuracy_level,
            "layers": args.layers,
            "threads": args.threads,
            "unit": "s",
            "times": {name: spread(values) for name, values in times.items()},
            f"speed_of_{first}_over": {
                name: paired_ratio(values, times[f"{first} {name.split()[1]}"])
                for name, values in times.items()
                if not name.startswith(f"{first} ")
            },
        },
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="moe-tinymed")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--accuracy-level", type=int, default=4)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 128, 640])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--folder", help="where the graphs are written for the time of the run")
    args = parser.parse_args()
    main()
