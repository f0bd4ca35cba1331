"""A cache of results per tokenizer that keeps none of its tokenizers alive."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")


def once_per_tokenizer(function: Callable[[Any], T]) -> Callable[[Any], T]:
    """Caches a function of one tokenizer, which must not refer to it in what it returns.

    A tokenizer can use more memory than a small model, so that training must not keep it.
    """
    cache: WeakKeyDictionary[Any, T] = WeakKeyDictionary()

    @wraps(function)
    def cached(tokenizer: Any) -> T:
        if tokenizer not in cache:
            cache[tokenizer] = function(tokenizer)
        return cache[tokenizer]

    return cached
