"""Keys of config.json that say in what layers differ: sliding windows."""

from collections.abc import Callable
from typing import Any

from kd_jax.models.config_keys import show

WINDOW_KEYS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
MOST_LAYERS = 10_000  # a table of weights has entries for each
_FULL, _SLIDING = "full_attention", "sliding_attention"


def _after_the_first(config: dict[str, Any], layer: int) -> bool:
    return layer >= config["max_window_layers"]


# Families with a sliding window -> whether a layer has it where layer_types does not say.
_SLIDES: dict[str, Callable[[dict[str, Any], int], bool]] = {
    "mistral": lambda config, layer: True,
    "qwen2": _after_the_first,
    "qwen3": _after_the_first,
}
# Families whose window is off unless use_sliding_window is true.
_SWITCHED = ("qwen2", "qwen3")
# Families that have a type for each layer; others have one for all, and no layer_types.
_TYPED = ("qwen2", "qwen3")


def read_windows(config: dict[str, Any], problems: list[str]) -> tuple[int | None, ...]:
    """Returns the window of each layer, None for its whole past; () if no layer has one.

    Args:
      config: with the family's defaults.
      problems: gets an error for each key that cannot be honoured.
    """
    family, depth = str(config.get("model_type")), config.get("num_hidden_layers")
    window, switch = config.get("sliding_window"), config.get("use_sliding_window")
    first, given = config.get("max_window_layers", 0), config.get("layer_types")
    if family in _SWITCHED:
        window = window if switch else None
    elif switch:
        problems.append(f"use_sliding_window: expected False, got {show(switch)}")
    if window is not None and (family not in _SLIDES or type(window) is not int or window < 1):
        wanted = "a whole number above 0" if family in _SLIDES else "None"
        problems.append(f"sliding_window: expected {wanted}, got {show(window)}")
        window = None
    if family in _SLIDES and (type(first) is not int or first < 0):
        problems.append(f"max_window_layers: expected a whole number, got {show(first)}")
        window = None
    if type(depth) is not int or not 1 <= depth <= MOST_LAYERS:
        return ()
    types = [_FULL] * depth
    if window is not None:
        types = [_SLIDING if _SLIDES[family](config, i) else _FULL for i in range(depth)]
    if given is not None and given != types:
        fits = window is not None and family in _TYPED and isinstance(given, list)
        types = given if fits else []
    if len(types) != depth or any(x not in (_FULL, _SLIDING) for x in types):
        wanted = "full_attention" if window is None else "full_attention or sliding_attention"
        problems.append(f"layer_types: expected {wanted} for each layer, got {show(given)}")
    windows = tuple(window if name == _SLIDING else None for name in types)
    return windows if any(windows) else ()
