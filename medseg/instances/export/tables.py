"""A table as CSV, JSON or Parquet; the names of the columns carry their units."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from medseg.errors import ConfigError
from medseg.files import atomic_path, write_text
from medseg.instances.table import Table
from medseg.types import PathLike


def write_table(table: Table, path: PathLike) -> None:
    """Write what the name ends in: ``.parquet``, ``.json`` (a list with an object per row), else CSV."""
    suffix = Path(path).suffix.lower()
    if suffix == ".json":
        rows = [{name: _strict(value) for name, value in row.items()} for row in table.rows()]
        write_text(path, json.dumps(rows, indent=1, allow_nan=False) + "\n")
    elif suffix == ".parquet":
        write_parquet(table, path)
    else:
        write_csv(table, path)


def write_csv(table: Table, path: PathLike) -> None:
    """Write a line per row under a line of names; what is undefined is empty, infinite is inf.

    Numbers are written so that reading them gives the same bits.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(table.columns)
    for row in table.rows():
        writer.writerow([_cell(value) for value in row.values()])
    write_text(path, stream.getvalue())


def write_parquet(table: Table, path: PathLike) -> None:
    """Write Parquet with the types of the columns.

    Raises
    ------
    ConfigError
        The package pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"{path}: Parquet needs the package pyarrow, which is not installed. "
            "Run pip install 'medseg[tables]', or write .csv."
        ) from error
    columns = {
        name: pyarrow.array(column.tolist(), pyarrow.string()) if column.dtype == object else column
        for name, column in table.columns.items()
    }
    with atomic_path(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.table(columns), temporary)


def _strict(value: Any) -> Any:
    """Return what strict JSON holds: NaN and infinity are null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float):
        return "" if math.isnan(value) else repr(value)
    return value
