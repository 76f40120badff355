"""Records of CSV, Parquet and Arrow files, in memory that a hostile file cannot raise.

CSV is read by Python's own module: every value is the text that stands there, where libraries for
tables would make 007 a number and NA a missing value. Parquet and Arrow need the extra `data`.

A few bytes of Parquet can stand for gigabytes: by compression, and by a dictionary whose one long
value every row names. So what a row group says of its size is checked before it is decompressed,
and as many rows are read at a time as fit beside each other if all held the whole dictionary.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from qlora_kit.data.lines import decoded, lines, opened, too_long
from qlora_kit.errors import DataError, ResourceError

BATCH_ROWS, BATCH_BYTES = 256, 64 * 1024**2
"""Rows of a table that are read together, and about how much memory they may take."""

GROUP_ROWS = 64
"""A row group may be as large as so many rows of the largest size."""

Rows = Iterator[tuple[int, Any]]


def csv_rows(path: Path, delimiter: str, limit: int) -> Rows:
    """The records below the header; a quoted field may hold line ends."""
    csv.field_size_limit(limit)
    taken = 0

    def texts() -> Iterator[str]:
        nonlocal taken
        for line, offset, raw in lines(path, limit):
            taken += len(raw)
            if taken > limit:
                raise too_long(f"{path}:{line}: the record", limit)
            yield decoded(raw, offset, f"{path}:{line}")

    reader = csv.reader(texts(), strict=True, delimiter=delimiter)
    header: list[str] = []
    while True:
        line, taken = reader.line_num + 1, 0
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}:{line}: not CSV: {error}", "correct the quotes") from error
        if values is None:
            return
        if not values:
            continue
        if not header:
            # A space around a name is the one behind a comma: no flag could name it.
            header = [name.strip() for name in values]
            _check_parted(header, delimiter, f"{path}:{line}")
            _check_once(header, f"{path}:{line}")
            continue
        if len(values) != len(header):
            raise DataError(
                f"{path}:{line}: {len(values)} values below {len(header)} columns",
                f"give every row one value for each column; quote values that hold {delimiter!r}",
            )
        yield line, dict(zip(header, values, strict=True))


def parquet_rows(path: Path, limit: int) -> Rows:
    """The records of a Parquet file."""
    parquet = extra("pyarrow.parquet", str(path))
    with (
        _counted(path, "Parquet") as place,
        opened(path) as raw,
        parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file,
    ):
        _check_once(file.schema_arrow.names, f"{path}:1")
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            if group.num_rows and group.total_byte_size > limit * min(group.num_rows, GROUP_ROWS):
                what = f"{path}:{place[0] + 1}: the row group has {group.num_rows} rows and"
                raise DataError(
                    f"{what} {group.total_byte_size / 2**20:.0f} MiB, more than rows of "
                    f"{limit / 2**20:.0f} MiB",
                    "write the file with row groups of fewer rows, or raise --max_row_size",
                )
            size = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, _dictionaries(raw, group))))
            for batch in file.iter_batches(batch_size=size, row_groups=[number]):
                yield from _values(batch, place, path, limit)


def parquet_count(path: Path) -> int:
    """How many records a Parquet file has, from its last bytes."""
    parquet = extra("pyarrow.parquet", str(path))
    with _counted(path, "Parquet"), opened(path), parquet.ParquetFile(path) as file:
        return int(file.metadata.num_rows)


def arrow_rows(path: Path, limit: int) -> Rows:
    """The records of an Arrow file, such as `save_to_disk` writes."""
    ipc = extra("pyarrow.ipc", str(path))
    arrow = importlib.import_module("pyarrow")
    with _counted(path, "Arrow") as place, opened(path), arrow.memory_map(str(path)) as file:
        try:
            reader = ipc.open_stream(file)
            batches = iter(reader)
        except arrow.ArrowInvalid:
            reader = ipc.open_file(file)
            batches = (reader.get_batch(n) for n in range(reader.num_record_batches))
        _check_once(reader.schema.names, f"{path}:1")
        for batch in batches:
            # Offsets of such a file are nobody's word but its own.
            batch.validate(full=True)
            for first in range(0, batch.num_rows, BATCH_ROWS):
                yield from _values(batch.slice(first, BATCH_ROWS), place, path, limit)


def extra(module: str, what: str) -> Any:
    """A package of the extra `data`, imported when it is needed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ResourceError(
            f"{what}: reading it needs the package {package}, which is not installed",
            "install it with: pip install 'qlora-kit[data]'",
        ) from error


def _values(batch: Any, place: list[int], path: Path, limit: int) -> Rows:
    """The rows of a batch as Python's values; `place` counts them."""
    if batch.nbytes <= limit:
        for value in batch.to_pylist():
            place[0] += 1
            yield place[0], value
        return
    for index in range(batch.num_rows):
        row = batch.slice(index, 1)
        if row.nbytes > limit:
            raise too_long(f"{path}:{place[0] + 1}: the row", limit)
        (value,) = row.to_pylist()
        place[0] += 1
        yield place[0], value


@contextlib.contextmanager
def _counted(path: Path, what: str) -> Iterator[list[int]]:
    """A counter of rows, and the library's exceptions as `DataError` with the row after it."""
    arrow = importlib.import_module("pyarrow")
    place = [0]
    try:
        yield place
    except MemoryError:
        raise
    except (arrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{path}:{place[0] + 1}: not {what} that can be read: {reason}", "write the file again"
        ) from error


def _check_parted(names: list[str], delimiter: str, where: str) -> None:
    """Refuse one name that is several, parted as spreadsheets of other languages part them."""
    said = {",": "commas", ";": "semicolons", "\t": "tabs"}
    signs = set(names[0]) & said.keys() - {delimiter} if len(names) == 1 else set()
    if len(signs) != 1 or not all(
        re.fullmatch(r"\w.*", name) for name in names[0].split(next(iter(signs)))
    ):
        return
    raise DataError(
        f"{where}: the columns are parted by {said[signs.pop()]}, and are read as parted by "
        f"{said[delimiter]}",
        "save the file with commas as .csv, or with tabs as .tsv",
    )


def _check_once(names: list[str], where: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise DataError(f'{where}: the column "{name}" is there twice', "rename one of them")


def _dictionaries(file: IO[bytes], group: Any) -> int:
    """Bytes of a row group's dictionaries once decompressed, as their page headers have it.

    A page header is Thrift's compact protocol and begins with three whole numbers: the kind of
    page, its size and its compressed size (parquet-format, `PageHeader`). What does not begin so
    counts as too large for more than a row at a time.
    """
    total = 0
    for number in range(group.num_columns):
        column = group.column(number)
        if not column.has_dictionary_page:
            continue
        file.seek(column.dictionary_page_offset)
        header = file.read(16)
        sizes, at = [], 0
        for _ in range(2):
            if header[at : at + 1] != b"\x15":
                return BATCH_BYTES
            at, shift, value = at + 1, 0, 0
            while at < len(header) and shift < 35:
                value |= (header[at] & 0x7F) << shift
                shift, at = shift + 7, at + 1
                if not header[at - 1] & 0x80:
                    break
            sizes.append(value >> 1)
        total += sizes[1]
    return total
