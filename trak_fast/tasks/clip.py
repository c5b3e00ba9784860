"""The task of contrastive models of images and texts (Park et al., ICML 2023, section 5.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .base import BatchTask, bind, copy_buffers, copy_tensors, evaluation_mode, restored
from .checks import described


class _Returned(NamedTuple):
    """The output of a model.

    Attributes:
        images: (B, d).
        texts: (B, d).
        scale: The logit scale, or None.
    """

    images: Tensor
    texts: Tensor
    scale: Any

    @classmethod
    def read(cls, output: object) -> _Returned:
        """Reads a model's output.

        Raises:
            TypeError: It is no tuple of embeddings: the rows of a tensor and the keys of a dict are none.
            ValueError: The embeddings have other shapes.
        """
        wanted = "the embeddings of images and texts, (B, d) each, and the logit scale if it has one, as a tuple"
        items = list(output) if isinstance(output, (tuple, list)) else []
        if len(items) < 2 or not all(isinstance(item, Tensor) for item in items[:2]):
            raise TypeError(
                f"the model must return {wanted}, not {described(output)}; put it into a module whose "
                "forward(image, text) returns them"
            )
        images, texts, *rest = items
        if images.ndim != 2 or images.shape != texts.shape:
            raise ValueError(f"the model must return {wanted}, not {tuple(images.shape)} and {tuple(texts.shape)}")
        return cls(images, texts, rest[0] if rest else None)


class _Embeddings(NamedTuple):
    """The embeddings that f and Q are computed from.

    Attributes:
        images: (B, d), those of the batch.
        texts: (B, d).
        other_images: (simulated batch size, d), those of the simulated batch.
        other_texts: (simulated batch size, d).
        scale: The logit scale that the model returns, or None.
    """

    images: Tensor
    texts: Tensor
    other_images: Tensor
    other_texts: Tensor
    scale: Any


class CLIP(BatchTask):
    """The contrastive task: batches are (images, texts), and a sample is an image with its text.

    `model(image=..., text=...)` returns the embeddings of both and the logit scale.
    With φ the embedding of an image and ψ that of its text, f = −log Σ_j exp(φ·(ψ_j − ψ)) − log Σ_j exp(ψ·(φ_j − φ)),
    where j runs over a simulated batch: pairs drawn once among those given to `get_embeddings`. Every sample meets the
    same ones, so that features neither depend on batches nor change from run to run. Q is 1 minus the mean of the
    probabilities of the text given the image and of the image given the text, among these and their own.

    `get_embeddings` is called for each checkpoint, before its samples are featurized and scored.
    """

    def __init__(self, temperature: float | None = None, simulated_batch_size: int = 300, seed: int = 0) -> None:
        """Describes the simulated batch.

        Args:
            temperature: The factor of dot products in Q; by default the logit scale that the model returns.
            simulated_batch_size: Pairs in the simulated batch.
            seed: Seed of the draw.
        """
        self.temperature = temperature
        self.simulated_batch_size = simulated_batch_size
        self.seed = seed
        self.image_embeddings: Tensor | None = None
        self.text_embeddings: Tensor | None = None

    def get_settings(self) -> Mapping[str, Any]:
        return {
            "temperature": self.temperature,
            "simulated_batch_size": self.simulated_batch_size,
            "seed": self.seed,
        }

    @torch.no_grad()
    def get_embeddings(
        self,
        model: nn.Module,
        loader: Iterable[Sequence[Tensor]],
        batch_size: int | None = None,
        embedding_dim: int | None = None,
        size: int = 50_000,
        preprocess_fn_img: Callable[[Any], Tensor] | None = None,
        preprocess_fn_txt: Callable[[Any], Tensor] | None = None,
    ) -> None:
        """Computes embeddings of up to `size` pairs and draws the simulated batch from them.

        Args:
            model: The model with the checkpoint's weights.
            loader: Batches (images, texts).
            batch_size: Has no effect; part of traker's signature, as is the next one.
            embedding_dim: Has no effect.
            size: Largest number of pairs to draw from.
            preprocess_fn_img: Applied to the images of a batch.
            preprocess_fn_txt: Applied to the texts of a batch.

        Raises:
            ValueError: The loader has fewer pairs than the simulated batch.
        """
        images, texts = [], []
        count = 0
        weights = dict(model.named_parameters())
        buffers = dict(model.named_buffers())
        with evaluation_mode(model):
            for image, text in loader:
                image = image if preprocess_fn_img is None else preprocess_fn_img(image)
                text = text if preprocess_fn_txt is None else preprocess_fn_txt(text)
                embed = bind(model, weights, copy_buffers(buffers))
                with restored(model):
                    returned = _Returned.read(embed(*copy_tensors([image, text])))
                images.append(returned.images)
                texts.append(returned.texts)
                count += len(returned.images)
                if count >= size:
                    break
        count = min(count, size)
        if count < self.simulated_batch_size:
            raise ValueError(
                f"loader must have at least the {self.simulated_batch_size} pairs of the simulated batch, not {count}"
            )
        generator = torch.Generator("cpu").manual_seed(self.seed)
        drawn = torch.randperm(count, generator=generator, device="cpu")[: self.simulated_batch_size]
        self.image_embeddings = torch.cat(images)[drawn.to(images[0].device)]
        self.text_embeddings = torch.cat(texts)[drawn.to(texts[0].device)]

    def _embed(
        self, model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Sequence[Tensor]
    ) -> _Embeddings:
        """Computes the embeddings of a batch, and puts those of the simulated batch beside them."""
        if self.image_embeddings is None or self.text_embeddings is None:
            raise RuntimeError("clip: call task.get_embeddings(model, loader) with each checkpoint before its samples")
        image, text = batch
        own = _Returned.read(bind(model, weights, buffers)(image=image, text=text))
        return _Embeddings(own.images, own.texts, self.image_embeddings, self.text_embeddings, own.scale)

    def get_outputs(
        self, model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Sequence[Tensor]
    ) -> Tensor:
        """Computes f of each sample of a batch, (B,)."""
        images, texts, other_images, other_texts, _ = self._embed(model, weights, buffers, batch)
        own = (images * texts).sum(1, keepdim=True)
        return -(images @ other_texts.T - own).logsumexp(1) - (texts @ other_images.T - own).logsumexp(1)

    @torch.no_grad()
    def get_out_to_loss_grad(
        self, model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Sequence[Tensor]
    ) -> Tensor:
        images, texts, other_images, other_texts, scale = self._embed(model, weights, buffers, batch)
        factor = scale if self.temperature is None else self.temperature
        if factor is None:
            raise ValueError("clip: the model returns no logit scale; give CLIP(temperature=...)")
        own = (images * texts).sum(1, keepdim=True)
        # 1 − p = σ(log Σ of the others − own)
        missed_texts = torch.sigmoid((factor * (images @ other_texts.T - own)).logsumexp(1))
        missed_images = torch.sigmoid((factor * (texts @ other_images.T - own)).logsumexp(1))
        return (missed_texts + missed_images) / 2
