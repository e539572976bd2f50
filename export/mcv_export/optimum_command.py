"""`optimum-cli export mcv`: the build of `mcv-export build` under the names that optimum gives its options."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

if TYPE_CHECKING:
    from mcv_calibration.precisions import Precision
    from mcv_runtime.bundle.manifest import GraphName

# Every start of optimum-cli imports this module: what the build needs is imported by the build.

NAME = "optimum-cli export mcv"
TASK = "image-text-to-text"
FORMATS: dict[str, Precision] = {"fp32": "fp32", "int8": "int8-token", "int4": "q4"}
DECODER_FORMATS: dict[str, Precision] = {**FORMATS, "int8": "q8"}
"""A decoder reads its weights for each token, and 8-bit blocks are its fastest; a tower in blocks is slower than in float."""


class ExportMcv(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum states no types
    """The command, as optimum registers it."""

    COMMAND = CommandInfo(name="mcv", help="Export MiniCPM-V to ONNX, as a bundle that mcv-run answers with.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        needed = parser.add_argument_group("Required arguments")
        needed.add_argument("-m", "--model", required=True, help="Folder or hub id of the checkpoint.")
        needed.add_argument("output", type=Path, help="Bundle folder to make.")
        more = parser.add_argument_group("Optional arguments")
        more.add_argument(
            "--adapter",
            action="append",
            metavar="FOLDER_OR_ID[@REVISION][:WEIGHT]",
            help="A LoRA that PEFT saved, to merge; may be given several times.",
        )
        more.add_argument("--task", choices=("auto", TASK), default="auto", help=f"Always {TASK}.")
        more.add_argument("--revision", help="Branch, tag or commit on the hub.")
        more.add_argument("--cache_dir", type=Path, help="Where downloads are kept (default: the hub's own cache).")
        more.add_argument(
            "--trust-remote-code", action="store_true", help="Accepted and ignored: a checkpoint's code is never run."
        )
        more.add_argument(
            "--weight-format",
            choices=FORMATS,
            help="Weights of all graphs; int4 is the decoder's alone. Default: decoder int4, the others int8.",
        )
        for graph in ("vision", "resampler", "decoder"):
            more.add_argument(f"--{graph}", choices=FORMATS, help="Weights of this graph.")
        more.add_argument("--group-size", type=int, help="Weights that share a scale. Default: 128 in int4, 32 in int8.")
        more.add_argument("--force", action="store_true", help="Replace the output folder if it is a bundle.")

    def run(self) -> None:
        from mcv_runtime.command import terminal

        terminal.finish(self._build, NAME, interrupted="interrupted; nothing was kept")

    def _build(self) -> None:
        from mcv_export.build import BuildOptions
        from mcv_export.build_command import make_bundle, print_result
        from mcv_export.precision import Wishes

        args = self.args
        said: dict[GraphName, Precision | None] = {
            "vision_encoder": FORMATS.get(args.vision),
            "resampler": FORMATS.get(args.resampler),
            "decoder_with_past": DECODER_FORMATS.get(args.decoder or args.weight_format),
        }
        wishes = Wishes(
            precision=FORMATS.get(args.weight_format),
            graphs={name: precision for name, precision in said.items() if precision},
            block_size=args.group_size,
        )
        result = make_bundle(
            args.model,
            args.output,
            BuildOptions(recipe=wishes.recipe(), force=args.force),
            adapters=args.adapter or (),
            revision=args.revision,
            cache_dir=args.cache_dir,
        )
        print_result(result)
