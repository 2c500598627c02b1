"""Where a checkpoint of another codebase keeps the weights of its generator.

Known containers: {"model", "ema", "opt", "args"} (DiT, SiT, REPA, LightningDiT), {"state_dict", "optimizer_states"}
(Lightning), {"ema": {"decay", "shadow"}}, `ema_model.` (ema_pytorch), and the prefixes `module.` (DDP), `_orig_mod.`
(torch.compile) and `model.`, `net.` and the like. They need no list: the weights are wherever a tensor is named
ANCHOR, whatever stands before it.
"""

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afm_pipe.models.tensor_files import Skipped
from afm_pipe.runtime.errors import UserError

ANCHOR, BUFFER = "x_embedder.proj.weight", "pos_embed"
OTHERS = ("dis_embed", "cls_embed")  # tensors of a discriminator and of a classifier, which have the anchor too
PREFIXES = re.compile(r"^(?:(?:module|_orig_mod|_fsdp_wrapped_module)\.)+")
EMA = re.compile(r"(?:^|[._])(?:ema|shadow|averaged)(?:[._\d]|$)", re.IGNORECASE)
MAX_DEPTH, MAX_STATE_DICTS, SHOWN = 4, 100, 6


class Found(NamedTuple):
    """Weights in a checkpoint: the entry that holds them (dotted; empty for the file itself) and what precedes them."""

    entry: str
    prefix: str
    tensors: dict[str, Tensor]
    completed_by: str = ""
    """The weights whose buffer, which no training changes, an EMA of parameters alone lacks."""

    @property
    def name(self) -> str:
        """What `key` chooses them by."""
        return ".".join(part for part in (self.entry, self.prefix.rstrip(".")) if part)

    def __str__(self) -> str:
        place = f"its entry {self.entry}" if self.entry else "the file itself"
        place += f", without the prefix {self.prefix}" if self.prefix else ""
        return place + (f", with {BUFFER} of {self.completed_by}" if self.completed_by else "")


def find_weights(held: Any, path: Path, key: str | None) -> Found:
    """Return the weights of the generator in an unpickled file: those that `key` names, else the only EMA, else all.

    Raises UserError naming what was found where, if there are none or several.
    """
    state_dicts = list(islice(_state_dicts(held), MAX_STATE_DICTS))
    found = [each for entry, tensors in state_dicts for each in _generators(entry, tensors)]
    if key is not None:
        chosen = [each for each in found if each.name == key] or [
            each for each in found if f"{each.name}.".startswith(f"{key}.")
        ]
        if len(chosen) != 1:
            raise UserError(f"Found {path} with {_named(found, held)}, expected one under the key {key}: name another.")
        return _completed(chosen[0], found)
    averages = [each for each in found if EMA.search(each.name)]
    unread = _averages(held) if found and not averages else []
    if unread:
        raise UserError(
            f"Found {path} with an EMA that is not a dict of a generator's tensors ({', '.join(unread[:SHOWN])}), and "
            f"{_named(found, held)}, expected named tensors: choose one with --key (key in params)."
        )
    left = averages or found or [_plain(entry, tensors) for entry, tensors in state_dicts if entry.count(".") == 0]
    if len(left) > 1 and not found:
        left = [each for each in left if each.entry == "ema"]
    if len(left) != 1:
        choice = " Choose one with --key (key in params)." if len(left) > 1 else ""
        raise UserError(
            f"Found {path} holding {_shown(held)}, expected one dict of named tensors, or an EMA of one; found "
            f"{_named(left, held)}.{choice}"
        )
    return _completed(left[0], found)


def _completed(chosen: Found, found: list[Found]) -> Found:
    """Return weights with the buffer of the other weights of the same width in the file, if they lack it."""
    if BUFFER in chosen.tensors or ANCHOR not in chosen.tensors:
        return chosen
    shape = chosen.tensors[ANCHOR].shape
    others = [each for each in found if BUFFER in each.tensors and each.tensors[ANCHOR].shape == shape]
    if not others:
        return chosen
    return chosen._replace(
        tensors=chosen.tensors | {BUFFER: others[0].tensors[BUFFER]}, completed_by=others[0].name or "the file itself"
    )


def _state_dicts(
    held: Any, entry: str = "", depth: int = 0, seen: set[int] | None = None
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield every dict of named tensors and its entry; other dicts are searched once, as one can hold itself."""
    seen = set() if seen is None else seen
    if not isinstance(held, dict) or not held:
        return
    if all(isinstance(name, str) and torch.is_tensor(value) for name, value in held.items()):
        yield entry, held
    elif depth < MAX_DEPTH and id(held) not in seen:
        seen.add(id(held))
        for name, value in held.items():
            if isinstance(name, str):
                yield from _state_dicts(value, f"{entry}.{name}" if entry else name, depth + 1, seen)


def _generators(entry: str, tensors: dict[str, Tensor]) -> list[Found]:
    """Return the generators in a dict of tensors, one for each prefix of the anchor."""
    prefixes = [name.removesuffix(ANCHOR) for name in tensors if name.endswith(ANCHOR)]
    prefixes = [""] if "" in prefixes else [prefix for prefix in prefixes if prefix.endswith(".")]
    found = [_without(entry, prefix, tensors) for prefix in prefixes]
    return [each for each in found if not any(name in each.tensors for name in OTHERS)]


def _without(entry: str, prefix: str, tensors: dict[str, Tensor]) -> Found:
    inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return Found(entry, prefix, inside)


def _plain(entry: str, tensors: dict[str, Tensor]) -> Found:
    """Return tensors without an anchor, for the error that says what a generator has."""
    match = PREFIXES.match(next(iter(tensors)))
    return _without(entry, match[0] if match else "", tensors)


def _averages(held: Any) -> list[str]:
    """Return the entries that are called an EMA and hold tensors or an object."""
    inside = held.get("state_dict") if isinstance(held, dict) else None
    named = [*(held.items() if isinstance(held, dict) else ()), *(inside.items() if isinstance(inside, dict) else ())]
    return [name for name, value in named if isinstance(name, str) and EMA.search(name) and _holds_weights(value)]


def _holds_weights(value: Any, depth: int = 0) -> bool:
    if torch.is_tensor(value):
        return value.numel() > 1
    if isinstance(value, dict | list | tuple) and depth < 2:
        inner = value.values() if isinstance(value, dict) else value
        return any(_holds_weights(each, depth + 1) for each in islice(inner, 1000))
    return isinstance(value, Skipped)


def _named(found: list[Found], held: Any) -> str:
    if not found:
        return f"no generator in {_shown(held)}"
    kinds = [f"{each.name or 'the file itself'} ({len(each.tensors)} tensors)" for each in found]
    return "the weights " + ", ".join(kinds[:SHOWN])


def _shown(held: Any) -> str:
    if not isinstance(held, dict):
        return type(held).__name__
    entries = [f"{str(name)[:40]}: {type(value).__name__}" for name, value in held.items()]
    more = f" and {len(entries) - SHOWN} more" if len(entries) > SHOWN else ""
    return (", ".join(entries[:SHOWN]) or "nothing") + more
