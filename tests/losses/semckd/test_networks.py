"""Query and key networks against their equations."""

import numpy as np
import pytest
import torch
from naive import normal
from torch import nn

from hf_semckd.errors import RaggedBatchError
from hf_semckd.losses.semckd.networks import FeatureEmbedding, SimilarityEmbedding


@pytest.mark.parametrize("size", [4, 8, 10, 64])
def test_similarity_embedding_has_the_published_layout(size):
    first, middle, last = SimilarityEmbedding(size)
    assert isinstance(middle, nn.ReLU)
    assert (first.in_features, first.out_features) == (size, 2 * (size // 4))
    assert (last.in_features, last.out_features) == (2 * (size // 4), size // 4)


def test_similarity_embedding_is_the_normalized_two_layer_network():
    torch.manual_seed(0)
    embedding, rows = SimilarityEmbedding(8).double(), normal(8, 8)
    first, last = embedding[0], embedding[2]
    hidden = np.maximum(rows.numpy() @ first.weight.detach().numpy().T + first.bias.detach().numpy(), 0)
    out = hidden @ last.weight.detach().numpy().T + last.bias.detach().numpy()
    expected = out / np.linalg.norm(out, axis=1, keepdims=True)
    np.testing.assert_allclose(embedding(rows).detach(), expected, rtol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_similarity_embedding_of_a_tiny_batch_has_one_dimension(size):
    assert SimilarityEmbedding(size)(torch.randn(size, size)).shape == (size, 1)


def test_similarity_embedding_refuses_another_batch_size():
    with pytest.raises(RaggedBatchError, match=r"(?s)a batch of 5.*8 samples.*dataloader_drop_last=True"):
        SimilarityEmbedding(8)(torch.randn(5, 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_similarity_embedding_takes_large_similarities_under_autocast(dtype):
    torch.manual_seed(0)
    embedding, rows = SimilarityEmbedding(8), torch.rand(8, 8) * 1e7
    with torch.autocast("cpu", dtype=dtype):
        out = embedding(rows)
    torch.testing.assert_close(out.float(), embedding(rows))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_similarity_embedding_cast_to_half_precision_takes_float32_rows(dtype):
    assert SimilarityEmbedding(8).to(dtype)(torch.rand(8, 8)).isfinite().all()


def test_feature_embedding_has_unit_length_and_ignores_scale_and_the_rest_of_the_batch():
    torch.manual_seed(0)
    embedding, features = FeatureEmbedding(6).double(), normal(5, 6)
    out = embedding(features)
    torch.testing.assert_close(out.norm(dim=1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(embedding(features * 1000 + 7), out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(embedding(features[2:3]), out[2:3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_feature_embedding_takes_features_of_another_precision(dtype):
    assert FeatureEmbedding(6)(torch.randn(3, 6).to(dtype)).dtype == torch.float32
