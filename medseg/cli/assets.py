"""``medseg assets``: published weights and samples, fetched by name and checked by hash."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from medseg.assets import Asset

assets = typer.Typer(
    name="assets",
    help="List, fetch and check published weights and samples; pack them for a site without internet.",
    no_args_is_help=True,
)

Cache = Annotated[
    Path | None,
    typer.Option(
        "--cache", metavar="FOLDER", help="Where files are kept; by default the cache folder of the user."
    ),
]
Names = Annotated[list[str] | None, typer.Argument(metavar="[NAMES]...", help="By default all in the cache.")]


@assets.command("list")
def list_assets(
    cache: Cache = None,
    json: Annotated[bool, typer.Option("--json", help="Print all that is known as JSON.")] = False,
) -> None:
    """Show what there is: name, size, whether it is in the cache, licence."""
    from medseg.assets import ASSETS, default_cache

    if json:
        typer.echo(_as_json(cache))
        return
    for asset in ASSETS.values():
        typer.echo(_line(asset, cache))
        typer.echo(f"  {asset.title}")
    typer.echo(f"Cache: {cache or default_cache()}")


def _line(asset: "Asset", cache: Path | None) -> str:
    from medseg.assets import cached

    size = f"{asset.size / 1e6:,.1f} MB" if asset.size else "?"
    here = "cached" if cached(asset, cache).is_file() else "-"
    return f"{asset.name:<22} {size:>11}  {here:<6}  {asset.licence}"


def _as_json(cache: Path | None) -> str:
    import json
    from dataclasses import asdict

    from medseg.assets import ASSETS, cached

    return json.dumps(
        [asdict(asset) | {"cached": cached(asset, cache).is_file()} for asset in ASSETS.values()], indent=2
    )


@assets.command("pull")
def pull(
    names: Annotated[list[str], typer.Argument(metavar="NAMES...", help="Of medseg assets list.")],
    cache: Cache = None,
    given: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="PATH",
            readable=False,
            help="Take them from this file, folder or pack, not from a network.",
        ),
    ] = None,
) -> None:
    """Fetch files into the cache and print where they are."""
    from medseg.assets import get_asset, keep

    for asset in [get_asset(name) for name in names]:
        typer.echo(str(keep(asset.name, given, cache)))


@assets.command("verify")
def verify(names: Names = None, cache: Cache = None) -> None:
    """Compare files in the cache with their hashes; remove damaged ones and end with an error."""
    from medseg.assets import ASSETS, cached, default_cache, get_asset, take_cached
    from medseg.errors import AssetError

    wanted = [get_asset(name) for name in names or ()]
    wanted = wanted or [asset for asset in ASSETS.values() if cached(asset, cache).is_file()]
    bad = []
    for asset in wanted:
        good = take_cached(asset, cache) is not None
        typer.echo(f"{asset.name:<22} {'right' if good else 'missing or damaged'}")
        if not good:
            bad.append(asset.name)
    if bad:
        raise AssetError(f"{', '.join(bad)}: missing or damaged. Run medseg assets pull {' '.join(bad)}.")
    if not wanted:
        typer.echo(f"{cache or default_cache()}: no assets here.")


@assets.command("pack")
def pack_assets(
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="Zip to write.")],
    names: Names = None,
    cache: Cache = None,
) -> None:
    """Write one archive of assets for a site without internet; missing ones are fetched first."""
    from medseg.assets import pack
    from medseg.files import check_writable

    check_writable(out)
    packed = pack(names or (), out, cache)
    typer.echo(f"{out}: {', '.join(packed)} ({out.stat().st_size / 1e6:,.1f} MB)")


@assets.command("unpack")
def unpack_assets(
    pack: Annotated[Path, typer.Argument(metavar="FILE", readable=False, help="Of medseg assets pack.")],
    cache: Cache = None,
) -> None:
    """Check the files of an archive and put them into the cache."""
    from medseg.assets import default_cache, unpack

    taken = unpack(pack, cache)
    typer.echo(f"{cache or default_cache()}: {', '.join(taken)}")
