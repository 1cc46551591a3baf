"""Parses a GGUF file once, although transformers asks for it several times.

transformers parses a GGUF file three times: for the configuration, for the tokenizer and for the weights. It also makes
the table of tensor names again for every module of the model. With a vocabulary of 49,152 entries, this repeated work
takes about half of the time of a conversion.
"""
import contextlib
import functools
from collections.abc import Iterator

import gguf


@contextlib.contextmanager
def parsed_once() -> Iterator[None]:
    """In a block `with parsed_once():`, each GGUF file is parsed once, and each table of tensor names is made once.

    The files must not change during the block.
    """
    # transformers imports both names from gguf in the functions that call them
    slow = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, made in slow.items():
        setattr(gguf, name, functools.cache(made))
    try:
        yield
    finally:
        for name, made in slow.items():
            setattr(gguf, name, made)
