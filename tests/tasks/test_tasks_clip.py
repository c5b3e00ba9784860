"""The contrastive task against sums over pairs written out, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trak_fast.gradients import FunctionalGradientComputer
from trak_fast.tasks import CLIP

PAIRS, SIMULATED = 12, 7


class Model(nn.Module):
    """Two towers with open_clip's arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.images, self.texts, self.drop = nn.Linear(6, 4), nn.EmbeddingBag(9, 4), nn.Dropout(0.9)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        towers = self.images(self.drop(image.flatten(1))), self.texts.weight[text].mean(1)
        images, texts = (nn.functional.normalize(x, dim=1) for x in towers)
        return images, texts, self.scale.exp()


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().double()


def pairs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(PAIRS, 2, 3, dtype=torch.float64, generator=generator)
    return [images, torch.randint(9, (PAIRS, 5), generator=generator)]


def loader(size: int = 5) -> list[list[Tensor]]:
    return [[x[i : i + size] for x in pairs()] for i in range(0, PAIRS, size)]


def test_outputs_and_weightings_are_the_sums_over_the_simulated_batch(model: Model) -> None:
    task = CLIP(simulated_batch_size=SIMULATED)
    task.get_embeddings(model, loader(), batch_size=5, embedding_dim=4, size=PAIRS)
    assert model.training  # embeddings are those of evaluation mode, which is left again
    model.eval()
    batch = pairs()
    weights = dict(model.named_parameters())
    assert task.image_embeddings is not None
    assert task.text_embeddings is not None
    images, texts, scale = model(*batch)
    drawn = [int((images == row).all(1).nonzero()) for row in task.image_embeddings]
    assert len(set(drawn)) == SIMULATED
    q = task.get_out_to_loss_grad(model, weights, {}, batch)
    outputs = task.get_outputs(model, weights, {}, batch)
    for i in range(PAIRS):
        own = images[i] @ texts[i]
        f = -sum((images[i] @ texts[j] - own).exp() for j in drawn).log()
        f -= sum((texts[i] @ images[j] - own).exp() for j in drawn).log()
        torch.testing.assert_close(outputs[i], f, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(task.get_output(model, weights, {}, *(x[i] for x in batch)), f, rtol=1e-11, atol=0)
        p = [
            (scale * own).exp() / ((scale * own).exp() + sum((scale * other).exp() for other in others))
            for others in ([images[i] @ texts[j] for j in drawn], [texts[i] @ images[j] for j in drawn])
        ]
        torch.testing.assert_close(q[i], 1 - (p[0] + p[1]) / 2, rtol=1e-11, atol=0)
    # per-sample, whatever the batch
    torch.testing.assert_close(task.get_out_to_loss_grad(model, weights, {}, [x[3:4] for x in batch])[0], q[3])
    grads = FunctionalGradientComputer(model, task).compute_per_sample_grad(batch)
    expected = torch.autograd.grad(outputs[4], model.images.weight)[0]
    torch.testing.assert_close(grads["images.weight"][4], expected, rtol=1e-9, atol=1e-12)


def test_the_simulated_batch_is_the_same_every_time(model: Model) -> None:
    first, again, other = CLIP(simulated_batch_size=5), CLIP(simulated_batch_size=5), CLIP(None, 5, seed=1)
    for task, size in ((first, 5), (again, 12), (other, 5)):
        task.get_embeddings(model, loader(size))
    assert first.text_embeddings is not None
    assert torch.equal(first.text_embeddings, again.text_embeddings)  # type: ignore[arg-type]
    assert not torch.equal(first.text_embeddings, other.text_embeddings)  # type: ignore[arg-type]


def test_preprocessing_and_a_limit(model: Model) -> None:
    task = CLIP(simulated_batch_size=6)
    raw = [(x.flatten(1).tolist(), y.tolist()) for x, y in loader()]
    task.get_embeddings(
        model,
        raw,
        size=6,
        preprocess_fn_img=lambda x: torch.tensor(x, dtype=torch.float64),
        preprocess_fn_txt=torch.tensor,
    )  # type: ignore[arg-type]
    model.eval()
    images, _, _ = model(*(x[:6] for x in pairs()))
    assert task.image_embeddings is not None
    assert sorted(task.image_embeddings[:, 0].tolist()) == pytest.approx(sorted(images[:, 0].tolist()))


def test_what_is_missing_is_said(model: Model) -> None:
    task = CLIP()
    with pytest.raises(RuntimeError, match=r"call task\.get_embeddings\(model, loader\)"):
        task.get_outputs(model, {}, {}, pairs())
    with pytest.raises(ValueError, match="loader must have at least the 300 pairs of the simulated batch, not 12"):
        task.get_embeddings(model, loader())


@pytest.mark.parametrize(
    ("wrap", "error", "message"),
    [
        (lambda x: torch.stack(x[:2], 1), TypeError, r"as a tuple, not a tensor of shape \(12, 2, 4\)"),
        (lambda x: {"image": x[0], "text": x[1]}, TypeError, "as a tuple, not a dict with the keys 'image', 'text'"),
        (lambda x: x[:1], TypeError, "as a tuple, not a tuple of 1: Tensor"),
        (lambda x: (x[0], x[1][:, :3]), ValueError, r"not \(12, 4\) and \(12, 3\)"),
    ],
)
def test_models_that_return_something_else_are_told(wrap: Any, error: type[Exception], message: str) -> None:
    """The rows of a tensor, and the keys of a dict, would be taken for the embeddings of images and texts."""

    class Other(Model):
        def forward(self, image: Tensor, text: Tensor) -> Any:
            return wrap(super().forward(image, text))

    torch.manual_seed(0)
    task, other = CLIP(simulated_batch_size=SIMULATED), Other().double()
    with pytest.raises(error, match=message):
        task.get_embeddings(other, [pairs()], batch_size=12)
    task.image_embeddings = task.text_embeddings = torch.ones(SIMULATED, 4)
    with pytest.raises(error, match=message):
        task.get_outputs(other, dict(other.named_parameters()), {}, pairs())
