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


METHODS = pytest.mark.parametrize("method", ["rows", "lse"])


def both_ways(q, k, tolerance=1e-5, mask=None, **options):
    """Each method, all rows and a few, against the float64 softmax of the same numbers."""
    logits = q.double() @ k.double().mT * options.get("scale", q.shape[-1] ** -0.5)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask.double()
    expected = torch.special.entr(logits.softmax(-1)).sum(-1)
    rows = torch.tensor([0, 3, 1])
    for method in ("rows", "lse"):
        got = attention_entropy(q, k, method=method, mask=mask, **options)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=0)
        some = attention_entropy(q, k, method=method, mask=mask, rows=rows, **options)
        torch.testing.assert_close(some.double(), expected[:, :, rows], atol=tolerance, rtol=0)
    return expected


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)])
@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_both_methods_are_the_float64_softmax(dtype, tolerance, spread):
    """Half precision is what comes in, and is widened; nothing is rounded to it again."""
    q, k = (spread * randn(2, 3, 40, 32)).to(dtype), randn(2, 3, 70, 32, seed=1).to(dtype)
    assert both_ways(q, k, tolerance).std() > 0


def test_both_methods_on_uniform_and_on_one_hot_rows():
    q, k = randn(2, 3, 5, 8).float(), randn(2, 3, 1, 8, seed=1).float().expand(2, 3, 11, 8)
    torch.testing.assert_close(both_ways(q, k), torch.full((2, 3, 5), math.log(11.0), dtype=torch.float64))
    eye = torch.eye(6).reshape(1, 1, 6, 6)
    assert both_ways(eye * 100, eye, scale=1.0).max() < 1e-9


@pytest.mark.parametrize("size", [1e2, 2.0**14, 2.0**40])
def test_very_large_logits_that_float32_holds_are_exact(size):
    """Small whole numbers times a power of two: the logits have no rounding, so neither do their differences."""
    q = size * torch.randint(-3, 4, (2, 3, 20, 4), generator=torch.Generator().manual_seed(0)).float()
    k = torch.randint(-3, 4, (2, 3, 30, 4), generator=torch.Generator().manual_seed(1)).float()
    logits = q.double() @ k.double().mT
    expected = torch.special.entr(logits.softmax(-1)).sum(-1)
    got = attention_entropy(q, k, scale=1.0)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)
    assert len(expected.unique()) >= 3  # one key, or two or three that tie: 0, log 2, log 3


@pytest.mark.parametrize(("method", "share"), [("rows", 2e-7), ("lse", 1e-6)])
def test_what_is_left_is_the_rounding_of_the_logits(method, share):
    """As the docstring has it: so much of the largest logit."""
    for spread in (1.0, 10.0, 100.0):
        q, k = spread * randn(2, 4, 64, 64).float(), randn(2, 4, 512, 64, seed=1).float()
        logits = q.double() @ k.double().mT / 8
        expected = torch.special.entr(logits.softmax(-1)).sum(-1)
        error = (attention_entropy(q, k, method=method) - expected).abs().max()
        assert error < share * max(logits.abs().max().item(), 30)


@pytest.mark.parametrize("shape", [(2, 3, 9, 12), (2, 1, 9, 12), (2, 1, 1, 12), (1, 1, 9, 12), (9, 12)])
def test_masked_keys_do_not_count(shape):
    q, k = randn(2, 3, 9, 8).float(), randn(2, 3, 12, 8, seed=1).float()
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.4
    mask[..., 0] = True
    expected = both_ways(q, k, mask=mask)
    for hidden in (-math.inf, -10000.0):  # diffusers' masks are such numbers
        added = torch.zeros(shape).masked_fill(~mask, hidden)
        torch.testing.assert_close(both_ways(q, k, mask=added), expected)
    counts = mask.expand(2, 3, 9, 12).sum(-1)
    shares = attention_entropy(q, k, mask=mask, normalise=True)
    torch.testing.assert_close(shares.double(), torch.where(counts > 1, expected / counts.clamp(min=2).log(), 0.0))


@METHODS
def test_with_a_mask_alike_keys_give_the_logarithm_of_those_that_are_seen_and_one_for_their_share(method):
    k = randn(1, 1, 1, 8).float().expand(1, 2, 10, 8)
    q, counts = randn(1, 2, 5, 8).float(), torch.tensor([0, 1, 2, 7, 10])
    mask = torch.arange(10) < counts[:, None]
    got = attention_entropy(q, k, mask=mask, method=method)
    logs = counts.clamp(min=1).log().float()
    torch.testing.assert_close(got, logs.expand(1, 2, 5))
    got = attention_entropy(q, k, mask=mask, method=method, normalise=True)
    torch.testing.assert_close(got, (counts > 1).float().expand(1, 2, 5))
    whole = attention_entropy(q, k, method=method, normalise=True)
    torch.testing.assert_close(whole, torch.ones(1, 2, 5))


@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_lse_serves_grouped_heads_and_float64(key_heads):
    q, k = randn(2, 4, 9, 8), randn(2, key_heads, 12, 8, seed=1)
    torch.testing.assert_close(attention_entropy(q, k, method="lse"), reference(q, k, 8**-0.5), rtol=1e-12, atol=1e-12)


def test_a_bias_that_weighs_keys_is_for_rows_alone():
    q, k, bias = randn(2, 3, 9, 8), randn(2, 3, 12, 8, seed=1), randn(1, 3, 9, 12, seed=2)
    expected = torch.special.entr((q @ k.mT * 8**-0.5 + bias).softmax(-1)).sum(-1)
    torch.testing.assert_close(attention_entropy(q, k, mask=bias), expected)
    with pytest.raises(ValueError, match="method lse takes a mask that hides keys"):
        attention_entropy(q, k, mask=bias, method="lse")


def test_unknown_method_is_named():
    with pytest.raises(ValueError, match="method must be one of rows, lse, not 'matrix'"):
        attention_entropy(randn(1, 1, 2, 2), randn(1, 1, 2, 2), method="matrix")  # pyright: ignore[reportArgumentType]


def test_sixty_four_rows_of_512_estimate_the_mean_of_all():
    q, k = randn(1, 24, 512, 64).float(), randn(1, 24, 544, 64, seed=1).float()
    rows = torch.arange(64) * 511 // 63
    assert attention_entropy(q, k, rows=rows).mean() == pytest.approx(attention_entropy(q, k).mean().item(), rel=2e-3)


def test_heads_that_cannot_be_grouped_are_our_own_mistake():
    with pytest.raises(AssertionError, match="4 query heads cannot share 3 key heads"):
        attention_entropy(randn(1, 4, 3, 2), randn(1, 3, 5, 2))


def test_no_keys_one_key_and_a_mask_for_all_keys_at_once():
    q, k = randn(1, 2, 3, 4).float(), randn(1, 2, 5, 4).float()
    for method in ("rows", "lse"):
        assert attention_entropy(q, k[:, :, :0], method=method).tolist() == [[[0.0] * 3] * 2]
        for normalise in (False, True):
            one = attention_entropy(1e30 * q, 1e30 * k[:, :, :1], method=method, normalise=normalise)
            assert one.tolist() == [[[0.0] * 3] * 2]
        whole = attention_entropy(q, k, method=method, normalise=True)
        assert whole.min() > 0
        for mask in (torch.ones(3, 1, dtype=torch.bool), torch.zeros(1, 1, 3, 1)):
            torch.testing.assert_close(attention_entropy(q, k, mask=mask, method=method, normalise=True), whole)
