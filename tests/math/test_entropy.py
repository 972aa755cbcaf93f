"""Attention entropy against a float64 softmax and closed forms."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from aegpo.math.entropy import attention_entropy


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Entropy of the float64 softmax, one query head at a time."""
    share = q.shape[1] // k.shape[1]
    heads = [(scale * q[:, h] @ k[:, h // share].mT).softmax(-1) for h in range(q.shape[1])]
    return torch.special.entr(torch.stack(heads, 1)).sum(-1)


@pytest.mark.parametrize("key_heads", [6, 3, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.9])
def test_entropy_is_that_of_the_softmax(key_heads, scale):
    q, k = randn(2, 6, 5, 8), randn(2, key_heads, 7, 8, seed=1)
    expected = reference(q, k, 8**-0.5 if scale is None else scale)
    torch.testing.assert_close(attention_entropy(q, k, scale), expected, rtol=1e-12, atol=1e-12)
    got = attention_entropy(q.float(), k.float(), scale)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-6)


def test_grouped_heads_share_keys_as_in_torch():
    """Perplexities of torch's own grouped attention weights, read off by attending to the identity."""
    q, k = randn(1, 4, 3, 5), randn(1, 2, 6, 5, seed=1)
    weights = scaled_dot_product_attention(q, k, torch.eye(6).double().expand(1, 2, 6, 6), enable_gqa=True)
    torch.testing.assert_close(attention_entropy(q, k), torch.special.entr(weights).sum(-1))


def test_chosen_rows_are_those_of_all_rows():
    q, k = randn(2, 4, 9, 8), randn(2, 2, 7, 8, seed=1)
    rows = torch.tensor([8, 0, 3, 3])
    torch.testing.assert_close(attention_entropy(q, k, rows=rows), attention_entropy(q, k)[:, :, rows])


def test_equal_keys_give_log_n():
    q, k = randn(2, 3, 4, 8).float(), randn(2, 3, 1, 8, seed=1).float().expand(2, 3, 11, 8)
    torch.testing.assert_close(attention_entropy(q, k), torch.full((2, 3, 4), math.log(11)))


@pytest.mark.parametrize("size", [1e2, 1e8, 1e17])
def test_one_hot_rows_give_zero_and_never_nan(size):
    q = torch.eye(6).reshape(1, 1, 6, 6) * size
    got = attention_entropy(q, torch.eye(6).reshape(1, 1, 6, 6) * size, scale=1.0)
    assert got.abs().max().item() < 1e-6


def test_two_keys_far_above_the_others_give_log_two():
    q = torch.full((1, 1, 1, 1), 1e6)
    k = torch.tensor([1.0, 1.0, 0.5, -1.0]).reshape(1, 1, 4, 1)
    assert attention_entropy(q, k).item() == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_before_the_logits_even_under_autocast(dtype):
    q, k = randn(2, 4, 5, 64).to(dtype), randn(2, 2, 33, 64, seed=1).to(dtype)
    expected = reference(q.double(), k.double(), 1 / 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attention_entropy(q, k)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=5e-6)


def test_heads_that_cannot_be_grouped_are_our_own_mistake():
    with pytest.raises(AssertionError, match="4 query heads cannot share 3 key heads"):
        attention_entropy(randn(1, 4, 3, 2), randn(1, 3, 5, 2))
