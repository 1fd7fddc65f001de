"""What a quantization method has to say of itself. One file in methods/ is one method: it exports
`METHOD`, a value of one of the two kinds here.

Most methods quantize one decoder layer after the other and are written in the AutoGPTQ layout. A
method with a layout of its own writes the whole checkpoint by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemed import plugins
from edgemed.errors import EdgemedError

if TYPE_CHECKING:
    from edgemed.models.weights import CanonicalWeights
    from edgemed.quantization.hidden_states import Activations
    from edgemed.quantization.layerwise import QuantizedLayer
    from edgemed.quantization.settings import Packings, QuantizeSettings

    # (weights, number of the layer, hidden states, packings of its matrices, settings) -> the
    # layer. Hidden states: those of the quantized layers before it, and where the method corrects
    # inputs those of the float layers too. The layer leaves in them what it gives itself.
    QuantizeLayer = Callable[
        [CanonicalWeights, int, Sequence[Activations], Packings, QuantizeSettings], QuantizedLayer
    ]
    # (matrix of one layer -> its shape (out, in)) -> numbers of its second moments held at once
    MomentCount = Callable[[Mapping[str, tuple[int, ...]], QuantizeSettings], int]
    # (weights, output folder, whether scales are quantized too) -> the manifest's notes
    WriteCheckpoint = Callable[[CanonicalWeights, Path, bool], dict[str, Any]]

KIND = "quantization/methods"


@dataclass(frozen=True)
class LayerMethod:
    """A method that quantizes layer by layer.

    moments: what it holds of second moments, for the memory estimate; None where it reads no
    inputs. calibrated: it reads calibration samples. corrects_inputs: it can make good the error
    in a matrix' inputs. clip: the default of that parameter. scales_inputs: it folds scales of the
    inputs into the weights before them, so an adapter of the float model no longer fits.
    """

    quantize_layer: QuantizeLayer
    moments: MomentCount | None = None
    calibrated: bool = True
    corrects_inputs: bool = False
    clip: bool = True
    scales_inputs: bool = False
    # Raises EdgemedError where the method cannot do what the parameters ask of this model.
    check: Callable[[CanonicalWeights, int, int, QuantizeSettings], None] | None = None
    # The packing for which `check` passes, None where every one does.
    packing: tuple[int, int] | None = None


@dataclass(frozen=True)
class CheckpointMethod:
    """A method with a layout of its own. packing: its bits and its weights per scale (-1: one scale
    per row); packing_text: the same for a message. double_quant: its scales can be quantized too.
    """

    write: WriteCheckpoint
    packing: tuple[int, int]
    packing_text: str
    double_quant: bool = False


def method_names() -> list[str]:
    """The methods as recipes name them: 'gptq', 'bnb-nf4'."""
    return [name.replace("_", "-") for name in plugins.names(KIND)]


def load_method(name: str) -> LayerMethod | CheckpointMethod:
    """The method of this name; 'auto' is gptq. Raises EdgemedError with the nearest known name."""
    file = "gptq" if name == "auto" else name.replace("-", "_")
    method: LayerMethod | CheckpointMethod = plugins.load(KIND, file).METHOD
    return method


def layer_method(name: str) -> LayerMethod:
    """A method that quantizes layer by layer. Raises EdgemedError for one with another layout."""
    method = load_method(name)
    if not isinstance(method, LayerMethod):
        raise EdgemedError(
            f"{name} does not quantize layer by layer", "Use gptq, awq, smoothquant or rtn"
        )
    return method
