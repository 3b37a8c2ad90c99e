"""NanoChat as Qwen3 is the same function."""

import pytest
import torch
from transformers import Qwen3ForCausalLM

from hfsft.errors import ModelError
from hfsft.export.architecture import as_qwen3, swapped_halves, uncapped


@pytest.mark.parametrize("settings", [{}, {"num_key_value_heads": 1}, {"hidden_size": 96}])
def test_logits_are_equal_to_float_noise(make_model, settings):
    model = make_model("nanochat", **settings)
    ids = torch.randint(0, 512, (3, 40), generator=torch.Generator().manual_seed(0))
    mapped = as_qwen3(model)
    assert isinstance(mapped, Qwen3ForCausalLM)
    with torch.no_grad(), uncapped(model) as cap:
        logits, expected = mapped(ids).logits, model(ids).logits
    assert cap == 15.0 == model.config.final_logit_softcapping
    # the logits' own size is some tens: 1e-4 is their float32 noise over two layers
    assert (logits - expected).abs().max() < 1e-4 < expected.abs().max()


def test_the_halves_of_each_head_are_swapped():
    rows = torch.arange(8).float()[:, None]
    assert swapped_halves(rows, 4).flatten().tolist() == [2, 3, 0, 1, 6, 7, 4, 5]


@pytest.mark.parametrize("settings", [{"attention_bias": True}, {"hidden_act": "silu"}])
def test_a_variant_that_the_mapping_does_not_cover_is_refused(make_model, settings):
    with pytest.raises(ModelError, match="cannot be written as a Qwen3"):
        as_qwen3(make_model("nanochat", **settings))
