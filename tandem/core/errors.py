"""The one error tree. Every message names the thing, its value and the way out.

TandemError
├── InputError           what a caller sent is wrong (HTTP 4xx, exit code 2)
├── NotFoundError        a named thing does not exist (HTTP 404)
├── BusyError            another run holds the thing (HTTP 409)
├── ConflictError        the world moved on since the caller looked (HTTP 409)
├── IntegrityError       bytes are not what their manifest says; nothing was loaded
├── IncompatibleError    two whole things that do not belong together
├── UnavailableError     a service that is needed does not answer (HTTP 503)
└── GateRefusedError     a gate said no (exit code 3)
"""


class TandemError(Exception):
    """Anything that Tandem reports on purpose."""


class InputError(TandemError):
    """What a caller sent is wrong."""


class NotFoundError(TandemError):
    """A named thing does not exist."""


class BusyError(TandemError):
    """Another run holds the thing; the message says who, and since when."""


class ConflictError(TandemError):
    """The world moved on since the caller looked."""


class IntegrityError(TandemError):
    """Bytes are not what their manifest says."""


class IncompatibleError(TandemError):
    """Two whole things that do not belong together."""


class UnavailableError(TandemError):
    """A service that is needed does not answer."""


class GateRefusedError(TandemError):
    """A gate said no; the verdict says why."""
