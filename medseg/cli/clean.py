"""``medseg clean``: remove what can be made again."""

import shutil
from pathlib import Path
from typing import Annotated

import typer


def clean(
    run: Annotated[Path, typer.Argument(help="Run folder whose preprocessed store is to be removed.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be freed.")] = False,
) -> None:
    """Free the disk space of preprocessed cases and leftovers of interrupted runs; results stay."""
    from medseg.errors import DataError
    from medseg.files import orphan_target

    if not (run / "plan.yaml").exists():
        raise DataError(f"{run}: not a run folder (no plan.yaml). Give the folder that was passed with -o.")
    doomed = [run / "store", *run.glob(".*.*"), *run.glob("fold_*/.*.*")]
    # The only copy of a folder whose replacement was interrupted is no leftover.
    doomed = [path for path in doomed if path.exists() and orphan_target(path) is None]
    freed = sum(f.stat().st_size for path in doomed for f in [path, *path.rglob("*")] if f.is_file())
    if not dry_run:
        for path in doomed:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    typer.echo(f"{run}: {'would free' if dry_run else 'freed'} {freed / 1e6:.1f} MB.")
