"""The one exception for input that a person can mend."""


class InputError(ValueError):
    """Bad input: the message names the file, the frame or parameter, what was found and what to do.

    Programs in `launch/` print it as one line and exit with code 2.
    """
