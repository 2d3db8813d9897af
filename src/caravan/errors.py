"""The one exception that speaks to the user.

Whatever a user can get wrong (a file, a setting, a folder) is raised as `InputError` with one
sentence: what is wrong, where (file and line), and the remedy. The entry files print it and exit
with code 2; every other exception is a defect of Caravan and keeps its traceback.
"""


class InputError(ValueError):
    """A mistake in what the user gave, told in one sentence with its place and its remedy."""
