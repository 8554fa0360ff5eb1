"""Weights on disk: a safetensors file and, beside it, a JSON recipe that rebuilds the network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from gan.errors import UserError
from gan.files import write_bytes, write_json
from gan.networks import Architecture

OTHER_WEIGHTS = (".pth", ".pt", ".ckpt", ".onnx")
"""Endings of weights that are whole, and of another kind."""


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """First 16 hexadecimal digits of the SHA-256 of names, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def state_hash(network: nn.Module) -> str:
    """Hash of a network's state dict: equal before and after everything that must not change it."""
    return tensors_hash(network.state_dict())


def save_tensors(path: Path, tensors: Mapping[str, Tensor], half: bool = False) -> Path:
    """Write named tensors; with ``half``, kernels (dimension > 1) as fp16, the rest as it is."""
    ready = {
        name: (value.half() if half and value.is_floating_point() and value.dim() > 1 else value)
        .detach()
        .cpu()
        .contiguous()
        for name, value in tensors.items()
    }
    return write_bytes(path, save_safetensors(ready))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read named tensors; fp16 kernels come back as float32.

    Raises:
        UserError: missing or truncated file, or of another kind.
    """
    if not path.is_file():
        raise UserError(f"the weight file {path} does not exist; check the path, or make it again")
    if path.suffix in OTHER_WEIGHTS:
        raise UserError(
            f"{path} is no .safetensors file; checkpoints of pytorch-CycleGAN-and-pix2pix become a task "
            "folder with such files by make_task.py, and exported ONNX has one beside it"
        )
    try:
        tensors = load_safetensors(path.read_bytes())
    except SafetensorError as error:
        raise UserError(
            f"the weight file {path} is damaged or no safetensors file ({error}); get it again"
        ) from error
    return {name: value.float() if value.dtype == torch.float16 else value for name, value in tensors.items()}


def recipe_path(path: Path) -> Path:
    """Where the recipe of a weight file lies."""
    return path.with_suffix(".json")


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe beside a weight file.

    Raises:
        UserError: no recipe, or one that is no JSON object.
    """
    recipe = recipe_path(path)
    if not recipe.is_file():
        raise UserError(f"{path} has no recipe: {recipe.name} must lie beside it and name the architecture")
    try:
        data = json.loads(recipe.read_text())
    except ValueError as error:  # no JSON, or not even text
        raise UserError(f"the recipe {recipe} is no valid JSON ({error}); get it again") from error
    if not isinstance(data, dict) or not isinstance(data.get("architecture"), dict):
        raise UserError(f"the recipe {recipe} has no key 'architecture'; it is no recipe of a network")
    return data


def save_network(
    path: Path, network: nn.Module, architecture: Architecture, recipe: Mapping[str, Any], half: bool = False
) -> Path:
    """Write ``path`` (safetensors) and its recipe (JSON).

    Args:
        architecture: must build a network of the same shape; its widths are those of ``network``.
        recipe: further keys: how the weights were made.
    """
    save_tensors(path, network.state_dict(), half)
    weights = tensors_hash(load_tensors(path))
    write_json(recipe_path(path), {"architecture": architecture.to_dict(), "weights_hash": weights, **recipe})
    return path


def load_network(path: Path | str) -> tuple[nn.Module, Architecture, dict[str, Any]]:
    """Rebuild a network in evaluation mode from its file and recipe.

    Raises:
        UserError: missing, damaged or mismatched files, each in one sentence.
    """
    path = Path(path)
    tensors = load_tensors(path)
    recipe = read_recipe(path)
    architecture = Architecture.from_dict(recipe["architecture"])
    network = architecture.build()
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()
        raise UserError(
            f"the weights in {path} do not fit their recipe {recipe_path(path).name}: {detail}"
        ) from error
    if recipe.get("weights_hash", found := tensors_hash(tensors)) != found:
        raise UserError(f"the weights in {path} are not those of {recipe_path(path).name}; get both again")
    return network.eval(), architecture, recipe
