from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gan.checkpoints import save_network
from gan.errors import UserError
from gan.loader import loader_source, write_loader
from gan.networks import Architecture
from gan.official import save_official
from tests.gan.conftest import random, randomise

UNET = Architecture("unet_8", base_width=4, widths=(4, 6, 8, 6, 4))
IMAGE = Architecture("unet_8", base_width=4, widths=(4, 6, 8, 6, 4), statistics="image")
RESNET = Architecture(
    "resnet_1blocks", base_width=4, widths=(4, 6, 8, 5, 6, 4), norm="instance", dropout=True
)

REPOSITORY = {
    "models/__init__.py": "",
    "models/networks.py": """
class UnetGenerator: pass
class ResnetGenerator: pass
def define_G(input_nc, output_nc, ngf, netG):
    return ResnetGenerator(input_nc, output_nc, ngf) if netG.startswith("resnet") else UnetGenerator(input_nc)
""",
    "test.py": """
import sys
import torch
from models import networks
if __name__ == "__main__":
    name = sys.argv[1]
    network = networks.define_G(3, 3, 64, "resnet_9blocks")
    network.load_state_dict(torch.load("latest_net_G.pth", weights_only=True))
    torch.save(network.train()(torch.load(name, weights_only=True)), "made.pt")
""",
}
"""As much of pytorch-CycleGAN-and-pix2pix as a loader touches: names, not code."""


def export(folder: Path, architecture: Architecture) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, checkpoint and loader in a folder; returns an input and the output that belongs to it."""
    network = randomise(architecture.build())
    save_network(folder / "generator.safetensors", network, architecture, {})
    save_official(folder / "latest_net_G.pth", network)
    write_loader(folder / "pruned.py", architecture, "generator.safetensors", "latest_net_G.pth")
    images = torch.randn(2, 3, 8, 8, generator=random())
    torch.save(images, folder / "images.pt")
    with torch.no_grad():
        return images, network(images)


def python(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("architecture", [UNET, IMAGE, RESNET], ids=lambda a: f"{a.name}-{a.statistics}")
def test_the_file_alone_gives_the_network(tmp_path: Path, architecture: Architecture) -> None:
    images, outputs = export(tmp_path, architecture)
    space: dict[str, object] = {"__name__": "pruned", "__file__": str(tmp_path / "pruned.py")}
    exec((tmp_path / "pruned.py").read_text(), space)
    network = space["load"]()  # type: ignore[operator]
    assert type(network).__module__ == "pruned"
    assert torch.equal(network.train()(images), outputs)  # training mode changes nothing


def test_the_repositorys_program_runs_with_it_and_without_this_project(tmp_path: Path) -> None:
    _, outputs = export(tmp_path, UNET)
    for name, text in REPOSITORY.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    program = (
        "import runpy, sys\n"
        "sys.modules['gan'] = sys.modules['safetensors'] = None\n"  # an import of them would raise
        "sys.argv = ['pruned.py', 'test.py', 'images.pt']\n"
        "runpy.run_path('pruned.py', run_name='__main__')\n"
    )
    python(tmp_path, "-c", program)
    assert torch.equal(torch.load(tmp_path / "made.pt"), outputs)


def test_torch_alone_is_enough_for_the_checkpoint(tmp_path: Path) -> None:
    _, outputs = export(tmp_path, RESNET)
    program = (
        "import sys, torch\n"
        "sys.modules['gan'] = sys.modules['safetensors'] = None\n"
        "from pruned import load\n"
        "torch.save(load('latest_net_G.pth')(torch.load('images.pt')).detach(), 'made.pt')\n"
    )
    python(tmp_path, "-c", program)
    assert torch.equal(torch.load(tmp_path / "made.pt"), outputs)


def test_it_is_clean_python_without_the_project_in_it() -> None:
    text = loader_source(IMAGE, "pruned", "generator.safetensors", "latest_net_G.pth")
    roots = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert roots - set(sys.stdlib_module_names) == {"torch", "safetensors", "models"}


def test_discriminators_have_no_loader() -> None:
    with pytest.raises(UserError, match="'basic' is a discriminator"):
        loader_source(Architecture("basic"), "a", "b", "c")
