"""Arrays of foreign files."""


def read(path):
    raise NotImplementedError
