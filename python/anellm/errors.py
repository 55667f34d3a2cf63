"""Every exception anellm raises on purpose, and the exit code each one gives a command.

Each class also inherits the builtin that fits, so ``except ValueError`` works where a caller expects it to.
"""

from __future__ import annotations


class AnellmError(Exception):
    """Base of all anellm errors."""

    exit_code = 1


class InvalidError(AnellmError, ValueError):
    """An argument is impossible: wrong shape, dtype, range or combination."""

    exit_code = 2


class ConfigError(InvalidError):
    """A flag, config key or preset is unknown or has an impossible value."""


class TokenRangeError(AnellmError, IndexError):
    """A token id or index lies outside its table."""

    exit_code = 4


class DataError(AnellmError, ValueError):
    """A data, model or tokenizer file is damaged, of the wrong kind, or does not fit the model."""

    exit_code = 4


class CheckpointError(DataError):
    """A checkpoint is incomplete, damaged, or belongs to another run."""


class TornStateError(CheckpointError):
    """A state file was being changed when its process ended: what it holds is between two states."""


class OutOfMemoryError(AnellmError, MemoryError):
    """The system refused memory, or a model is known not to fit."""

    exit_code = 5


class DeviceError(AnellmError, RuntimeError):
    """A device is missing or refused its work."""

    exit_code = 5


class UnavailableError(DeviceError):
    """No such device or CPU variant on this machine."""


class UnsupportedError(DeviceError):
    """The backend does not support this shape or operation."""


class CompileError(DeviceError):
    """A device refused to compile a program."""


class FallbackWarning(UserWarning):
    """A Neural Engine refused a program: the CPU computes its part."""


class EvalError(DeviceError):
    """A device failed to evaluate a program."""


class BusyError(AnellmError, RuntimeError):
    """The handle is in use by another thread."""


class NonFiniteError(AnellmError, FloatingPointError):
    """Inf or NaN where a finite number is needed."""

    exit_code = 3


class DivergedError(NonFiniteError):
    """Training was stopped because its gradients stayed non-finite."""


class InternalError(AnellmError, RuntimeError):
    """A bug in anellm: please report it."""
