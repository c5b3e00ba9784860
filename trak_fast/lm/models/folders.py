"""Finds the models of folders: those of transformers' save_pretrained, those of peft's adapters, and several as one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...gradients.adam import FILES as OPTIMIZERS
from ...store.files import is_file_name
from . import loading
from .architectures import MAPPINGS, TASKS, fit_to_adapter, longest_text, task_of
from .ensembles import require_same_settings, short
from .learning_rates import learning_rates

TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
"""Files by which a folder has a tokenizer."""

WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json")
"""Patterns of files of weights, one of which a folder of save_pretrained has."""

IMPLEMENTATION = "_implementation"
"""The part of the names of settings by which transformers chooses code, of a repository on demand."""

LONGEST = 10**6
"""Tokens from which on a tokenizer's `model_max_length` is none: transformers writes 10³⁰ where there is no limit."""


@dataclass(frozen=True)
class ModelFolder:
    """A folder with a model or an adapter.

    Attributes:
        path: The folder.
        config: The configuration, transformers'; of an adapter, its base's.
        architecture: The name of transformers' class that is built.
        is_adapter: True for an adapter.
        base: The folder of an adapter's base model.
        optimizer: The file with the optimizer's state, None if there is none.
        learning_rate: The rate of training (`learning_rates`), None if it is not known.
    """

    path: Path
    config: Any
    architecture: str
    is_adapter: bool
    base: Path | None
    optimizer: Path | None
    learning_rate: float | None


@dataclass(frozen=True)
class Models:
    """A model, or several checkpoints of one.

    Attributes:
        folders: A folder for each.
        task: "causal_lm", "masked_lm" or "text_classification".
        tokenizer_path: The tokenizer's folder.
        max_tokens: The longest text that both model and tokenizer take, in tokens; None if they take any.
        vocab_size: Rows of the input embedding.
    """

    folders: tuple[ModelFolder, ...]
    task: str
    tokenizer_path: Path
    max_tokens: int | None
    vocab_size: int

    @property
    def label_ids(self) -> dict[str, int] | None:
        """The numbers of a classifier's labels by their names; None for other tasks."""
        if self.task != "text_classification":
            return None
        return {str(name): int(number) for name, number in self.folders[0].config.label2id.items()}

    def tokenizer(self) -> Any:
        """Opens the tokenizer.

        Raises:
            ValueError: transformers does not open it.
        """
        return loading.open_tokenizer(self.tokenizer_path)

    def build(
        self,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        attention: str | None = None,
    ) -> nn.Module:
        """Builds the model with the first folder's weights, in evaluation mode.

        Parameters require gradients; where the folder is an adapter, only the adapter's do.

        Args:
            device: The device to move the model to.
            dtype: The dtype of the weights, such as torch.bfloat16 or its name; None or "auto": the folder's. Adapters
                are in float32 where the base is in 16 bits.
            attention: The implementation of attention, a name in `loading.ATTENTION`; None: the model's own.

        Raises:
            ValueError: An argument is none of these, the folders' dtypes differ and none is given, transformers or peft
                does not open the folder, or some weights would be random.
        """
        if attention is not None and attention not in loading.ATTENTION:
            raise ValueError(f"attention must be one of {', '.join(loading.ATTENTION)}, not {attention!r}")
        wanted = _dtype(dtype)
        if wanted == "auto":
            self._refuse_mixed_dtypes()
        first = self.folders[0]
        model = _open(first, self.task, wanted, attention)
        if first.is_adapter:
            model = loading.put_adapter(model, first.path)
        return model.to(device)

    def state(self, i: int, model: nn.Module) -> Mapping[str, Tensor]:
        """Returns the state dict of one of the folders, by the names that the built model has.

        Args:
            i: The folder's place in `folders`.
            model: The model that `build` returned. Of an adapter's state dict the base's entries are the model's own
                tensors, not copies.

        Raises:
            ValueError: transformers or peft does not open the folder, or some weights would be random.
        """
        folder = self.folders[i]
        if folder.is_adapter:
            return loading.adapter_state(model, folder.path)
        dtype = getattr(model, "dtype", "auto")
        state: Mapping[str, Tensor] = _open(folder, self.task, dtype, None).state_dict()
        return state

    def _refuse_mixed_dtypes(self) -> None:
        first = self.folders[0]
        for other in self.folders[1:]:
            if other.config.dtype != first.config.dtype:
                raise ValueError(
                    f"{first.path} and {other.path} must have one dtype, not {short(first.config.dtype)} and "
                    f"{short(other.config.dtype)}; --dtype names one for all"
                )


def find_models(
    paths: Sequence[str | os.PathLike[str]],
    *,
    base: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    task: str | None = None,
) -> Models:
    """Reads what folders say of their models; weights of whole models stay unread.

    The task is that of the architecture in the configuration. A folder with an architecture that has no head
    (GPT2Model) is opened for causal language modelling, if all weights are there.

    Args:
        paths: Folders of transformers' save_pretrained, or of peft's adapters; several are checkpoints of one model.
        base: The folder of the adapters' base model, in place of the one that they name: a path from the working
            directory or from the adapter's folder.
        tokenizer: A folder with the tokenizer; by default the first one, or its base.
        task: "causal_lm", "masked_lm" or "text_classification", in place of the architecture's.

    Raises:
        ValueError: A path is no such folder, an architecture is for another task, folders differ, there is no
            tokenizer, or a library is missing. The message names the folder and what mends it.
    """
    if task is not None and task not in MAPPINGS:
        raise ValueError(f"task must be one of {TASKS}, not {task!r}")
    folders = _folders(paths)
    adapters = [_adapter_config(path) for path in folders]
    _require_one_kind(folders, adapters)
    if base is not None and adapters[0] is None:
        raise ValueError(f"{folders[0]} is no adapter and needs no base model; leave --base out")
    bases = [None if a is None else _base_of(path, a, base) for path, a in zip(folders, adapters, strict=True)]
    sources = [path if b is None else b for path, b in zip(folders, bases, strict=True)]
    configs = [_read_config(source) for source in sources]
    for i, adapter in enumerate(adapters):
        if adapter is not None:
            fit_to_adapter(folders[i], configs[i], adapter)
    chosen = [task_of(sources[i], configs[i], adapters[i], task) for i in range(len(folders))]
    optimizers = [_optimizer_of(path) for path in folders]
    rates = learning_rates(folders, optimizers)
    found = tuple(
        ModelFolder(
            path=path,
            config=configs[i],
            architecture=chosen[i][1],
            is_adapter=adapters[i] is not None,
            base=bases[i],
            optimizer=optimizers[i],
            learning_rate=rates[i],
        )
        for i, path in enumerate(folders)
    )
    for other, adapter in zip(found[1:], adapters[1:], strict=True):
        _require_same(found[0], other, adapters[0], adapter)
    source = _tokenizer_of(found, tokenizer)
    skeleton = loading.new_on_meta(configs[0], chosen[0][0])
    limits = [limit for limit in (longest_text(configs[0], skeleton), _tokenizer_limit(source)) if limit is not None]
    rows: int = skeleton.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    return Models(found, chosen[0][0], source, min(limits, default=None), rows)


def _folders(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Refuses paths that are no folders, and folders that are there twice."""
    folders = [Path(path) for path in paths]
    if not folders:
        raise ValueError("paths must name at least one folder, not none")
    for place, path in enumerate(folders):
        _require_folder(path)
        if path.resolve() in [other.resolve() for other in folders[:place]]:
            raise ValueError(f"{path} is given twice")
    return folders


def _require_folder(path: Path, kind: str = "") -> None:
    if not path.is_dir():
        raise ValueError(
            f"{kind}{path} is no folder here, and nothing is downloaded: save it with save_pretrained first"
        )


def _read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that is an object.

    Raises:
        ValueError: It is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a JSON object, not {type(content).__name__}")
    return content


def _adapter_config(path: Path) -> dict[str, Any] | None:
    """Reads the configuration of an adapter; None if the folder has a whole model."""
    file = path / "adapter_config.json"
    has_weights = any(path.glob("adapter_model.*"))
    if (path / "config.json").is_file() and not (file.is_file() and has_weights):
        if not any(any(path.glob(pattern)) for pattern in WEIGHTS):
            raise ValueError(
                f"{path} has config.json, but no weights (model.safetensors); save it with save_pretrained"
            )
        _require_own_files(path)
        return None
    if not file.is_file():
        inner = sorted(
            child for child in path.iterdir() if any((child / n).is_file() for n in ("config.json", file.name))
        )
        fix = f"{inner[-1]} has one" if inner else "save the model with save_pretrained"
        raise ValueError(f"{path} has neither config.json nor adapter_config.json; {fix}")
    if not has_weights:
        raise ValueError(f"{path} has adapter_config.json, but no weights (adapter_model.safetensors)")
    return _read_json(file)


def _require_own_files(path: Path) -> None:
    """Refuses a model whose files name weights outside of its folder, or code of a repository.

    Raises:
        ValueError: They do.
    """
    for index in path.glob("*.index.json"):
        parts = _read_json(index).get("weight_map")
        for name in parts.values() if isinstance(parts, dict) else ():
            if not is_file_name(name):
                raise ValueError(f"{index} must name files in its folder, not {name!r}")
    for name in _implementations(_read_json(path / "config.json")):
        if "/" in name:
            raise ValueError(
                f"{path}/config.json asks for code of the repository {name}, and nothing is downloaded; delete the "
                "entry, and --attention names an implementation"
            )


def _implementations(content: object, name: str = "") -> Iterator[str]:
    """Lists the implementations of layers, such as attention, that a configuration or a part of it asks for."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _implementations(value, key if IMPLEMENTATION not in name else name)
    elif isinstance(content, list):
        for value in content:
            yield from _implementations(value, name)
    elif isinstance(content, str) and IMPLEMENTATION in name:
        yield content


def _optimizer_of(path: Path) -> Path | None:
    return next((path / name for name in OPTIMIZERS if (path / name).is_file()), None)


def _require_one_kind(folders: Sequence[Path], adapters: Sequence[object]) -> None:
    """Refuses whole models among adapters."""
    for path, adapter in zip(folders, adapters, strict=True):
        if (adapter is None) != (adapters[0] is None):
            pair = (path, folders[0]) if adapter is not None else (folders[0], path)
            raise ValueError(f"{pair[0]} is an adapter and {pair[1]} a whole model; give folders of one kind")


def _base_of(path: Path, adapter: Mapping[str, Any], base: str | os.PathLike[str] | None) -> Path:
    """Finds the folder of an adapter's base model."""
    named = adapter.get("base_model_name_or_path") if base is None else base
    if not named:
        raise ValueError(f"{path} is an adapter that names no base model; --base DIR")
    found = Path(named)
    if not found.is_dir() and (path / named).is_dir():
        found = path / named
    if base is not None:
        _require_folder(found, "the base model ")
    if not found.is_dir():
        raise ValueError(f"{path} is an adapter of {named}, which is no folder here; --base DIR")
    if _adapter_config(found) is not None:
        raise ValueError(
            f"{found}, the base model of {path}, is an adapter itself; merge it with merge_and_unload first"
        )
    return found


def _read_config(path: Path) -> Any:
    """Reads the configuration of a folder, as transformers' class for its type."""
    _read_json(path / "config.json")
    with loading.quiet() as transformers:
        try:
            return transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except loading.FAILURES as error:
            raise ValueError(f"{path} cannot be opened by transformers: {loading.first_line(error)}") from error


def _require_same(
    first: ModelFolder, other: ModelFolder, adapter: Mapping[str, Any] | None, other_adapter: Mapping[str, Any] | None
) -> None:
    """Refuses two folders that are not of one model.

    Raises:
        ValueError: They are not; the message names both, and the first difference.
    """
    pair = f"{first.path} and {other.path}"
    if first.architecture != other.architecture:
        raise ValueError(f"{pair} must have one architecture, not {first.architecture} and {other.architecture}")
    if first.base is not None and other.base is not None and first.base.resolve() != other.base.resolve():
        raise ValueError(f"{pair} must have one base model, not {first.base} and {other.base}; --base DIR")
    require_same_settings(pair, first.config.to_dict(), other.config.to_dict())
    if adapter is None or other_adapter is None:
        return
    require_same_settings(pair, adapter, other_adapter)
    shapes = [
        {f"shape of {name}": tuple(weight.shape) for name, weight in loading.adapter_weights(folder.path).items()}
        for folder in (first, other)
    ]
    require_same_settings(pair, shapes[0], shapes[1])


def _has_tokenizer(path: Path) -> bool:
    return any((path / name).is_file() for name in TOKENIZERS)


def _tokenizer_of(folders: Sequence[ModelFolder], given: str | os.PathLike[str] | None) -> Path:
    """Finds the folder of the tokenizer.

    Raises:
        ValueError: There is none, or the folders have different ones.
    """
    if given is not None:
        path = Path(given)
        _require_folder(path, "the tokenizer ")
        if not _has_tokenizer(path):
            raise ValueError(f"{path} has no tokenizer ({TOKENIZERS[0]}); --tokenizer DIR names a folder that has one")
        return path
    first = folders[0]
    own = [path for path in (first.path, first.base) if path is not None and _has_tokenizer(path)]
    if not own:
        parent = first.path.parent
        there = f" ({parent}/ has one)" if _has_tokenizer(parent) else ""
        raise ValueError(f"{first.path} has no tokenizer; --tokenizer DIR{there}")
    for other in folders[1:]:
        if _has_tokenizer(other.path) and _vocabulary(other.path) != _vocabulary(own[0]):
            raise ValueError(f"{own[0]} and {other.path} must have one tokenizer; --tokenizer DIR names one for all")
    return own[0]


def _vocabulary(path: Path) -> Any:
    """Returns what makes tokens of texts in a folder's tokenizer.json, without the settings of padding and cutting."""
    file = path / "tokenizer.json"
    content = _read_json(file) if file.is_file() else {}
    return {name: value for name, value in content.items() if name not in ("padding", "truncation")}


def _tokenizer_limit(path: Path) -> int | None:
    """Returns the longest text of a tokenizer, None if it does not say."""
    file = path / "tokenizer_config.json"
    limit = _read_json(file).get("model_max_length") if file.is_file() else None
    return int(limit) if isinstance(limit, (int, float)) and 0 < limit < LONGEST else None


def _dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    """Checks a dtype of weights.

    Raises:
        ValueError: It is none that gradients are taken in.
    """
    if dtype is None or dtype == "auto":
        return "auto"
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise ValueError(f"dtype must be auto, float32, bfloat16, float16 or float64, not {short(dtype)}")
    return found


def _open(folder: ModelFolder, task: str, dtype: str | torch.dtype, attention: str | None) -> nn.Module:
    """Opens a whole model, or the base of an adapter."""
    provided: Iterable[str] = ()
    if folder.is_adapter:
        provided = (name.removeprefix(loading.PREFIX) for name in loading.adapter_weights(folder.path))
    return loading.open_whole(folder.base or folder.path, folder.config, task, dtype, attention, provided)
