import torch
import torch.nn.functional as F

from aegpo import models
from aegpo.config import Model
from aegpo.models.probe import AttentionProbe


def entropy64(q, k, scale):
    weights = torch.softmax(q.double() @ k.double().transpose(-1, -2) * scale, -1)
    return -(weights * weights.clamp(min=1e-300).log()).sum(-1)


def test_the_probe_reads_the_entropy_of_each_layer_and_changes_nothing(monkeypatch):
    model = models.load(Model())
    conditions, x = model.encode(["a ring", "two squares"]), torch.randn(2, 4, 8, 8)

    def predict():
        with torch.no_grad():
            return model.predict(x, torch.tensor(0.8), conditions, torch.arange(2), 1.0)

    plain = predict()
    with AttentionProbe(model.image_tokens) as probe:
        probed = predict()
    assert torch.equal(plain, probed)

    seen = []
    attention = F.scaled_dot_product_attention

    def spy(query, key, value, **options):
        seen.append(entropy64(query, key, query.shape[-1] ** -0.5)[:, :, : model.image_tokens].mean((1, 2)))
        return attention(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    predict()
    read = probe.entropy()
    torch.testing.assert_close(read.double(), torch.stack(seen), atol=1e-5, rtol=0)
    assert len(read) == model.transformer.config.num_layers


def test_scale_and_rows():
    q, k = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 9, 4)
    with AttentionProbe(image_tokens=5, rows=3) as probe:
        F.scaled_dot_product_attention(q, k, k, scale=0.3)
        F.scaled_dot_product_attention(q, k, k)
    expected = torch.stack([entropy64(q, k, s)[:, :, [0, 2, 4]].mean((1, 2)) for s in (0.3, 0.5)])
    torch.testing.assert_close(probe.entropy().double(), expected, atol=1e-6, rtol=0)
