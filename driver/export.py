"""Write the backbone of a run to a file for use elsewhere.

python driver/export.py RUN_DIR                     RUN_DIR/backbone.safetensors, for timm.create_model
python driver/export.py RUN_DIR --format onnx       RUN_DIR/backbone.onnx: images (n, C, S, S) in [0, 1] -> features
python driver/export.py RUN_DIR --whose student     the student's weights, where the teacher's would be the default
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

if __name__ == "__main__":  # the driver is run from its repository, not installed
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import tyro
from torch import nn

from bam_kernels.whole_files import replacing
from driver import backbones, checkpoint, cli
from driver.config import FILE, Config, UserError, as_plain, helpful, missing
from driver.model import Standardize
from driver.weights import exports, load_backbone


@helpful
@dataclass(frozen=True)
class Export:
    """Write the backbone of a run to a file for use elsewhere."""

    run: Annotated[Path, tyro.conf.Positional]
    """Directory of a run, or one of its checkpoints."""
    format: Literal["safetensors", "onnx"] = "safetensors"
    """Format of the file. `safetensors`: weights, for timm.create_model. `onnx`: a network from images (n, C, S, S) in
    [0, 1] to features."""
    whose: Literal["student", "teacher"] | None = None
    """Network whose weights are written. None: the teacher where there is one, else the student."""
    out: Path | None = None
    """File to write, whose name ends in .FORMAT. None: backbone.FORMAT in the folder of the checkpoint."""


def export(options: Export) -> Path:
    """Write the backbone, print how the file is used, return its path.

    Raises: UserError where the checkpoint, the folder of --out or a package is missing.
    """
    path = checkpoint.file_of(options.run)
    if not path.is_file():
        raise UserError(f"{options.run}: no {path.name} there")
    out = options.out or path.with_name(f"backbone.{options.format}")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    cli.check_folder(out.parent, f"--out {out}", out.name)
    if out.suffix != f".{options.format}":
        raise UserError(f"--out {out}: its name must end in .{options.format}, by which programs know the format")
    config = cli.parse([f"--config={path.parent / FILE}"])
    channels = config.data.channels
    backbone = backbones.make(config.model, channels, config.data.size, several_sizes=config.data.local_views > 0)
    load_backbone(backbone, path, options.whose, config.model)
    if options.format == "onnx":
        _write_onnx(
            nn.Sequential(Standardize.of(config.model, channels), backbone).eval(), channels, config.data.size, out
        )
        print(f"{out}: input `images` (n, {channels}, {config.data.size}, {config.data.size}) in [0, 1]")
        return out
    plain = {name: value for name, value in as_plain(config)["model"].items() if name != "weights"}
    # safetensors takes no tensor that shares its memory, as layers of CoaT do.
    tensors = {n: value.clone(memory_format=torch.contiguous_format) for n, value in backbone.state_dict().items()}
    exports.save(tensors, plain, out, f"--out {out}")
    print(f"{out}: weights of {config.model.name}, for\n")
    print("\n".join(f"    {line}" for line in usage(config, channels, out)))
    colours = Standardize.of(config.model, channels)
    mean, std = ([round(x, 4) for x in values.flatten().tolist()] for values in (colours.mean, colours.std))
    print(f"\nand images in [0, 1], less the mean {mean}, over the standard deviation {std}")
    return out


def usage(config: Config, channels: int, out: Path) -> list[str]:
    """Lines of Python that make the backbone from the file `out`, under the name `backbone`."""
    model, data, path = config.model, config.data, repr(str(out))
    if model.name == "convnet":
        return [
            "from driver.backbones import convnet  # in the folder of bam_kernels",
            "from safetensors.torch import load_file",
            f"backbone = convnet({channels}, size={data.size}, width={model.width}, norm={model.norm!r})",
            f"backbone.load_state_dict(load_file({path}))",
        ]
    _, arguments = backbones.from_timm(model, channels, data.size, several_sizes=data.local_views > 0)
    given = ", ".join(f"{name}={value}" for name, value in arguments.items() if name != "drop_path_rate")
    call = f'backbone = timm.create_model("{model.name}", {given}'
    if model.stem == "own":
        return ["import timm", f"{call}, checkpoint_path={path})"]
    return [
        "import timm, torch",
        f"{call})",
        f"backbone.conv1 = torch.nn.Conv2d({channels}, backbone.conv1.out_channels, 3, 1, 1, bias=False)",
        "backbone.maxpool = torch.nn.Identity()",
        f"timm.models.load_checkpoint(backbone, {path})",
    ]


def _write_onnx(model: nn.Module, channels: int, size: int, out: Path) -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(missing("--format onnx", "onnxscript", error, extra="onnx")) from error
    images = torch.zeros(2, channels, size, size)
    with replacing(out) as temporary:
        torch.onnx.export(
            model,
            (images,),
            temporary,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("n")},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def main(args: list[str] | None = None) -> int:
    """Exit code of this process, see `cli.run_script`."""
    return cli.run_script(Export, lambda options, _: export(options), args)


if __name__ == "__main__":
    sys.exit(main())
