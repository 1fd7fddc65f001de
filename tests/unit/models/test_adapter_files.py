"""Whether an adapter's base was quantized, as far as the base lies on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgemed.models.adapter_files import quantized_base


@pytest.mark.parametrize(
    ("content", "method"),
    [
        ('{"quantization_config": {"quant_method": "gptq"}}', "gptq"),
        ('{"quantization_config": {"quant_method": 4}}', None),
        ('{"quantization_config": ["gptq"]}', None),
        ("{}", None),
        ("[]", None),
        ('{"quantization_config": {"quant_method": "gptq"}', None),
        ('{"quantization_config": {}, "quantization_config": {"quant_method": "gptq"}}', None),
        ("[" * 100_000, None),
        ("\xff\xfe", None),
    ],
)
def test_the_config_of_the_base(tmp_path: Path, content: str, method: str | None) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_bytes(content.encode("latin-1"))
    reason = quantized_base({"base_model_name_or_path": str(base)})
    assert reason == (f"its base {base} is quantized ({method})" if method else None)


@pytest.mark.parametrize("base", ["", "owner/name", "a\0b", "x" * 5000])
def test_a_base_that_is_no_directory(base: str) -> None:
    assert quantized_base({"base_model_name_or_path": base}) is None
