"""Other libraries' ways from a language model and a batch of texts to features, for large_models.py.

bergson 2.5.1 runs on CPUs with what it imports; dattri-llm 0.1.0 needs `pip install --no-deps dattri-llm==0.1.0` beside
dattri. Both write or keep what their own defaults say, of the linear layers in the model's blocks.
"""

from __future__ import annotations

import importlib
import tempfile
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from large_model_ways import Facts, Meter, Problem, Run
from tokenizers import Tokenizer, models


def run_bergson(problem: Problem, target: str, dim: int | None = None) -> Run:
    """Builds an index of the batch's texts by `bergson.build`, all texts in one batch.

    bergson's function `collect_gradients` is counted: its hooks, forward and backward, projections, and the index that
    it writes. Left out are the model's loading, the data set's, and bergson's imports.

    Args:
        problem: The model and the batch.
        target: bergson's `projection_target`: "global" is one projection to `dim` numbers, "per_module" keeps
            dim × dim numbers of each layer.
        dim: bergson's `projection_dim`; None: k.
    """
    import datasets

    build = importlib.import_module("bergson.build")
    config = importlib.import_module("bergson.config")
    data = importlib.import_module("bergson.data")
    collect = build.collect_gradients
    ids = problem.batch[0].cpu()

    def run(meter: Meter) -> Facts:
        def count(**options: Any) -> None:
            for weight in options["model"].parameters():
                weight.sum()  # brings weights into memory that are only mapped yet
            with meter:
                collect(**options)

        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.object(build, "collect_gradients", count),
        ):
            model, texts, index = (str(Path(folder) / name) for name in ("model", "texts", "index"))
            problem.model.save_pretrained(model)
            make_tokenizer().save_pretrained(model)
            datasets.Dataset.from_dict({"input_ids": ids.tolist()}).save_to_disk(texts)
            options = config.IndexConfig(
                run_path=index,
                model=model,
                precision={
                    torch.float32: "fp32",
                    torch.bfloat16: "bf16",
                    torch.float16: "fp16",
                }[problem.dtype],
                distributed=config.DistributedConfig(nproc_per_node=1),
                data=config.DataConfig(dataset=texts),
                projection_dim=dim or problem.settings.proj_dim,
                projection_target=target,
                token_batch_size=ids.numel(),
            )
            build.build(options, config.PreprocessConfig())
            return {
                "columns": count_columns(problem),
                "features": data.load_gradients(index).shape[1],
            }

    return run


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Makes a tokenizer of one word; bergson loads one, but texts are tokens already."""
    words = Tokenizer(models.WordLevel({"word": 0}, unk_token="word"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="word")


def run_dattri_llm(problem: Problem, style: str, dim: int | None = None) -> Run:
    """Captures projected gradients by dattri-llm's hooks, of weights that are frozen.

    One forward and one backward pass are counted, in which the hooks project.

    Args:
        problem: The model and the batch.
        style: "logra" keeps dim × dim numbers of each layer, "dense" projects each layer's whole gradient to `dim`.
        dim: dattri-llm's `proj_dim`; None: k.
    """
    import dattri_llm

    problem.model.requires_grad_(False)
    problem.model.get_input_embeddings().requires_grad_(True)  # its backward pass must begin somewhere
    projection = {
        "style": style,
        "proj_dim": dim or problem.settings.proj_dim,
        "proj_type": "rademacher",
        "proj_max_batch_size": 8,
    }
    config = dattri_llm.HookManagerConfig(
        hook_types=dict.fromkeys(problem.layers(), "linear_io"),
        include_frozen=True,
        capture_style="materialized",
        projection_kwargs={"__default__": projection},
    )
    capture = dattri_llm.CaptureCallback()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that layers are frozen
        manager = dattri_llm.HookManager(problem.model, config=config, callbacks=[capture])

    def run(meter: Meter) -> Facts:
        problem.model.zero_grad()
        with meter, manager.collect():
            problem.output().backward()
        features = sum(grads.shape[1] for grads in capture.record.gradient.data.values())
        return {"columns": count_columns(problem), "features": features}

    return run


def count_columns(problem: Problem) -> int:
    """Counts the entries of a gradient that these libraries take, without biases."""
    return sum(layer.weight.numel() for layer in problem.layers().values())
