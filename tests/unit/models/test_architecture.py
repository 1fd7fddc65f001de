"""The values of an architecture and what family files share: a usual decoder from a config, the
prompt of one turn, and accessors that refuse what a model does not have.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
from conftest import write_model

from edgemed.errors import EdgemedError
from edgemed.models.architecture import DecoderConfig, ExpertsConfig
from edgemed.models.config_keys import text_keys
from edgemed.models.config_reader import REQUIRED, ConfigReader
from edgemed.models.conversation import CHATML, VICUNA, user_turn
from edgemed.models.family_helpers import usual_decoder
from edgemed.models.rope import ROPE_DEFAULTS

CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 128,
    "max_position_embeddings": 32,
    "rope_theta": 100.0,
    "eos_token_id": [3, 4],
}
KEYS = text_keys(
    {
        **ROPE_DEFAULTS,
        **dict.fromkeys(CONFIG, REQUIRED),
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
)


def reader(config: dict[str, Any] = CONFIG) -> ConfigReader:
    return ConfigReader(config, KEYS)


def test_a_usual_decoder_reads_transformers_keys() -> None:
    d = usual_decoder(reader(), {}, norm_eps=1e-5)
    assert (d.hidden, d.layers, d.heads, d.kv_heads, d.head_dim) == (64, 2, 4, 2, 16)
    assert (d.ffn, d.vocab, d.context, d.eos, d.tied) == (96, 128, 32, 3, False)
    assert d.score_scale == (0.25, 0.25)
    assert (d.positions, len(d.rope_frequencies)) == ("rope", 8)
    assert d.rope_frequencies[4] == pytest.approx(100.0**-0.5)
    assert d.head == "lm"


def test_a_family_states_what_differs() -> None:
    d = usual_decoder(
        reader(), {"score.weight": (5, 64)}, norm_eps=1e-6, head_dim=32, norm="rmsnorm", tied=True
    )
    assert (d.norm, d.tied, d.head, d.head_size) == ("rmsnorm", True, "classes", 5)
    assert d.score_scale[0] == pytest.approx(1 / math.sqrt(32))


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "max_position_embeddings"])
def test_a_missing_size_is_named(key: str) -> None:
    config = {name: value for name, value in CONFIG.items() if name != key}
    with pytest.raises(EdgemedError, match=f"config.json has no {key}"):
        usual_decoder(reader(config), {}, norm_eps=1e-5)


def test_one_turn_in_each_shared_form() -> None:
    assert user_turn(VICUNA, "Which?", 2, image="<image>\n").endswith(
        "questions. USER: <image>\n<image>\nWhich? ASSISTANT:"
    )
    assert user_turn(CHATML, "Which?", 0, image="<image>") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nWhich?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_mixture_only_where_there_is_one() -> None:
    d = usual_decoder(reader(), {}, norm_eps=1e-5)
    assert not d.sparse(0)
    assert not d.has_shared_base(0)
    with pytest.raises(ValueError, match="no mixture of experts"):
        str(d.mixture)
    experts = ExpertsConfig(4, 2, (1,), renormalised=True, rank=8)
    sparse = usual_decoder(reader(), {}, norm_eps=1e-5, experts=experts)
    assert isinstance(sparse, DecoderConfig)
    assert sparse.mixture is experts
    assert [sparse.has_shared_base(n) for n in (0, 1)] == [False, True]
    assert sparse.matrices(1) == ("qkv", "o", "base.up", "base.down")


def test_a_text_model_has_no_vision_encoder(tmp_path) -> None:
    pytest.importorskip("torch")
    from edgemed.models.checkpoint import open_checkpoint
    from edgemed.models.weights import CanonicalWeights

    weights = CanonicalWeights(open_checkpoint(write_model(tmp_path / "model")))
    with pytest.raises(EdgemedError, match="no vision encoder"):
        weights.require_vision()
