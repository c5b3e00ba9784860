"""Per-sample gradients of a task's model output, by torch.func."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.func import grad, vmap

from .base import ParameterGradients
from .modes import unfused_attention
from .parameters import select_parameters


class FunctionalGradientComputer(ParameterGradients):
    """Per-sample gradients by vmap over grad; only the selected parameters are differentiated.

    The model runs in the mode it is in. Random operations that are active even in evaluation mode are an error, as
    features would not be repeatable.
    """

    def load_model_params(self, model: nn.Module) -> None:
        """Takes the parameters and buffers of `model`, without copying them."""
        self.model = model
        selected = select_parameters(model, self.grad_wrt)
        # detached, as autograd outside of torch.func would record a graph through every gradient and keep it alive
        self.selected = {name: parameter.detach() for name, parameter in selected.items()}
        self.fixed = {name: p.detach() for name, p in model.named_parameters() if name not in selected}
        self.buffers = {name: buffer.detach() for name, buffer in model.named_buffers()}

    def compute_per_sample_grad(self, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        """Computes the gradient of each sample's model output.

        Args:
            batch: The batch's tensors, (B, ...) each.

        Returns:
            For each selected parameter, in the model's order, (B, *shape) in its dtype, detached.

        Raises:
            RuntimeError: torch.func cannot differentiate the model, or one of its operations is random.
        """

        def output(selected: dict[str, Tensor], sample: tuple[Tensor, ...]) -> Tensor:
            return self.task.get_output(self.model, {**self.fixed, **selected}, self.buffers, *sample)

        with unfused_attention():
            try:
                grads = vmap(grad(output), in_dims=(None, 0))(self.selected, tuple(batch))
            except RuntimeError as error:
                if not any(word in str(error) for word in ("vmap", "functorch", "torch.func")):
                    raise
                raise RuntimeError(
                    f"torch.func cannot differentiate this model: {error}\n"
                    "gradient_computer=trak_fast.HookGradientComputer does without it"
                ) from error
        return {name: grads[name] for name in self.selected}

    def compute_loss_grad(self, batch: Sequence[Tensor]) -> Tensor:
        """Computes the weighting Q of each sample (`Task.get_out_to_loss_grad`), (B,) or (B, 1)."""
        return self.task.get_out_to_loss_grad(self.model, {**self.fixed, **self.selected}, self.buffers, batch)
