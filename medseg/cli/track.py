"""``medseg track``."""

import json as json_module
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from medseg.instances.follow_up import FollowUp, FollowUpConfig
    from medseg.instances.schema import Instances


class Register(StrEnum):
    """How images are registered."""

    NONE = "none"
    RIGID = "rigid"
    AFFINE = "affine"


class Meaning(StrEnum):
    """What the numbers of a label map are."""

    AUTO = "auto"
    LABELS = "labels"
    MASK = "mask"


def track(
    scans: Annotated[
        list[Path],
        typer.Argument(
            readable=False, metavar="BASELINE FOLLOW_UP...", help="Label maps or masks, in the order of time."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")],
    images: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="BASELINE FOLLOW_UP", help="The two images, to register and to draw on."),
    ] = None,
    register: Annotated[
        Register | None,
        typer.Option(help="How the images are registered.", show_default="rigid, with --images"),
    ] = None,
    organs: Annotated[
        Path | None, typer.Option(help="Label map of organs at baseline, for two targets an organ.")
    ] = None,
    objects: Annotated[
        Meaning, typer.Option(help="Numbers are objects, or connected parts of a mask are.")
    ] = Meaning.AUTO,
    cells: Annotated[
        bool, typer.Option("--cells", help="Frames of a film: tracks and divisions instead of a response.")
    ] = False,
    max_distance: Annotated[
        float | None, typer.Option(min=0.0, help="Farthest that an object moves, in mm (or micrometres).")
    ] = None,
    pixel_size: Annotated[
        str | None, typer.Option(help="Where files do not tell it: '0.5 micron', '0.7 x 0.7 x 3 mm'.")
    ] = None,
    days: Annotated[
        float | None, typer.Option(min=0.01, help="Between the scans, for doubling times.")
    ] = None,
    smallest_sum: Annotated[
        float | None, typer.Option(min=0.0, help="Smallest sum of target diameters so far, in mm (nadir).")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Find objects of BASELINE again in FOLLOW_UP: new, gone, merged, split, growth, RECIST 1.1.

    What lies outside of the other map is called so, and is neither new nor gone.

    Writes events.csv, follow_up.json, follow_up.png and follow_up_labels.nii.gz, whose numbers are those of
    the baseline. With --cells any number of frames: tracks.csv, and a label map of each frame.
    """
    from medseg.errors import ConfigError
    from medseg.files import check_distinct, check_writable
    from medseg.instances.read import read_instances

    if len(scans) < 2 or (len(scans) > 2 and not cells):
        expected = "two or more frames" if cells else "a baseline and a follow-up (--cells takes more)"
        raise ConfigError(f"{len(scans)} label maps: expected {expected}.")
    if cells:
        _refuse(images=images, register=register, organs=organs, days=days, smallest_sum=smallest_sum)
    elif register not in (None, Register.NONE) and images is None:
        raise ConfigError(f"--register {register} needs the images. Give --images too, or leave it out.")
    check_writable(out, folder=True)
    results = (
        [_frame_file(out, n, path) for n, path in enumerate(scans)] if cells else [_label_file(out, scans)]
    )
    check_distinct(
        [*results, out / "follow_up.png"], [*scans, *(images or ()), *([organs] if organs else [])]
    )
    if cells:
        frames = [read_instances(path, objects.value, pixel_size, measured=False) for path in scans]
        report = _cells(scans, frames, out, max_distance)
    else:
        config = _config((register or Register.RIGID).value, max_distance, days, smallest_sum)
        both = [read_instances(path, objects.value, pixel_size) for path in scans]
        report = _lesions(scans, both, images, organs, out, config)
    lines = report.pop("lines")
    if json:
        typer.echo(json_module.dumps(report))
        return
    for line in lines:
        typer.echo(line)


def _refuse(**options: object) -> None:
    """Refuse the options of lesions that were given with --cells."""
    from medseg.errors import ConfigError

    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"--{name.replace('_', '-')} does not go with --cells. Leave it out.")


def _suffix(scan: Path) -> str:
    from medseg.io.formats import suffix_of

    return suffix_of(scan) if suffix_of(scan) in (".tif", ".tiff", ".nrrd", ".mha") else ".nii.gz"


def _label_file(out: Path, scans: list[Path]) -> Path:
    return out / f"follow_up_labels{_suffix(scans[1])}"


def _frame_file(out: Path, number: int, scan: Path) -> Path:
    suffix = ".tif" if scan.suffix.lower() in (".tif", ".tiff", ".png") else ".nii.gz"
    return out / f"tracks_{number:04d}{suffix}"


def _config(
    register: str, max_distance: float | None, days: float | None, smallest_sum: float | None
) -> "FollowUpConfig":
    from medseg.instances.follow_up import FollowUpConfig

    link = {} if max_distance is None else {"max_distance": max_distance}
    return FollowUpConfig.from_dict(
        {"registration": register, "days": days, "smallest_sum": smallest_sum, "link": link}
    )


def _lesions(
    scans: list[Path],
    both: list["Instances"],
    images: tuple[Path, Path] | None,
    organs: Path | None,
    out: Path,
    config: "FollowUpConfig",
) -> dict[str, Any]:
    from medseg.instances.export.follow_up import describe_follow_up, write_follow_up
    from medseg.instances.follow_up import follow_up
    from medseg.io import read

    pictures = None if images is None else (read(images[0]), read(images[1]))
    found = follow_up(both[0], both[1], pictures, None if organs is None else read(organs), config=config)
    files = write_follow_up(found, out, pictures, _suffix(scans[1]))
    return {
        **describe_follow_up(found),
        "files": {name: str(path) for name, path in files.items()},
        "lines": _lines(found, out),
    }


def _lines(found: "FollowUp", out: Path) -> list[str]:
    counts = [f"{count} {kind}" for kind, count in found.counts().items() if count]
    lines = [
        f"{_count(len(found.baseline), 'object')}, then {len(found.later)}: "
        f"{', '.join(counts) or 'none at any time'}"
    ]
    if found.response is not None and counts:
        r = found.response
        lines.append(
            f"RECIST 1.1: {r.overall} (targets {r.target}, {r.baseline_sum:.1f} mm to {r.sum_in_words()}; "
            f"non-targets {r.non_target}; {len(r.new_lesions)} new)"
        )
        lines += [f"  {note}" for note in r.notes]
    return [*lines, f"Results: {out}"]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _cells(
    scans: list[Path], frames: list["Instances"], out: Path, max_distance: float | None
) -> dict[str, Any]:
    from medseg.instances.export import write_csv
    from medseg.instances.frames import FramesConfig, track_frames
    from medseg.io import write

    found = track_frames(frames, FramesConfig.from_dict({"max_distance": max_distance}))
    write_csv(found.table(), out / "tracks.csv")
    for number, (path, frame) in enumerate(zip(scans, frames, strict=True)):
        write(found.relabel(number, frame), _frame_file(out, number, path))
    divided = len({each.parent for each in found.tracks if each.parent})
    return {
        "frames": len(frames),
        "tracks": list(found.table().rows()),
        "divisions": divided,
        "lines": [
            f"{_count(len(found.tracks), 'track')} over {len(frames)} frames, {_count(divided, 'division')}",
            f"Results: {out}",
        ],
    }
