"""What can go wrong, by name.

Every message says what was seen, what was expected, and which setting to change. Bad input raises at
construction or when a fit starts; once training runs, failures are values with a written fallback and nothing
here is raised by tuning itself.
"""


class AutotuneError(Exception):
    """The root of the package's errors."""


class ConfigurationError(AutotuneError, ValueError):
    """An argument has a value that cannot be served."""


class UnsupportedSetupError(AutotuneError, RuntimeError):
    """The trainer, module or data are put together in a way that cannot be served."""


class MonitorError(AutotuneError, KeyError):
    """The monitored name is never logged."""

    def __str__(self) -> str:
        # KeyError prints the repr of its argument, which turns a sentence into a quoted string.
        return str(self.args[0]) if self.args else ""


class StateError(AutotuneError, ValueError):
    """A saved state does not belong to this version or configuration."""


class LogFormatError(AutotuneError, ValueError):
    """A decision log cannot be read."""
