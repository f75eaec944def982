"""``medseg prompt``: point at an organ or a lesion and get it whole, in 3D."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from medseg.cli.prompt_words import ORDERED
from medseg.cli.signals import mortal

# Panels of the help, and what stands in the place of a flag's value.
WHERE, HOW, AFTER, FLAG = "Where the object is", "How it is found", "What becomes of it", " "
_ORDER = "medseg.prompt.order"


class PromptCommand(TyperCommand):
    """A command that remembers in which order its options came: prompts belong to the object before them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, and note the order of options."""
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        ctx.meta[_ORDER] = [parameter.name for parameter in order if parameter.name in ORDERED]
        return super().parse_args(ctx, args)


def prompt(
    context: typer.Context,
    volume: Annotated[
        Path,
        typer.Argument(
            metavar="VOLUME",
            readable=False,
            help="Image, the sample mni-t1, or a YAML file of prompts for many images.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="PATH", help="Label map to write; of a YAML file: the folder."),
    ] = None,
    object_: Annotated[
        list[str] | None,
        typer.Option(
            "--object",
            metavar="NAME",
            rich_help_panel=WHERE,
            help="Name of the object. Given again, it begins the next one: prompts belong to the name before "
            "them.",
        ),
    ] = None,
    box: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X,Y,Z,X,Y,Z",
            rich_help_panel=WHERE,
            help="Two opposite corners: on one slice, if they agree along an axis; else in 3D.",
        ),
    ] = None,
    point: Annotated[
        list[str] | None,
        typer.Option(metavar="X,Y,Z", rich_help_panel=WHERE, help="A click inside the object."),
    ] = None,
    not_point: Annotated[
        list[str] | None,
        typer.Option(
            "--not-point",
            metavar="X,Y,Z",
            rich_help_panel=WHERE,
            help="A click outside of it, where the mask leaks.",
        ),
    ] = None,
    scribble: Annotated[
        list[str] | None,
        typer.Option(metavar="'X,Y,Z ...'", rich_help_panel=WHERE, help="A line drawn through the object."),
    ] = None,
    not_scribble: Annotated[
        list[str] | None,
        typer.Option(metavar="'X,Y,Z ...'", rich_help_panel=WHERE, help="A line through what is not it."),
    ] = None,
    lasso: Annotated[
        list[str] | None,
        typer.Option(
            metavar="'X,Y,Z ...'", rich_help_panel=WHERE, help="A closed line around it on a slice."
        ),
    ] = None,
    not_lasso: Annotated[
        list[str] | None,
        typer.Option(metavar="'X,Y,Z ...'", rich_help_panel=WHERE, help="The same around what is not it."),
    ] = None,
    mask: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:VALUE]", rich_help_panel=WHERE, help="A drawn label map on the grid of the image."
        ),
    ] = None,
    like: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", rich_help_panel=WHERE, help="The mask of another object."),
    ] = None,
    voxel: Annotated[
        bool,
        typer.Option(
            "--voxel",
            metavar=FLAG,
            rich_help_panel=WHERE,
            help="Numbers are voxel indices of the file's own array, from 0 (a box: first and last voxel), "
            "not world mm (RAS+).",
        ),
    ] = False,
    plane: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=WHERE,
            help="axial, coronal or sagittal: of a flat box or line, where the numbers do not say it.",
        ),
    ] = None,
    z_range: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIRST,LAST",
            rich_help_panel=WHERE,
            help="The object lies between these slices (mm along the axis, or --voxel).",
        ),
    ] = None,
    axis: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=HOW,
            help="Across which slices it is followed: axial, coronal, sagittal, or 0, 1, 2 of the file. By "
            "default those of the flat box, or of thick slices.",
        ),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=HOW,
            help="auto, soft tissue, lung, bone, brain, liver, mediastinum, subdural, stroke, percentiles, "
            "or LEVEL/WIDTH.",
        ),
    ] = None,
    modality: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", rich_help_panel=HOW, help="CT, MR, PET or other, if the values mislead."
        ),
    ] = None,
    channel: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", rich_help_panel=HOW, help="Of a 4D image, from 0."),
    ] = None,
    propagator: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=HOW,
            help="How it is followed through the slices: volume (the default), box, mask, points, memory or "
            "consensus.",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", rich_help_panel=HOW, help="A setting of the propagator; repeatable."
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE",
            rich_help_panel=HOW,
            help="Weights to use instead of a download, such as mobile-sam=mobile_sam.pt; repeatable.",
        ),
    ] = None,
    everything: Annotated[
        bool,
        typer.Option(
            "--everything", metavar=FLAG, rich_help_panel=HOW, help="No prompts: find all there is."
        ),
    ] = False,
    overlap: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=AFTER,
            help="Who gets voxels that two objects want: overwrite (the later), keep (the earlier), or ask.",
        ),
    ] = None,
    resolve: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WINNER,LOSER", rich_help_panel=AFTER, help="The answer to --overlap ask; repeatable."
        ),
    ] = None,
    session: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            rich_help_panel=AFTER,
            help="Keep every step here, and go on with what is there: correct, undo, tomorrow too.",
        ),
    ] = None,
    undo: Annotated[
        int, typer.Option(min=0, metavar="N", rich_help_panel=AFTER, help="First take back N steps of it.")
    ] = 0,
    redo: Annotated[
        int, typer.Option(min=0, metavar="N", rich_help_panel=AFTER, help="First take N steps again.")
    ] = 0,
    again: Annotated[
        bool,
        typer.Option(
            "--again",
            metavar=FLAG,
            rich_help_panel=AFTER,
            help="Find all objects of it anew, with the settings of now.",
        ),
    ] = False,
    sheet: Annotated[
        Path | None,
        typer.Option(metavar="PNG", rich_help_panel=AFTER, help="Draw a contact sheet of the result."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", metavar=FLAG, help="Of a YAML file: leave out cases that are done already."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", metavar=FLAG, help="Check the prompts, say where they are, and stop.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", metavar=FLAG, help="Print the result as JSON on stdout.")
    ] = False,
) -> None:
    """Point at an organ or a lesion in VOLUME and get it whole, in 3D, on the grid of the image.

    A box on one slice is enough:

    medseg prompt ct.nii.gz --box -12,-40,88,95,61,88 --object liver -o liver.nii.gz

    Then look at the --sheet, and correct with --point and --not-point in
    the same --session.
    """
    with mortal():  # torch comes with it
        from medseg.cli.prompt_work import run_prompt
    typed = [name for name in context.params if _is_typed(context, name)]
    run_prompt(context.params, context.meta.get(_ORDER, []), typed)


def _is_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
