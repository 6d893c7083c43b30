"""What can go wrong for a user, each kind with the exit code that a launcher or a Slurm script sees.

    MegaptuneError
    ├── ConfigError        2   the configuration or the command line
    ├── DataError          2   a data file, a record, a template that does not fit the data
    │   └── InputTooLong       one that cannot be cut to the length that it may have
    ├── SetupError         3   ranks, launcher environment, missing dependency, run directory not usable
    ├── BackboneError      4   the frozen model's folder or architecture
    ├── CheckpointError    4   a saved prompt state that cannot be used
    ├── DivergedError      5   a loss or gradient that is not finite
    └── StoppedEarly      75   a stop was asked for; state is saved, the same command continues

Every message says what was given, what was expected and what to change. Assertions are for our own mistakes.
"""


class MegaptuneError(Exception):
    exit_code = 1
    on_every_rank = False  # set where all ranks are known to raise the same: rank 0 alone tells it then

    def shared(self) -> "MegaptuneError":
        """This error, known to be raised by every rank."""
        self.on_every_rank = True
        return self


class ConfigError(MegaptuneError):
    exit_code = 2


class DataError(MegaptuneError):
    exit_code = 2


class InputTooLong(DataError):
    pass


class SetupError(MegaptuneError):
    exit_code = 3


class BackboneError(MegaptuneError):
    exit_code = 4


class CheckpointError(MegaptuneError):
    exit_code = 4


class DivergedError(MegaptuneError):
    exit_code = 5


class StoppedEarly(MegaptuneError):
    exit_code = 75


def first_line(error: BaseException) -> str:
    """Another library's error in one line, for a message of ours."""
    return (str(error) or type(error).__name__).strip().splitlines()[0]
