"""Streamed features of transformers' models, against each sample alone, unpadded, differentiated by autograd."""

from pathlib import Path

import pytest
import torch
from libraries import needs

import trak_fast
from trak_fast import GradientProjector

needs("transformers")
import transformer_models as models  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own

BOUND = 1e-5
"""Largest relative error in float32."""

PROJ_DIM = 64


@pytest.fixture(autouse=True)
def one_thread(restore_threads: None) -> None:
    """Keeps small products on one thread."""
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", models.FAMILIES)
def test_each_row_is_the_projected_gradient_of_its_sample_alone(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = models.loaded_model(name, tmp_path, dtype)
    task = models.FAMILIES[name].task
    batch = models.batch_of(task)
    if task == "image_classification":
        batch[0] = batch[0].to(dtype)
    gradients = models.gradients_alone(model, task, batch)
    projector = GradientProjector(model, task, PROJ_DIM)
    features = projector.project(batch)
    assert torch.equal(projector.project(batch), features)
    expected = trak_fast.project(gradients, PROJ_DIM)
    bound = BOUND
    if dtype == torch.bfloat16:
        # Two computations that round at different places lie, at most, on two sides of the exact one.
        exact = models.gradients_alone(model.float(), task, [x.float() if x.is_floating_point() else x for x in batch])
        bound = 2 * models.errors_of(expected, trak_fast.project(exact, PROJ_DIM)).max()
    assert models.errors_of(features, expected).max() <= bound
    assert projector.singly == frozenset()


@pytest.mark.parametrize("proj_type", ["normal", "sjlt"])
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_other_kinds_of_matrices(name: str, proj_type: str) -> None:
    model = models.new_model(name)
    task = models.FAMILIES[name].task
    batch = models.batch_of(task)
    gradients = models.gradients_alone(model, task, batch)
    projector = GradientProjector(model, task, PROJ_DIM, proj_type=proj_type, seed=3)
    features = projector.project(batch, model_id=2)
    expected = trak_fast.project(gradients, PROJ_DIM, proj_type=proj_type, seed=3, model_id=2)
    assert models.errors_of(features, expected).max() <= BOUND
    assert torch.equal(projector.project(batch, model_id=2), features)
    assert projector.singly == frozenset()
