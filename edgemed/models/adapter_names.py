"""Adapters whose names are older than the model's, in tensors and in the config.

A vision model's layers have had three names in transformers' history. Where a tensor's module is
not in the model, its name is looked up among all names that the family's parts ever had, and what
the config says of the old name is said of the new one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgemed.errors import EdgemedError
from edgemed.models.adapter_targets import ALL_LINEAR, alpha_of, is_targeted, rank_of
from edgemed.models.weights import CanonicalWeights

if TYPE_CHECKING:
    import torch

# what peft puts before every name
PREFIX = "base_model.model."


@dataclass(frozen=True)
class ModuleNames:
    """The modules of a model, and their other names."""

    # as the model calls them
    modules: frozenset[str]
    # any other name -> the model's
    others: Mapping[str, str]

    def split(self, tensor: str) -> tuple[str, str, str]:
        """(module as written, module as the model calls it, rest) of an adapter's tensor; ('', '',
        tensor) where no module is in its name.
        """
        words = tensor.removeprefix(PREFIX).split(".")
        for count in range(len(words), 0, -1):
            name = ".".join(words[:count])
            rest = ".".join(words[count:])
            if name in self.others:
                return name, self.others[name], rest
            if name in self.modules:
                return name, name, rest
        return "", "", tensor

    def named(self, module: str) -> list[str]:
        """Every name of a module, the model's own first."""
        return [module, *(name for name, other in self.others.items() if other == module)]


def module_names(weights: CanonicalWeights, modules: Iterable[str]) -> ModuleNames:
    """The names of a model's modules. modules: as the model calls them."""
    present = frozenset(name for name in modules if name)
    others: dict[str, str] = {}
    for part in weights.parts.values():
        for choices in part.modules:
            names = [
                prefix + choice
                for choice in choices.split("|")
                for prefix in weights.family.prefixes
            ]
            own = next((name for name in names if name in present), None)
            if own is not None:
                others |= {name: own for name in names if name not in present}
    return ModuleNames(present, others)


def renamed_tensors(
    where: str, tensors: Mapping[str, torch.Tensor], names: ModuleNames
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(the tensors under the model's names, old module -> the model's for those that had another).

    Raises EdgemedError where two tensors are of one place.
    """
    result: dict[str, torch.Tensor] = {}
    renamed = {}
    for tensor, value in tensors.items():
        written, module, rest = names.split(tensor)
        name = tensor
        if written != module:
            renamed[written] = module
            name = f"{PREFIX}{module}.{rest}"
        if name in result:
            raise EdgemedError(
                f"{where}: '{tensor}' and another tensor are both of '{module}'",
                "Copy the adapter again",
            )
        result[name] = value
    return result, renamed


def renamed_config(
    values: Mapping[str, Any],
    names: ModuleNames,
    renamed: Mapping[str, str],
    leaves: Collection[str],
) -> dict[str, Any]:
    """The keys of a config that hold names, for the model's names: modules in full, with a rank and
    an alpha each. leaves: the model's modules that have weights.
    """
    written = {module: old for old, module in renamed.items()}
    changed: dict[str, Any] = {}
    if values.get("target_modules") and values["target_modules"] != ALL_LINEAR:
        targets = {}
        for module in leaves:
            choices = [written[module]] if module in written else names.named(module)
            name = next((name for name in choices if is_targeted(values, name)), None)
            if name is not None:
                targets[module] = name
        changed |= {
            "target_modules": sorted(targets),
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
        }
        if values.get("rank_pattern"):
            changed["rank_pattern"] = {
                re.escape(module): rank_of(values, name) for module, name in targets.items()
            }
        if values.get("alpha_pattern"):
            changed["alpha_pattern"] = {
                re.escape(module): alpha_of(values, name) for module, name in targets.items()
            }
    if values.get("modules_to_save"):
        changed["modules_to_save"] = [
            names.others.get(name, name) for name in values["modules_to_save"]
        ]
    if isinstance(values.get("trainable_token_indices"), dict):
        changed["trainable_token_indices"] = {
            names.others.get(name, name): indices
            for name, indices in values["trainable_token_indices"].items()
        }
    return changed


def without_copies(where: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors without what peft saves twice where a vocabulary grew: of a module that is saved
    whole, the module before training, and the trained one under its inner name.

    Raises EdgemedError where two copies of one tensor differ.
    """
    result = {}
    for name, tensor in tensors.items():
        module, inner, rest = _copied(name)
        other = tensors.get(f"{module}.{rest}")
        if not inner or other is None:
            result[name] = tensor
        elif inner == "modules_to_save" and not (
            other.shape == tensor.shape and bool((other == tensor).all())
        ):
            raise EdgemedError(
                f"{where}: '{name}' and '{module}.{rest}' differ, and are of one module",
                "Copy the adapter again",
            )
    return result


def _copied(name: str) -> tuple[str, str, str]:
    """(module, inner name, rest) of a tensor inside of peft's wrapper; inner '' for any other."""
    for inner in ("modules_to_save", "original_module"):
        module, found, rest = name.partition(f".{inner}.")
        if found:
            return module, inner, rest
    return name, "", ""
