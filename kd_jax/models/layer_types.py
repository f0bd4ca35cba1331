"""Keys of config.json that say in what layers differ: sliding windows and RoPE."""

from collections.abc import Callable
from typing import Any

from kd_jax.models.config_keys import show
from kd_jax.models.rope import Rope, read_rope

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
    "phi3": lambda config, layer: True,
    "gemma3_text": lambda config, layer: (layer + 1) % config["sliding_window_pattern"] != 0,
}
# Families whose window is off unless use_sliding_window is true.
_SWITCHED = ("qwen2", "qwen3")
# Families that have a type for each layer; others have one for all, and no layer_types.
_TYPED = ("qwen2", "qwen3", "gemma3_text")


def read_windows(config: dict[str, Any], problems: list[str]) -> tuple[int | None, ...]:
    """Returns the window of each layer, None for its whole past; () if no layer has one.

    Args:
      config: with the family's defaults.
      problems: gets an error for each key that cannot be honoured.
    """
    family, depth = str(config.get("model_type")), config.get("num_hidden_layers")
    window, switch = config.get("sliding_window"), config.get("use_sliding_window")
    first, given = config.get("max_window_layers", 0), config.get("layer_types")
    if family in _SWITCHED or (family not in _SLIDES and switch is False):
        window = window if switch else None
    elif switch:
        problems.append(f"use_sliding_window: expected False, got {show(switch)}")
    if window is not None and (family not in _SLIDES or type(window) is not int or window < 1):
        wanted = "a whole number above 0" if family in _SLIDES else "None"
        problems.append(f"sliding_window: expected {wanted}, got {show(window)}")
        window = None
    pattern = config.get("sliding_window_pattern", 1)
    if family == "gemma3_text" and (type(pattern) is not int or pattern < 1):
        problems.append(f"sliding_window_pattern: expected a whole number, got {show(pattern)}")
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


def read_ropes(
    config: dict[str, Any],
    windows: tuple[int | None, ...],
    problems: list[str],
    warnings: list[str],
) -> dict[str, Any]:
    """Returns the fields of Architecture about RoPE; adds errors to `problems`.

    Args:
      config: with the family's defaults.
      windows: of the layers, as read_windows returns them.
    """
    family, parts = config.get("model_type"), config.get("rope_parameters")
    if family != "gemma3_text":
        rope = read_rope(config, problems, warnings)
        layers = _without_rope(config, problems) if family == "smollm3" else ()
        other: Rope | None = Rope(theta=1.0, rope_type="none")
    else:  # one base for full attention, which alone may be scaled, another for sliding windows
        parts = parts if isinstance(parts, dict) else {}
        full, local = parts.get("full_attention"), parts.get("sliding_attention")
        rope = read_rope({**config, "rope_parameters": full}, problems, warnings)
        theta = config["rope_local_base_freq"]
        other = read_rope({"rope_theta": theta, "rope_parameters": local}, problems, warnings)
        layers = tuple(window is not None for window in windows)
    fields = {"other_rope": other, "other_rope_layers": layers} if any(layers) else {}
    return {"rope": rope, **fields}


def _without_rope(config: dict[str, Any], problems: list[str]) -> tuple[bool, ...]:
    """Returns True for each layer without RoPE."""
    depth, given = config.get("num_hidden_layers"), config.get("no_rope_layers")
    interval = config["no_rope_layer_interval"]
    if type(depth) is not int or not 1 <= depth <= MOST_LAYERS:
        return ()
    if given is None and (type(interval) is not int or interval < 1):
        problems.append(f"no_rope_layer_interval: expected a whole number, got {show(interval)}")
        return ()
    if given is None:
        given = [(layer + 1) % interval != 0 for layer in range(depth)]
    if not isinstance(given, list) or len(given) < depth or any(x not in (0, 1) for x in given):
        problems.append(f"no_rope_layers: expected 0 or 1 for each layer, got {show(given)}")
        return ()
    return tuple(not x for x in given[:depth])
