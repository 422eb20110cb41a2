"""Records: the values of one field of JSON lines or of a Parquet file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import IO, Any

from freedraft.retrieval.build.extras import require
from freedraft.retrieval.build.problems import ProblemKind, Problems
from freedraft.retrieval.build.streams import MAX_LINE_BYTES, ReportBytes, lines_of
from freedraft.retrieval.index.errors import SourceError

BATCH_ROWS = 64


def json_lines(stream: IO[bytes], place: str, field: str, problems: Problems) -> Iterator[tuple[str, Any]]:
    """The place, `file:line`, and the field's value of each line; empty lines are passed over."""
    for number, line in lines_of(stream):
        here = f"{place}:{number}"
        if line is None:
            problems.add(ProblemKind.TOO_LONG, here, f"a line of more than {MAX_LINE_BYTES >> 20} MiB")
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            problems.add(ProblemKind.UNDECODABLE, here, f"not valid UTF-8 at byte {error.start + 1}: {error.reason}")
            continue
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            problems.add(ProblemKind.BROKEN_JSON, here, f"not valid JSON: {error}")
            continue
        value = field_of(record, field)
        if value is None:
            problems.add(ProblemKind.MISSING_FIELD, here, missing(record, field))
            continue
        yield here, value


def parquet_rows(
    path: str, place: str, field: str, problems: Problems, report: ReportBytes | None = None
) -> Iterator[tuple[str, Any]]:
    """The place, `file:row` counted from 1, and the field's value of each row; reports a share of the file a row group.

    Raises:
        MissingPackageError: pyarrow is not installed.
    """
    parquet = require("pyarrow.parquet", "reading a Parquet file")
    try:
        with parquet.ParquetFile(path, memory_map=False, buffer_size=1 << 20) as file:
            columns = file.schema_arrow.names
            column = field if field in columns else field.partition(".")[0]
            if column not in columns:
                problems.add(ProblemKind.MISSING_FIELD, place, f"no column {column!r}; there are: {', '.join(columns)}")
                return
            number = 0
            share = os.path.getsize(path) // max(1, file.num_row_groups)
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[column]):
                    for cell in batch.column(0):
                        number += 1
                        value = _cell_value(cell, f"{place}:{number}", column, field, problems)
                        if value is not None:
                            yield f"{place}:{number}", value
                if report is not None:
                    report(share)
    except SourceError:
        raise
    # pyarrow's own errors are these two, or ValueError.
    except (OSError, ValueError) as error:
        problems.add(ProblemKind.DAMAGED, place, f"not a readable Parquet file: {str(error).splitlines()[0]}")


def field_of(record: Any, field: str) -> Any:
    """The value at `field`: a key, or keys and list positions joined by dots; None if there is none."""
    if isinstance(record, Mapping) and field in record:
        return record[field]
    value = record
    for part in field.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def missing(record: Any, field: str) -> str:
    """What to say of a record without the field."""
    if not isinstance(record, Mapping):
        return f"expected an object with the field {field!r}, got {type(record).__name__}"
    keys = ", ".join(list(map(str, record))[:8]) or "none"
    return f"no field {field!r}; there are: {keys}"


def _cell_value(cell: Any, here: str, column: str, field: str, problems: Problems) -> Any:
    try:
        value = field_of({column: cell.as_py()}, field)
    except UnicodeDecodeError as error:
        problems.add(ProblemKind.UNDECODABLE, here, f"not valid UTF-8 at byte {error.start + 1}: {error.reason}")
        return None
    except (ValueError, OverflowError) as error:
        problems.add(ProblemKind.WRONG_VALUE, here, f"no Python value: {error}")
        return None
    if value is None:
        problems.add(ProblemKind.MISSING_FIELD, here, f"no value in the field {field!r}")
    return value
