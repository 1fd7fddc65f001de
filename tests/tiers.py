"""Which tests are too slow for every edit: whole files by name here, single tests by their marker.

What is slow is in the full suite only. `pytest -m "not slow"` leaves it out.
"""

from __future__ import annotations

# Files and folders below tests/, and single tests as file::function.
SLOW = (
    # Whole recipes.
    "end_to_end/test_quickstart.py",
    "end_to_end/test_quickstart_vision.py",
    # Training.
    "parity/distillation",
    "parity/evaluation/test_test_time_training.py",
    "parity/models/test_qlora.py",
    # Models with images or experts, against transformers and between engines.
    "parity/evaluation/test_image_tasks.py",
    "parity/gguf/test_mmproj.py",
    "parity/models/test_llava.py",
    "parity/models/test_vision_adapters.py",
    "parity/moe",
    "parity/quantization/test_image_calibration.py",
    "parity/tensorrt/test_vision.py",
    "parity/verification/test_vision_parity.py",
    # Every family, type or method in turn.
    "parity/gguf/test_gguf_gptq.py",
    "parity/gguf/test_llamacpp.py::test_bit_identical_with_importance",
    "parity/gguf/test_llamacpp.py::test_every_family_gets_the_types_llama_quantize_gives",
    "parity/models/test_bitsandbytes.py",
    "parity/models/test_adapter_kinds.py",
    "parity/models/test_switchable_adapters.py",
    "parity/models/test_tied_embeddings.py",
    "parity/quantization/test_bit_allocation.py",
    "parity/quantization/test_gptq.py::test_gptq_beats_rounding_on_the_trained_model",
    "parity/quantization/test_kv_cache.py",
    "parity/quantization/test_memory_budget.py",
    "parity/quantization/test_methods.py::test_the_expected_divergence_is_the_measured_one",
    "parity/quantization/test_methods.py::test_the_root_is_the_cholesky_factor_of_the_inverse",
    "parity/quantization/test_same_integers.py",
    "parity/quantization/test_smoothquant.py",
    "parity/tensorrt/test_tensorrt.py::test_the_same_answers_as_the_onnx_engine",
    # Error rates, summed over all outcomes.
    "unit/evaluation/test_paired_statistics.py::test_gate_of_four_bad_engines",
    "unit/evaluation/test_paired_statistics.py::test_holm",
    "unit/evaluation/test_paired_statistics.py::test_items_needed_decide_in_four_of_five",
    "unit/evaluation/test_paired_statistics.py::test_limits_agree_with_the_tests",
    "unit/evaluation/test_paired_statistics.py::test_lower_limit_covers",
    "unit/evaluation/test_paired_statistics.py::test_minimum_detectable_is_found_in_four_of_five",
    "unit/evaluation/test_paired_statistics.py::test_wrong_verdicts_are_at_most_alpha",
)


def is_slow(file: str, function: str) -> bool:
    """Whether a test of a file below tests/ stands in the list, by itself or with its folder."""
    return any(
        file == entry or file.startswith(f"{entry}/") or f"{file}::{function}" == entry
        for entry in SLOW
    )
