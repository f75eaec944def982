"""Every error that medseg raises on purpose, and what each means to a shell and to a server.

::

    MedsegError
    ├── DataError (ValueError)        something that came from outside is wrong
    │   ├── ReadError                 a file is missing, truncated, or of an unknown format
    │   ├── GeometryError             affine or shape is unusable, or two grids differ
    │   ├── LabelError                label values or names do not fit together
    │   └── DatasetError              a dataset's layout or description is wrong
    ├── ConfigError (ValueError)      a setting is unknown or out of range
    │   └── PlanError                 a plan does not fit its data or its network
    ├── BundleError (ValueError)      a trained model is missing, damaged, or refused
    ├── AssetError (RuntimeError)      weights or a sample cannot be had, or are not what they should be
    ├── ResourceError (RuntimeError)  memory, disk or a device ran out
    ├── OutputError (OSError)         a result cannot be written where it should go
    ├── TrainingError (RuntimeError)  training cannot go on (NaN loss, nothing to train on)
    ├── PartialFailure (RuntimeError) some cases of a batch failed, the others are done
    └── Cancelled (RuntimeError)      the user asked to stop

A message says what, where, what was expected, and what to do. ``exit_code`` and ``http_status``
are the one table that the command line and (later) the server read.
"""


class MedsegError(Exception):
    """Base of all errors raised on purpose by medseg."""

    exit_code = 1
    http_status = 500


class DataError(MedsegError, ValueError):
    """Input data is wrong."""

    exit_code = 4
    http_status = 422


class ReadError(DataError):
    """A file is missing, truncated, or of an unknown format."""


class GeometryError(DataError):
    """An affine or shape is unusable, or two grids that must agree do not."""


class LabelError(DataError):
    """Label values or names do not fit together."""


class DatasetError(DataError):
    """The layout or the description of a dataset is wrong."""


class ConfigError(MedsegError, ValueError):
    """A setting is unknown or out of range."""

    exit_code = 5
    http_status = 422


class PlanError(ConfigError):
    """A plan does not fit its data or its network."""


class BundleError(MedsegError, ValueError):
    """A trained model is missing, damaged, or refused."""

    exit_code = 6
    http_status = 422


class AssetError(MedsegError, RuntimeError):
    """Published weights, a sample or a script cannot be had, or the file is another than it should be."""

    exit_code = 10
    http_status = 503


class ResourceError(MedsegError, RuntimeError):
    """Memory, disk or a device ran out."""

    exit_code = 7
    http_status = 507


class OutputError(MedsegError, OSError):
    """A result cannot be written where it should go."""

    exit_code = 9


class TrainingError(MedsegError, RuntimeError):
    """Training cannot go on."""

    exit_code = 8


class PartialFailure(MedsegError, RuntimeError):
    """Some cases of a batch failed; the others are done."""

    exit_code = 3
    http_status = 207


class Cancelled(MedsegError, RuntimeError):
    """The user asked to stop."""

    exit_code = 130
    http_status = 499
