"""Streamed features under the settings that users put models into."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from libraries import needs
from moments import moments, step
from torch import Tensor, nn

import trak_fast
from trak_fast import GradientProjector

needs("transformers")
peft = needs("peft")
import transformer_models as models  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of transformers, peft and torch.compile

PROJ_DIM = 32


@pytest.fixture(autouse=True)
def one_thread(restore_threads: None) -> None:
    """Keeps small products on one thread."""
    torch.set_num_threads(1)


def assert_matches(model: nn.Module, task: str, batch: Sequence[Tensor], bound: float = 1e-5) -> GradientProjector:
    """Compares streamed features with projected gradients of samples alone, in evaluation mode."""
    projector = GradientProjector(model, task, PROJ_DIM)
    features = projector.project(batch)
    training = [module.training for module in model.modules()]
    gradients = models.gradients_alone(model.eval(), task, batch)
    for module, mode in zip(model.modules(), training, strict=True):
        module.training = mode
    assert list(gradients) == list(projector.columns)
    assert models.errors_of(features, trak_fast.project(gradients, PROJ_DIM)).max() <= bound
    assert projector.singly == frozenset()
    return projector


class SavedBytes:
    """Counts the bytes that autograd keeps for the backward pass, each storage once.

    Attributes:
        peak: Most bytes kept at a time.
    """

    def __init__(self, model: nn.Module) -> None:
        """Leaves the parameters of a model out."""
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor)
        self.peak = 0
        self._bytes = 0
        self._uses: Counter[int] = Counter()
        self._left_out = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def _pack(self, tensor: Tensor) -> Any:
        kept = _Kept(tensor)
        storage = tensor.untyped_storage()
        pointer = storage.data_ptr()
        if pointer not in self._left_out:
            self._uses[pointer] += 1
            if self._uses[pointer] == 1:
                self._bytes += storage.nbytes()
                self.peak = max(self.peak, self._bytes)
            weakref.finalize(kept, self._release, pointer, storage.nbytes())
        return kept

    def _release(self, pointer: int, size: int) -> None:
        self._uses[pointer] -= 1
        if not self._uses[pointer]:
            self._bytes -= size


class _Kept:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    ("name", "depth"), [("gpt2", "n_layer"), ("llama", "num_hidden_layers"), ("mixtral", "num_hidden_layers")]
)
def test_checkpointed_activations_are_not_kept(name: str, depth: str, use_reentrant: bool) -> None:
    model = models.new_model(name, **{depth: 8})
    batch = models.batch_of("causal_lm")
    projector = GradientProjector(model, "causal_lm", PROJ_DIM)
    features = projector.project(batch)
    plain = SavedBytes(model)
    with plain.hooks:
        assert torch.equal(projector.project(batch), features)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed = SavedBytes(model)
    with checkpointed.hooks:
        again = projector.project(batch)
    assert models.errors_of(again, features).max() <= 1e-6
    assert checkpointed.peak < plain.peak / 3
    first = GradientProjector(model, "causal_lm", PROJ_DIM)
    assert models.errors_of(first.project(batch), features).max() <= 1e-6
    assert first.singly == projector.singly == frozenset()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "bert_classifier"])
def test_autocast_gives_the_gradients_of_autocast(name: str) -> None:
    model = models.new_model(name)
    task = models.FAMILIES[name].task
    with torch.autocast("cpu", torch.bfloat16):
        assert_matches(model, task, models.batch_of(task), bound=1e-2)


def test_frozen_parameters_have_no_columns() -> None:
    model = models.new_model("llama_tied")
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    projector = assert_matches(model, "causal_lm", models.batch_of("causal_lm"))
    assert projector.grad_dim == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert not any(name.startswith("model.layers.0.") for name in projector.columns)


def adapted(name: str, **options: Any) -> nn.Module:
    """Adds LoRA adapters, none of them zero, to a model."""
    model = peft.get_peft_model(models.new_model(name), peft.LoraConfig(r=2, lora_dropout=0.1, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"target_modules": ["q_proj", "down_proj"]}),
        ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
        ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
        ("gpt2", {"target_modules": ["wte", "wpe"]}),
    ],
    ids=["lora", "dora", "saved-head", "embeddings", "conv1d", "conv1d-embeddings"],
)
def test_adapters_alone_are_differentiated(name: str, options: dict[str, Any]) -> None:
    model = adapted(name, **options).train()
    projector = assert_matches(model, "causal_lm", models.batch_of("causal_lm"))
    trainable, _ = model.get_nb_trainable_parameters()
    assert projector.grad_dim == trainable
    assert model.training


class Int8Linear(nn.Linear):
    """A linear layer with quantised weights, as a stand-in for those of quantisation libraries."""

    def quantise(self) -> None:
        weight = self.weight.detach()
        self.scale = float(weight.abs().max()) / 127
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.weight.to(inputs.dtype) * self.scale, self.bias)


def test_adapters_of_a_quantised_model_are_taken_without_being_named() -> None:
    model = models.new_model("llama")
    for module in list(model.model.layers.modules()):
        if type(module) is nn.Linear:
            module.__class__ = Int8Linear
            module.quantise()
    with pytest.raises(ValueError, match=r"grad_wrt must be given where the model has parameters without gradients"):
        GradientProjector(model, "causal_lm", PROJ_DIM)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    projector = assert_matches(model, "causal_lm", models.batch_of("causal_lm"))
    assert projector.grad_dim == model.get_nb_trainable_parameters()[0]
    assert all("lora_" in name for name in projector.columns)


@pytest.fixture
def forgotten_compilations() -> Iterator[None]:
    """Forgets what was compiled."""
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("part", ["whole", "layers"])
def test_compiled_models_have_the_same_features(backend: str, part: str, forgotten_compilations: None) -> None:
    model = models.new_model("llama")
    batch = models.batch_of("causal_lm")
    expected = GradientProjector(model, "causal_lm", PROJ_DIM).project(batch)
    compiled: Any = model
    if part == "whole":
        compiled = torch.compile(model, backend=backend)
    else:
        for layer in model.model.layers:
            layer.compile(backend=backend)
    with torch.no_grad():
        compiled(input_ids=batch[0], attention_mask=batch[1])
    projector = GradientProjector(compiled, "causal_lm", PROJ_DIM)
    assert models.errors_of(projector.project(batch), expected).max() <= 1e-6
    assert projector.singly == frozenset()


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_dropout_is_off_and_the_mode_stays(name: str) -> None:
    model = models.new_model(name).train()
    task = models.FAMILIES[name].task
    batch = models.batch_of(task)
    features = GradientProjector(model, task, PROJ_DIM).project(batch)
    assert all(module.training for module in model.modules())
    expected = GradientProjector(model.eval(), task, PROJ_DIM).project(batch)
    assert torch.equal(features, expected)


def test_buffers_are_those_of_the_call() -> None:
    model = models.new_model("resnet")
    batch = models.batch_of("image_classification")
    projector = GradientProjector(model, "image_classification", PROJ_DIM)
    projector.project(batch)
    for name, buffer in list(model.named_buffers()):
        if name.endswith("running_mean"):
            path, _, own = name.rpartition(".")
            setattr(model.get_submodule(path), own, buffer + torch.rand_like(buffer))
    gradients = models.gradients_alone(model, "image_classification", batch)
    features = projector.project(batch)
    assert models.errors_of(features, trak_fast.project(gradients, PROJ_DIM)).max() <= 1e-5


def test_integers_and_masks_of_any_dtype_mean_the_same() -> None:
    model = models.new_model("llama")
    ids, mask = models.batch_of("causal_lm")
    projector = GradientProjector(model, "causal_lm", PROJ_DIM)
    features = projector.project([ids, mask])
    for batch in ([ids.int(), mask], [ids, mask.bool()], [ids.int(), mask.int()]):
        assert torch.equal(projector.project(batch), features)


TEXTS = [name for name, family in models.FAMILIES.items() if family.task != "image_classification"]


@pytest.mark.parametrize("name", TEXTS)
def test_batches_as_long_as_they_have_samples(name: str) -> None:
    model = models.new_model(name)
    task = models.FAMILIES[name].task
    batch = models.batch_of(task)
    projector = assert_matches(model, task, batch)
    for count, length in ((5, 5), (5, 2), (1, 9), (1, 1), (3, 1), (5, 9)):
        cut = [x[:count, :length] if x.ndim == 2 else x[:count] for x in batch]
        if task == "seq2seq_lm":
            cut[2] = batch[2][:count, : max(length, 2)]
        if length == 1 and task == "causal_lm":
            assert not projector.project(cut).any()  # there is no token to predict
            continue
        if length == 1 and task == "masked_lm":
            cut[2] = torch.full_like(cut[0], 7)
        gradients = models.gradients_alone(model, task, cut)
        features = projector.project(cut)
        assert models.errors_of(features, trak_fast.project(gradients, PROJ_DIM)).max() <= 1e-5, (count, length)
    assert projector.singly == frozenset()


@pytest.mark.parametrize("name", ["gpt2", "llama_tied", "mixtral", "t5"])
def test_steps_of_adam_are_those_of_whole_gradients(name: str) -> None:
    model = models.new_model(name)
    task = models.FAMILIES[name].task
    batch = models.batch_of(task)
    optimizer = torch.optim.AdamW(model.parameters())
    step(optimizer)
    projector = GradientProjector(model, task, PROJ_DIM, optimizer_state=optimizer)
    features = projector.project(batch)
    f = torch.cat([models.output_alone(model, task, x).reshape(1) for x in models.singles(task, batch)])
    weightings = torch.sigmoid(-f.detach())
    gradients = models.gradients_alone(model, task, batch)
    adam = moments(optimizer, model)
    steps = {name: adam.precondition(name, weightings[:, None] * g.flatten(1), 0) for name, g in gradients.items()}
    # a step divides by the gradient's own size, so that entries that are rounding of zero are no more than that
    assert models.errors_of(features, trak_fast.project(steps, PROJ_DIM)).max() <= 1e-3
    assert projector.singly == frozenset()


def test_biases_of_positions_under_checkpointing_are_found_sample_by_sample() -> None:
    model = models.new_model("t5")
    batch = models.batch_of("seq2seq_lm")
    expected = GradientProjector(model, "seq2seq_lm", PROJ_DIM).project(batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    projector = GradientProjector(model, "seq2seq_lm", PROJ_DIM)
    assert models.errors_of(projector.project(batch), expected).max() <= 1e-5
    assert all("relative_attention_bias" in name for name in projector.singly)
