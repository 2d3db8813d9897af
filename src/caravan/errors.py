"""The one exception that speaks to the user, and how a terminated run is told from a defect.

Whatever a user can get wrong (a file, a setting, a folder) is raised as `InputError` with one
sentence: what is wrong, where (file and line), and the remedy. The entry files print it and exit
with code 2; every other exception is a defect of Caravan and keeps its traceback.
"""


class InputError(ValueError):
    """A mistake in what the user gave, told in one sentence with its place and its remedy."""


WORKER_TERMINATED = "is killed by signal: Terminated"
"""What a loader says of a worker that was terminated first: schedulers terminate all processes."""


def is_termination(error: BaseException) -> bool:
    """Whether an exception says that the run is being ended, by whoever terminated its workers."""
    return isinstance(error, RuntimeError) and str(error).rstrip(" .").endswith(WORKER_TERMINATED)
