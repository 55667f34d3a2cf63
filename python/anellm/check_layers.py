"""``check --layer-by-layer``: each layer of one device against another's, fed with what the reference feeds it.

What a layer is given, forward its input and backward the gradient of its output, is the reference's in both models. So
an error does not go on to the next layer, and the layer that is wrong is the one whose row says so.

Both models go through groups of one layer (stages.py), whose memory is a file that is mapped here as well: what lies
between the layers is read and replaced in it. A group has the embedding or the head with it at the ends of a model, so
there is one more layer at either end, which changes nothing: its output projections are zero.
"""

from __future__ import annotations

import mmap
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from anellm.ane_run import describe_engine, evaluation_summary
from anellm.cli import Result
from anellm.config import ModelConfig
from anellm.device import AneOptions, Dtype, named_device
from anellm.differences import SINGLE, UNITS, Row, arithmetic, compare
from anellm.errors import AnellmError, EvalError, InvalidError, NonFiniteError
from anellm.inputs import check_fits
from anellm.model import Memory, Model, memory
from anellm.stages import SECTIONS, Stages, state_layout
from anellm.state_file import allocate

if TYPE_CHECKING:
    from anellm.check import CheckConfig

# What a layer may be off, in units of rounding: the sums of what docs/ane.md allows the programs on the longest way.
# Forward: attention 5, the mlp 5, and attention's error on its way through the mlp 5.
# Backward: gate and up 2, dact 2, dx of the mlp 2, wo_bwd 2, p 3, dp 2, dq and dk 4, qkv_bwd 2, the input of dW 1.
FORWARD_UNITS: Final = 15
BACKWARD_UNITS: Final = 20
# The gradients of queries and keys are sums of differences, p (dp - sum of p dp), that cancel: the more so, the more
# sure of itself attention is. Theirs is the cosine of 0.9995 that docs/ane.md asks of every program: 1 - 64^2 u^2 / 2.
CANCELLING_UNITS: Final = 64

_CANCELS: Final = re.compile(r"\.[qk]_(proj|norm)\.weight$")
_LAYER: Final = re.compile(r"^(model\.layers|transformer\.h)\.([0-9]+)\.")
_WRITES: Final = re.compile(r"\.(o_proj|down_proj|attn\.c_proj|mlp\.c_proj)\.(weight|bias)$")
_IN_MESSAGE: Final = re.compile(r"\blayer ([0-9]+)")

FloatArray = npt.NDArray[np.float32]
IdArray = npt.NDArray[np.int32]
Device = tuple[str, AneOptions | None, Dtype]  # as Model and Model.set_dtype() take them


class Limits(NamedTuple):
    """Largest errors, in the Frobenius norm: see differences.compare().

    Attributes:
        forward: of what a layer adds to its input, and of the loss.
        backward: of what it adds to the gradient, and of its parameters' gradients.
        cancelling: of the gradients of what makes queries and keys, where they are tensors of their own.
    """

    forward: float
    backward: float
    cancelling: float

    @classmethod
    def of(cls, unit: float) -> Limits:
        """Return those of an arithmetic, by its unit of rounding."""
        return cls(FORWARD_UNITS * unit, BACKWARD_UNITS * unit, CANCELLING_UNITS * unit)


@dataclass
class Layer:
    """What came of one layer, the embedding or the head.

    Attributes:
        name: "embedding", "layer 0", ..., "head".
        forward: what the layer adds to its input; of the embedding its output, of the head the loss.
        backward: what it adds to the gradient; of the head all of it. None for the embedding, which has none.
        gradients: of its parameters. A table that is the classifier's too has a part in both.
        error: what the device said that failed; None when it did not.
    """

    name: str
    forward: Row | None = None
    backward: Row | None = None
    gradients: list[Row] = field(default_factory=list)
    error: str | None = None

    def wrong(self, *, forward: bool, backward: bool) -> list[str]:
        """Return the names of what is not within tolerance, of a pass or both."""
        rows = [self.forward] * forward + [self.backward, *self.gradients] * backward
        failed = self.error is not None and (forward if self.forward is None else backward)
        names = [f"{self.name} {'forward' if self.forward is None else 'backward'}"] if failed else []
        return names + [row.name for row in rows if row is not None and not row.ok]

    def worst(self) -> Row | None:
        """Return the gradient that is furthest off; one that is not within tolerance before those that are."""
        return max(self.gradients, key=lambda row: (not row.ok, row.error), default=None)


def between_ends(
    config: ModelConfig,
    tensors: Iterable[tuple[str, npt.NDArray[Any]]],
    devices: Iterable[Device],
) -> list[Model]:
    """Return the model on each device, with a layer more at either end that changes nothing.

    Args:
        config: of the model.
        tensors: all of its tensors.
        devices: what computes, for each model.
    """
    last = config.n_layers - 1
    models = []
    for device, ane, dtype in devices:
        models.append(Model(config.replace(n_layers=config.n_layers + 2), device, seed=None, ane=ane))
        models[-1].set_dtype(dtype)
    for name, array in tensors:
        found = _LAYER.match(name)
        layers = [] if found is None else [int(found[2]) + 1]
        if layers and _WRITES.search(name) is None:
            layers += [0] * (layers[0] == 1) + [last + 2] * (layers[0] == last + 1)
        for model in models:
            for target in [name] if found is None else [_numbered(name, layer) for layer in layers]:
                model.params[target][...] = array
    for model in models:
        model.weights_changed()
        model.enable_training()
    return models


def _numbered(name: str, layer: int) -> str:
    return _LAYER.sub(lambda found: f"{found[1]}.{layer}.", name)


class _Groups:
    """A model that goes through its layers one at a time, and what lies between them.

    Attributes:
        inputs: (groups - 1, B, T, dim): the input of each group but the first.
        gradient: (B, T, dim): of the input of the group that was gone back through, or of the output of the next one.
    """

    def __init__(self, model: Model, tokens: IdArray, targets: IdArray) -> None:
        B, T = tokens.shape
        self.model, self.n = model, model.config.n_layers
        layout = state_layout(model.config, B, T, 1, self.n)
        start = layout.offsets[SECTIONS.index("activations")]
        with tempfile.TemporaryFile() as file:
            allocate(file.fileno(), layout.total_bytes, start)
            self._stages = Stages(model, B, T, 1, range(self.n), file.fileno())
            self._map = mmap.mmap(file.fileno(), layout.total_bytes - start, offset=start)

        def view(section: str, dtype: type, shape: tuple[int, ...]) -> npt.NDArray[Any]:
            offset = layout.offsets[SECTIONS.index(section)] - start
            return np.frombuffer(self._map, dtype, int(np.prod(shape)), offset).reshape(shape)

        self.inputs = view("activations", np.float32, (self.n - 1, B, T, model.config.dim))
        self.gradient = view("gradients", np.float32, (B, T, model.config.dim))
        self._progress = view("progress", np.int64, (2,))  # docs/formats.md
        self._stages.batch(0, tokens, targets)

    def forward(self, group: int) -> None:
        """Go through a group, whether or not those before it were gone through."""
        self._progress[:] = 1 + group, 0
        self._stages.forward(0, group)

    def backward(self, group: int) -> None:
        """Go back through a group; its forward comes before, and anything but another group's in between."""
        self._progress[:] = 1 + self.n, 0 if group == self.n - 1 else 2 + group
        self._stages.backward(0, group)

    def loss(self) -> float:
        """Return the loss that the last group ended with."""
        self._progress[:] = 1 + self.n, 0
        return self._stages.loss(0)

    def table(self) -> FloatArray:
        """Return the gradient of the table of tokens, a view."""
        return self.model.grads[self.model.tensors[0].name]

    def close(self) -> None:
        """Give the memory back."""
        self._stages.close()


class _Reference:
    """All that the reference gives: `groups` of the one model, gone through forward and back."""

    def __init__(self, groups: _Groups) -> None:
        self.groups = groups
        for group in range(groups.n):
            groups.forward(group)
        self.loss = groups.loss()
        self.gradients: list[FloatArray] = []  # of each group's input, from the first on
        for group in reversed(range(groups.n)):
            groups.backward(group)
            self.gradients.insert(0, groups.gradient.copy())
            if group == groups.n - 1:
                self.head_table = groups.table().copy()
                groups.table()[...] = 0  # the embedding adds to it


def compare_layers(reference: Model, tested: Model, tokens: IdArray, targets: IdArray, limits: Limits) -> list[Layer]:
    """Compare two models layer by layer, each layer of both given what the reference gives it.

    Args:
        reference: from between_ends().
        tested: from the same call.
        tokens: (B, T), T at least 2: a token alone has no gradients of queries and keys that could be compared.
        targets: (B, T).
        limits: what is within tolerance.

    Returns:
        The embedding, the layers, the head.

    Raises:
        InvalidError: on T below 2.
    """
    if tokens.shape[1] < 2:
        raise InvalidError(f"seq_len: expected at least 2 tokens to compare layers, found {tokens.shape[1]}")
    sides: list[_Groups] = []
    try:
        sides.append(_Groups(reference, tokens, targets))
        expected = _Reference(sides[0])
        sides.append(_Groups(tested, tokens, targets))
        return [_compare(expected, sides[1], group, limits) for group in range(sides[1].n)]
    finally:
        for side in sides:
            side.close()


def _compare(expected: _Reference, side: _Groups, group: int, limits: Limits) -> Layer:
    last = side.n - 1
    layer = Layer("embedding" if group == 0 else "head" if group == last else f"layer {group - 1}")
    given = expected.groups.inputs
    try:
        if group > 0:
            side.inputs[group - 1] = given[group - 1]
        side.forward(group)
        if group == last:
            found, wanted = np.array([side.loss()]), np.array([expected.loss])
        else:
            added = 0 if group == 0 else given[group - 1]
            found, wanted = side.inputs[group] - added, given[group] - added
        layer.forward = compare(f"{layer.name} forward", found, wanted, limits.forward, norm=True)
        if group < last:
            side.gradient[...] = expected.gradients[group + 1]
        if group == 0:
            side.table()[...] = 0
        side.backward(group)
    except (EvalError, NonFiniteError) as error:  # the device's results; the other layers do not depend on them
        layer.error = _renumbered(error)
        return layer
    except AnellmError as error:
        raise type(error)(_renumbered(error)) from None
    if group > 0:
        added = 0 if group == last else expected.gradients[group + 1]
        found, wanted = side.gradient - added, expected.gradients[group] - added
        layer.backward = compare(f"{layer.name} dx", found, wanted, limits.backward, norm=True)
    for name, shown in _parameters(side.model, group):
        gradient = expected.groups.model.grads[name]
        if group == last and name == side.model.tensors[0].name:
            gradient = expected.head_table
        limit = limits.cancelling if _CANCELS.search(name) else limits.backward
        layer.gradients.append(compare(shown, side.model.grads[name], gradient, limit, norm=True))
    return layer


def _parameters(model: Model, group: int) -> Iterable[tuple[str, str]]:
    """Yield the names of a group's parameters, here and in the model without the layers at the ends."""
    ends = {0: "embedding", model.config.n_layers - 1: "head"}
    for index, tensor in enumerate(model.tensors):
        found = _LAYER.match(tensor.name)
        if found is not None:
            if group not in ends and int(found[2]) == group:
                yield tensor.name, _numbered(tensor.name, group - 1)
        elif index == 0 and model.config.tie_embeddings:
            if group in ends:
                yield tensor.name, f"{tensor.name} ({'as classifier' if group else 'as embedding'})"
        elif ends.get(group) == ("embedding" if index == 0 or tensor.kind == "positions" else "head"):
            yield tensor.name, tensor.name


def _renumbered(error: AnellmError) -> str:
    """Return an error's text with the numbers that layers have in the model without those at the ends."""
    return _IN_MESSAGE.sub(lambda found: f"layer {int(found[1]) - 1}", str(error))


# ---- the verb's part -------------------------------------------------------------------------------------------------


def run(
    config: CheckConfig,
    shape: ModelConfig,
    tensors: Iterable[tuple[str, npt.NDArray[Any]]] | None,
    tokens: IdArray,
    targets: IdArray,
) -> Result:
    """Compare two devices as the options say; print and return the table.

    Args:
        config: the options.
        shape: of the model.
        tensors: its tensors; None: new ones, from the seed.
        tokens: (B, T).
        targets: (B, T).
    """
    devices = _devices(config)
    padded = shape.replace(n_layers=shape.n_layers + 2)
    needs = [memory(padded, *tokens.shape, training=True, dtype=dtype, ane=ane) for _, ane, dtype in devices]
    check_fits(Memory(*map(sum, zip(*(need._replace(total_bytes=_touched(need)) for need in needs), strict=True))))
    if tensors is None:
        tensors = Model(shape, "cpu", seed=1 if config.seed is None else config.seed).params.items()
    reference, tested = between_ends(shape, tensors, devices)
    unit = max(UNITS[arithmetic(device, dtype)] for device, _, dtype in devices)
    limits = Limits.of(unit) if config.tolerance is None else Limits(*[config.tolerance] * 3)
    layers = compare_layers(reference, tested, tokens, targets, limits)
    return _finish(layers, (reference, tested), tokens.shape, limits)


def _devices(config: CheckConfig) -> list[Device]:
    """Return the reference and what is tested."""
    ours, reference = config.ane_options(), config.reference or "cpu"
    theirs = None
    if reference != "cpu":
        given = ours or AneOptions()
        theirs = AneOptions(scaling=given.scaling, softmax=given.softmax, mode=given.mode)
    return [(reference, theirs, "fp32"), (named_device(config.device), ours, cast("Dtype", config.dtype))]


def _touched(need: Memory) -> int:
    """Return the bytes that are used: nothing steps, so that moments stay untouched."""
    return need.total_bytes - need.moments_bytes


def _describe(model: Model) -> str:
    return f"cpu, {model.dtype}" if model.ane is None else f"{model.ane.device}, {model.ane.device.options.mode}"


def _columns(row: Row | None) -> str:
    if row is None:
        return f"{'-':>8} {'-':>8} {'-':>8} {'-':>9}"
    return f"{row.difference:8.1e} {row.largest:8.1e} {row.error:8.1e} {row.cosine:9.6f}"


def _finish(layers: Sequence[Layer], models: tuple[Model, Model], shape: tuple[int, ...], limits: Limits) -> Result:
    """Print the table and return the result."""
    reference, tested = map(_describe, models)
    print(f"batch_size: {shape[0]}\nseq_len: {shape[1]}\nreference: {reference}\ntested: {tested}")
    columns = f"{'maxdiff':>8} {'of':>8} {'error':>8} {'cosine':>9}"
    print(
        f"{'':19}{'forward':35}   backward\n{'':19}{columns}   {columns}   {'error':>8} gradient that is furthest off"
    )
    for layer in layers:
        word, worst = "NOT OK" if layer.wrong(forward=True, backward=True) else "OK    ", layer.worst()
        last = layer.error or ("" if worst is None else f"{worst.error:8.1e} {worst.name}")
        print(f"{word}  {layer.name:9}  {_columns(layer.forward)}   {_columns(layer.backward)}   {last}".rstrip())
    print(
        f"tolerances: error {limits.forward:.2g} forward, {limits.backward:.2g} backward and of gradients, "
        f"{limits.cancelling:.2g} of those of queries and keys; {SINGLE:g} times that of the largest for a single value"
    )
    told: dict[str, Any] = {}
    for model in models:
        if model.ane is not None:
            told = evaluation_summary(model.ane) | {"modelled_ms": None}
            print(describe_engine(told))
    wrong = [name for layer in layers for name in layer.wrong(forward=True, backward=False)]
    wrong += [name for layer in reversed(layers) for name in layer.wrong(forward=False, backward=True)]
    bad = [layer.name for layer in layers if layer.wrong(forward=True, backward=True)]
    end = f"0; not within tolerance: {', '.join(bad)}; first {wrong[0]}, {len(wrong)} in all" if wrong else "1"
    print(f"overall okay: {end}")
    values = {
        "ok": not wrong,
        "wrong": wrong,
        "reference": reference,
        "tested": tested,
        "tolerances": limits._asdict(),
        **told,
        "layers": [
            {
                "name": layer.name,
                "forward": None if layer.forward is None else layer.forward._asdict(),
                "backward": None if layer.backward is None else layer.backward._asdict(),
                "gradients": [row._asdict() for row in layer.gradients],
                "error": layer.error,
            }
            for layer in layers
        ],
    }
    return Result(values, 1 if wrong else 0)
