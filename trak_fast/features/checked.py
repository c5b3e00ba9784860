"""Streamed gradients that are checked: pieces of them pass by, and are compared with autograd's.

A tap on each layer shows the pieces of its parameters' gradients (taps.py). For four samples of each way in which a
batch is split, and one in 32 from then on, they are compared with the gradients that autograd gives for the sample
alone, by the unaltered model. Parameters that fail have their layer differentiated by itself, or the one around it, and
are differentiated sample by sample where that fails too, each in a forward and a backward pass of its own.
"""

from __future__ import annotations

import enum
import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..gradients.errors import is_out_of_memory
from ..gradients.experts import experts_rule_of
from ..gradients.graph import gradients_taken
from ..gradients.layers import rule_of
from ..gradients.parameters import columns_of, layers_of, listed
from ..gradients.repeatable import (
    GRADIENT_ROUNDINGS,
    NEGLIGIBLE_ROUNDINGS,
    RANDOM,
    RandomOutputsError,
    differ,
    tolerance_of,
)
from ..tasks.base import Task
from .comparisons import SAMPLES_OF_A_SPLIT, Comparisons
from .passes import ModelPasses
from .sharded import Kind, shards_of
from .sketches import Sketches, Sums, differing
from .taps import Split, TappedLayer, Taps
from .tokens import NoTokensError

logger = logging.getLogger("trak_fast")

SAMPLES_A_CHECK = 32
"""Samples for each one that is differentiated alone, to compare with."""

COUPLED = "samples of a batch change each other's results (by statistics of the batch, for example)"
"""The reason for which samples are computed alone that makes earlier batches doubtful."""

AGAIN = "featurize them again, by load_checkpoint(..., _allow_featurizing_already_registered=True)"
"""The way to features that replace wrong ones."""


class PaddingError(RuntimeError):
    """The outputs of a model depend on how far its inputs are padded."""


class Way(enum.Enum):
    """The ways to the gradient of a parameter, each tried where the one before it fails the check."""

    RULE = 0
    """By the rule of its layer."""

    LAYER = 1
    """By differentiating its layer by itself."""

    AROUND = 2
    """By differentiating the layer around its own, which may compute with it directly."""

    ALONE = 3
    """By differentiating the whole model, sample by sample."""


@dataclass(frozen=True)
class Check:
    """The gradients of some samples alone, which those of their batch are compared with.

    Attributes:
        samples: The samples' places in the batch.
        expected: The gradients of each.
        evaluated: The samples whose f was computed alone: these, or all of the first batch.
        outputs: f of each of these.
    """

    samples: list[int]
    expected: list[Sketches]
    evaluated: list[int]
    outputs: Tensor


@dataclass
class Progress:
    """The checks of a batch so far.

    Attributes:
        check: The check that the next pass is for.
        compared: Samples whose gradients were right.
        silent: Their number of those that seemed to have a gradient, and had none, or none that is finite.
        watched: Parameters of which it is to be known which samples have a gradient.
    """

    check: Check | None = None
    compared: set[int] = field(default_factory=set)
    silent: int = 0
    watched: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Coverage:
    """The shares of a model that features speak of, and that are computed batch by batch.

    Attributes:
        parameters: Share of the model's floating-point numbers that are attributed.
        by_layers: Share of these whose gradients follow from layers, a batch at a time; the others are differentiated
            sample by sample.
        norm_by_layers: The same of the gradient's squared norm, for the sample that was compared last; NaN before.
    """

    parameters: float
    by_layers: float
    norm_by_layers: float


class CheckedStream(ModelPasses):
    """Streams the gradients of batches, checked, to sums that a subclass makes."""

    def __init__(self, model: nn.Module, task: Task, *, grad_wrt: Iterable[str] | None = None) -> None:
        """Takes the parameters of `model` as they are now."""
        self._norms: Mapping[str, float] = {}  # those of a sample's gradients, by parameter
        self._ways: dict[str, Way] = {}  # to the gradients of parameters whose first way was wrong
        self._is_alone = False  # True once samples of a batch have changed each other
        self._adds = False  # True once a layer's output was changed in place
        self._known_as_shared: set[str] = set()  # parameters of layers whose outputs all samples of a batch have shared
        self._compared_all = False  # True once all samples of a batch were compared with their outputs alone
        super().__init__(model, task, grad_wrt=grad_wrt)

    def load_model_params(self, model: nn.Module) -> None:
        """Takes the parameters and buffers of `model`, without copying them."""
        super().load_model_params(model)
        self.columns = columns_of(self.selected)
        self.grad_dim = sum(columns.count for columns in self.columns.values())
        self._unchecked = SAMPLES_A_CHECK  # samples since the last check
        self._uncalled: set[str] = set()  # parameters of layers that no batch has called
        self._called: set[str] = set()
        self._has_streamed = False  # True once the features of a batch have been computed
        self._comparisons = Comparisons(needed=SAMPLES_OF_A_SPLIT if self._parallel is None else 1)
        self._assign_layers()

    @abstractmethod
    def _new_sums(
        self,
        batch: Sequence[Tensor],
        sketches: Sequence[Sketches] = (),
        is_whole: Callable[[str], bool] = lambda name: True,
    ) -> Sums:
        """Starts the sums that the pieces of a batch's gradients go to."""

    @property
    @abstractmethod
    def _tells_tokens(self) -> bool:
        """True where each token has numbers of its own."""

    def _assign_layers(self) -> None:
        """Chooses the layer to tap for each parameter: the one that it belongs to, or the one around it."""
        paths = {module: path for path, module in self.model.named_modules()}
        self._layers: list[TappedLayer] = []
        around: dict[nn.Module, dict[str, str]] = {}
        for layer, names in layers_of(self.model, self.selected).items():
            rule = rule_of(layer) or experts_rule_of(layer)
            ways = {
                own: self._ways.get(name, Way.RULE if rule is not None else Way.LAYER) for own, name in names.items()
            }
            if by_rule := {own: name for own, name in names.items() if ways[own] is Way.RULE}:
                self._layers.append(TappedLayer(layer, rule=rule, names=by_rule))
            parent_path, _, own_path = paths[layer].rpartition(".")
            for own, name in names.items():
                if ways[own] is Way.LAYER:
                    around.setdefault(layer, {})[own] = name
                elif ways[own] is Way.AROUND:
                    around.setdefault(self.model.get_submodule(parent_path), {})[f"{own_path}.{own}"] = name
        # the whole model by itself is no faster than its samples alone
        self._layers += [
            TappedLayer(layer, rule=None, names=names)
            for layer, names in around.items()
            # and a module that gathers its weights cannot be called again while its own are in use
            if layer is not self.model and not shards_of(layer) and not self._is_split(layer)
        ]
        tapped = {name for known in self._layers for name in known.names.values()}
        self._untapped = frozenset(self.selected) - tapped

    def _is_split(self, layer: nn.Module) -> bool:
        """Tells if other processes have parts of a layer, without whom it cannot be differentiated by itself."""
        return self._parallel is not None and self._parallel.covers(layer)

    @property
    def singly(self) -> frozenset[str]:
        """Names of the parameters that are differentiated sample by sample."""
        everything = self._is_alone or not hasattr(self.task, "get_outputs")
        return frozenset(self.selected) if everything else self._untapped

    def _differentiate_with(self, batch: Sequence[Tensor], seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the features of Σ_b seeds_b f_b, (B, k), and f of each sample, (B,), detached."""
        progress = Progress()
        if self._parallel is not None and not self._parallel.is_compared:
            self._parallel.compare(self._sketched_alone(batch, seeds, 0, list(self.selected))[0].values)
        while not self.singly >= set(self.selected):
            try:
                if progress.check is None and self._is_due(len(batch[0])):
                    progress.check = self._begin_check(batch, seeds)
                streamed = self._stream(batch, seeds, progress)
                if isinstance(streamed, list):
                    progress.check = self._check_of(batch, seeds, streamed)
                    continue
            except Exception as error:
                known = (RandomOutputsError, PaddingError, NoTokensError)
                if self.is_sharded or is_out_of_memory(error) or isinstance(error, known):
                    raise
                if not self._adds and "modified inplace" in str(error):
                    self._adds = True
                    continue
                return self._after_failure(batch, seeds, error)
            if streamed is not None:
                return streamed
        if self._tells_tokens and self._is_alone:
            raise NoTokensError(f"batch must be one whose tokens can be told apart, but {COUPLED}")
        sums = self._new_sums(batch)
        outputs = self._add_alone(batch, list(self.selected), seeds, sums.add_whole)
        return sums.result(self._device), outputs

    def _stream(
        self, batch: Sequence[Tensor], seeds: Tensor, progress: Progress
    ) -> tuple[Tensor, Tensor] | list[int] | None:
        """Computes features and outputs by one pass over the batch.

        Returns:
            Both; or None if the pass must be repeated, or the samples that it must be repeated with the check of.
        """
        count = len(batch[0])
        singly = self.singly
        check = progress.check
        streamed = [name for name in self.selected if name not in singly]
        expected = [] if check is None else check.expected
        found = [Sketches(self.columns, alone.sample, streamed, alone.exponents) for alone in expected]
        layers = [known for known in self._layers if not singly.issuperset(known.names.values())]
        # modules that gather their weights take no views as their outputs
        taps = Taps(
            layers,
            count,
            self._device,
            omitted=singly,
            add=self._adds or self._lockstep is not None,
            known_as_shared=self._known_as_shared,
            parallel=self._parallel,
            positions=batch[0].shape[1] if batch[0].ndim > 1 else 1,
            watched=self._watched(streamed, progress, of_one=count == 1),
        )
        sums = self._new_sums(batch, found, taps.is_whole)
        inputs_needed = self._checkpoint_inputs.are_needed
        reached: set[str] = set()
        uncalled = {name: self.selected[name] for name in streamed if name in self._uncalled}
        with ExitStack() as modes:
            modes.enter_context(self.turn(batch, self._kind_of(layers)))
            modes.enter_context(self._running(uncalled.values()))
            modes.enter_context(self._checkpoint_inputs.attached())
            modes.enter_context(gradients_taken(uncalled, lambda name, gradient: reached.add(name)))
            modes.enter_context(taps.attached())
            outputs = self._outputs(batch)
            taps.run_backward(outputs, self._weighted(seeds, outputs, batch), sums.add)
        sums.flush()
        outputs = outputs.detach()
        if self._checkpoint_inputs.are_needed and not inputs_needed:
            return None
        # a layer around others that is not called itself, a container for example, says nothing about them
        containers = {name for name, way in self._ways.items() if way is Way.AROUND and not taps.is_called(name)}
        if unexplained := self._union((taps.unexplained | containers | reached) - singly):
            self._fall_back(unexplained)
            progress.compared.clear()
            return None
        if self._finds_uncalled(streamed, taps):
            return None
        splits = [split for split in taps.splits if split.name not in singly]
        if check is not None:
            if not self._agree(batch, check, outputs):
                self._stay_alone()
                return None
            wrong = {name for pair in zip(found, expected, strict=True) for name in self._differing(*pair)}
            if failed := self._union(wrong):
                self._tell_if_earlier_ones_are_wrong(failed, taps.splits, of_one=count == 1)
                self._fall_back(failed)
                progress.compared.clear()
                return None
            self._compared_all |= count > 1  # a sample in a batch of its own says nothing about those of others
            # on which processes with parts must agree
            if self._parallel is not None or any(alone.is_telling for alone in expected):
                self._unchecked = 0
                if count > 1:
                    self._known_as_shared |= {split.name for split in splits if split.is_shared}
            for alone in expected:
                known = alone if self._parallel is None else None
                self._comparisons.add(splits, known, of_one=count == 1, watched=taps.watched)
                if not alone.is_telling and any(samples[alone.sample] for samples in taps.watched.values()):
                    progress.silent += 1
            progress.compared.update(check.samples)
        unsettled = [split for split in splits if not self._comparisons.is_settled(split, of_one=count == 1)]
        if unsettled and progress.silent < SAMPLES_OF_A_SPLIT:
            order = torch.randperm(count, generator=self._choices, device="cpu")
            progress.watched |= {split.name for split in unsettled}
            if chosen := self._comparisons.choose(unsettled, order, progress.compared, count == 1, taps.watched):
                return chosen
        self._unchecked += count
        self._has_streamed = True
        if singly:
            names = [name for name in self.selected if name in singly]
            outputs_alone = self._add_alone(batch, names, seeds, sums.add_whole)
            if differ(outputs_alone, outputs, self._output_tolerance):
                self._stay_alone()
                return None
            outputs = outputs_alone
        return sums.result(self._device), outputs

    def _finds_uncalled(self, names: Collection[str], taps: Taps) -> bool:
        """Finds more parameters of layers that are not called; a pass has to tell if the model computes with them."""
        if self.is_sharded:
            return False  # weights require no gradients there
        before = self._uncalled
        self._called |= {name for name in names if taps.is_called(name)}
        self._uncalled = set(names) - self._called
        return not self._uncalled <= before

    def _watched(self, names: Collection[str], progress: Progress, of_one: bool) -> set[str]:
        """Returns those of some parameters of which it is to be known which samples have a gradient."""
        if self._parallel is not None:
            return set()  # processes with parts of the model must agree
        return self._comparisons.unsettled_names(names, of_one) | progress.watched.intersection(names)

    def _kind_of(self, layers: Iterable[TappedLayer]) -> Kind:
        """Names a pass with taps on some layers."""
        if self._lockstep is None:
            return ()
        paths = {module: path for path, module in self.model.named_modules()}
        return "stream", tuple((paths[known.layer], known.rule is not None) for known in layers)

    def _union(self, names: Collection[str]) -> Collection[str]:
        """Adds the names that other processes have which have parts of the model."""
        return names if self._parallel is None else self._parallel.union(names)

    def _evaluate(self, batch: Sequence[Tensor]) -> Tensor:
        if self._is_alone or not hasattr(self.task, "get_outputs"):
            return self._outputs_alone(batch)
        return self._forward(batch)

    @property
    def coverage(self) -> Coverage:
        """The shares of the model that features speak of, and that are computed batch by batch."""
        singly = self.singly
        everything = sum(p.numel() for p in self.parameters.values() if p.is_floating_point())
        squares = {name: norm**2 for name, norm in self._norms.items()}
        total = sum(squares.values())
        streamed = sum(square for name, square in squares.items() if name not in singly)
        return Coverage(
            parameters=self.grad_dim / everything,
            by_layers=sum(self.columns[name].count for name in self.selected if name not in singly) / self.grad_dim,
            norm_by_layers=streamed / total if total else math.nan,
        )

    def _is_due(self, count: int) -> bool:
        """Tells if a batch of so many samples is to be checked."""
        return self._unchecked + count > SAMPLES_A_CHECK

    def _begin_check(self, batch: Sequence[Tensor], seeds: Tensor) -> Check:
        """Chooses samples of a batch at random, and begins the check of them: of one, or several of the first batch."""
        count = 1 if self._has_streamed else self._comparisons.needed
        order = torch.randperm(len(batch[0]), generator=self._choices, device="cpu")
        return self._check_of(batch, seeds, order[:count].tolist())

    def _check_of(self, batch: Sequence[Tensor], seeds: Tensor, samples: list[int]) -> Check:
        """Differentiates some samples of a batch alone; of the first batch, evaluates all samples alone."""
        alone = [self._sketched_alone(batch, seeds, sample, list(self.selected)) for sample in samples]
        expected = [sketches for sketches, _ in alone]
        for sketches in expected:
            if sketches.is_telling or not self._norms:
                self._norms = sketches.norms
            if self._parallel is not None:
                self._parallel.compare(sketches.values)
        if not self._compared_all and len(batch[0]) > 1:
            return Check(samples, expected, list(range(len(batch[0]))), self._outputs_alone(batch))
        return Check(samples, expected, samples, torch.cat([outputs for _, outputs in alone]))

    def _sketched_alone(
        self, batch: Sequence[Tensor], seeds: Tensor, sample: int, names: list[str]
    ) -> tuple[Sketches, Tensor]:
        """Differentiates one sample of a batch alone; returns sketches of its gradients, and its f, (1,)."""
        sketches = Sketches(self.columns, sample, names, {})
        outputs = self._add_alone(
            [x[sample : sample + 1] for x in batch],
            names,
            seeds[sample : sample + 1],
            lambda name, piece, start: sketches.add(name, piece, sample + start),
        )
        return sketches, outputs

    def _agree(self, batch: Sequence[Tensor], check: Check, outputs: Tensor) -> bool:
        """Compares f of samples in a batch with f of them alone.

        Raises:
            RandomOutputsError: f of a sample alone is random.
        """
        expected = outputs.clone()
        expected[check.evaluated] = check.outputs.to(expected)
        if not differ(expected, outputs, self._output_tolerance):
            return True
        worst = int((expected.double() - outputs.double()).abs().nan_to_num(torch.inf).argmax())
        single = [x[worst : worst + 1] for x in batch]
        first = self._outputs_alone(single)
        second = self._outputs_alone(single)
        if differ(first, second, self._output_tolerance) or differ(
            first, expected[worst : worst + 1], self._output_tolerance
        ):
            raise RandomOutputsError(RANDOM)
        self._refuse_padding(single, first, outputs[worst : worst + 1])
        return False

    def _refuse_padding(self, single: Sequence[Tensor], alone: Tensor, in_batch: Tensor) -> None:
        """Refuses a model whose f of a sample depends on how far the sample is padded.

        Raises:
            PaddingError: So it is; the message says what may help.
        """
        if not hasattr(self.task, "without_spare_padding"):
            return
        padded = self._forward(single)
        if differ(alone, padded, self._output_tolerance) and not differ(in_batch, padded, self._output_tolerance):
            used = getattr(getattr(self.model, "config", None), "_attn_implementation", None)
            other = "sdpa" if used == "eager" else "eager"
            raise PaddingError(
                f"padding changes the model's outputs: f of a sample is {alone.item():.6g} alone and "
                f"{padded.item():.6g} padded to {single[0].shape[1]} positions; load the model with "
                f"attn_implementation={other!r} (it has {used!r}), or give batches of texts of one length"
            )

    def _differing(self, found: Sketches, expected: Sketches) -> Collection[str]:
        """Returns the names of the parameters whose gradients differ by more than rounding explains."""
        if not all(math.isfinite(norm) for norm in expected.norms.values()):
            return []
        dtypes = {*self._dtypes, torch.float32}  # in which sketches are computed
        return differing(
            found,
            expected,
            tolerance=tolerance_of(GRADIENT_ROUNDINGS, dtypes),
            negligible=tolerance_of(NEGLIGIBLE_ROUNDINGS, dtypes),
        )

    def _after_failure(self, batch: Sequence[Tensor], seeds: Tensor, error: Exception) -> tuple[Tensor, Tensor]:
        """Differentiates samples alone from now on, if that works where a batch has failed."""
        sums = self._new_sums(batch)
        try:
            outputs = self._add_alone(batch, list(self.selected), seeds, sums.add_whole)
        except (ValueError, TypeError) as of_one:
            if type(error) is type(of_one):
                raise error from None  # it speaks of the whole batch
            raise
        self._stay_alone(f"layers cannot be differentiated in a batch ({(str(error) or repr(error)).splitlines()[0]})")
        return sums.result(self._device), outputs

    def _stay_alone(self, reason: str = COUPLED) -> None:
        """Has samples computed alone from now on, and says so."""
        before = ""
        if reason is COUPLED and self._compared_all:
            before = f". Samples that came before in batches may be wrong: {AGAIN}, and TRAKer(chunk_size=1)"
        logger.warning(
            "%s; each sample is computed alone from here on, in a forward and a backward pass of its own%s",
            reason,
            before,
        )
        self._is_alone = True

    def _tell_if_earlier_ones_are_wrong(self, failed: Collection[str], splits: Collection[Split], of_one: bool) -> None:
        """Warns of gradients that others than those of this batch were computed with in the same way before."""
        new = {split.name for split in splits if not self._comparisons.is_settled(split, of_one)}
        if self._has_streamed and (doubtful := [name for name in failed if name not in new]):
            logger.warning(
                "gradients of %s were wrong for a sample of this batch, and may have been for samples before it: %s",
                listed(doubtful),
                AGAIN,
            )

    def _fall_back(self, failed: Collection[str]) -> None:
        """Has the gradients of parameters computed in the next way from now on; says so if that is sample by sample."""
        before = self.singly
        ruled = {name for known in self._layers if known.rule is not None for name in known.names.values()}
        for name in failed:
            now = self._ways.get(name, Way.RULE if name in ruled else Way.LAYER)
            self._ways[name] = Way(now.value + 1)
        self._unchecked = SAMPLES_A_CHECK  # the next way is no surer
        self._comparisons.forget(failed)
        self._called -= set(failed)
        self._uncalled -= set(failed)
        self._assign_layers()
        singly = self.singly - before
        logger.debug("gradients of %s do not follow by the layer's rule", listed(list(failed)))
        if not singly:
            return
        layers: dict[str, None] = {}
        for name in self.selected:
            if name in singly:
                path = name.rpartition(".")[0]
                layers[f"{path or 'the model itself'} ({type(self.model.get_submodule(path)).__name__})"] = None
        share = sum(self.columns[name].count for name in singly) / self.grad_dim
        logger.warning(
            "gradients of %s do not follow from the layer's inputs and outputs in a batch; these %.2g%% of the "
            "gradient are computed sample by sample from here on, by a forward and a backward pass for each, which "
            "takes about twice as long in all",
            listed(list(layers)),
            100 * share,
        )
