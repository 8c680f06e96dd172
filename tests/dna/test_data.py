"""dna/data.py: CSV and FASTA of many makes, and what is refused in one line."""

import gzip
import itertools

import numpy as np
import pytest

from dna.data import decode, read_data

ROWS = ["".join(row) for row in itertools.product("ACGT", repeat=4)][:100]
FASTA = "".join(f">{i} words\n{s[:2]}\n{s[2:].lower()}\n" for i, s in enumerate(ROWS))
CSV = "id,seq,value\n" + "".join(f"{i},{s},{i}\n" for i, s in enumerate(ROWS))
FORMATS = {
    "csv": CSV,
    "lower": CSV.lower().rstrip("\n"),
    "crlf": CSV.replace("\n", "\r\n"),
    "cr": CSV.replace("\n", "\r"),
    "byte-order mark": "\ufeff" + CSV,
    "blank lines": "\n \n" + CSV.replace("\n", "\n\n"),
    "empty rows of a spreadsheet": CSV + ",,\n,,\n",
    "Sequence": CSV.replace("seq", "Sequence"),
    "tsv": CSV.replace(",", "\t").replace("seq", "Seq"),
    "semicolons": CSV.replace(",", ";"),
    "spaces": CSV.replace(",", ", "),
    "quotes": CSV.replace(",", '","').replace("\n", '"\n"')[:-1].replace("id", '"id'),
    "csv.gz": CSV,
    "fasta": FASTA,
    "fasta-crlf": "\r\n" + FASTA.replace("\n", "\r\n"),
    "fasta.gz": FASTA,
}


def refused(path, *mentions, **kwargs):
    """The one line that ends the program, which mentions all of these."""
    with pytest.raises(SystemExit) as error:
        read_data(path, **kwargs)
    message = str(error.value)
    assert message.startswith(f"error: {path}")
    assert message.isprintable()
    for mention in mentions:
        assert mention in message, message
    return message


@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_data(name, tmp_path):
    path = tmp_path / "data"
    text = FORMATS[name].encode()
    path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    column = None if "fasta" in name else "value"
    found = read_data(path, column)
    assert decode(found.x) == ROWS
    assert found.x.dtype == np.uint8
    assert found.names == [str(i) for i in range(100)]
    assert found.values == (column and [str(i) for i in range(100)])
    refused(path, "no column absent", column="absent")


def test_a_column_of_your_own_has_the_sequences(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text(CSV.replace("seq", "Oligo"))
    assert decode(read_data(path, seq_column="oligo").x) == ROWS
    refused(path, "CSV with a column dna, found", seq_column="dna")


BAD_ROWS = {
    "repeats the sequence of line 3": "200,AAAA,1",
    "has 5 bases, most have 4": "200,ACGTA,1",
    "has the letter 'N', expected A, C, G and T alone": "200,ACGN,1",
    "has no sequence": "200,,1",
    "has an empty cell": "200,TTTT,",
    "has 'nan', expected a number": "200,TTTT,nan",
    "has '1_000', expected a number": "200,TTTT,1_000",
    "has '1e999', expected a finite number": "200,TTTT,1e999",
}


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_bad_rows_are_named_or_dropped(fault, tmp_path, capsys):
    """Also if the first row is the bad one; lines are those of the file."""
    path = tmp_path / "data.csv"
    path.write_text("\n" + CSV + BAD_ROWS[fault] + "\n")
    refused(path, f"line 103 {fault}", column="value")
    found = read_data(path, "value", drop_bad_rows=True)
    assert decode(found.x) == ROWS
    assert len(found.values) == 100
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"{path}: 1 of 101 sequences dropped\n")
    path.write_text(CSV.replace("value\n", f"value\n{BAD_ROWS[fault]}\n"))
    assert len(read_data(path, "value", drop_bad_rows=True).x) == 100


# What is wrong with a table as a whole: the CSV below, or what it is changed into.
BAD_TABLES = {
    "line 102 has 4 cells, the header 3": CSV + "200,TTTT,1,500\n",
    "line 102 has 2 cells, the header 3": CSV + "200,TTTT\n",
    "line 2 has 4 cells, the header 3": CSV.replace("0,AAAA,0", "0,AAAA,0,9"),
    "line 51: unexpected end of data": CSV.replace("49,", '"49,', 1),
    "line 2: ',' expected after": CSV.replace("0,AAAA,0", '"0"x,AAAA,0'),
    "a quoted cell spans lines 2 to 4": (
        CSV.replace("0,AAAA,0", '"0,AAAA,0').replace("2,AAAG", '2",AAAG')
    ),
    "has 2 columns named value": CSV.replace("id,", "value,"),
    "has the columns Sequence and seq": CSV.replace("id,", "Sequence,"),
    "with a column seq or sequence, found the first line 'name,x'": "name,x\n1,2\n",
    "found the first line ''": "",
    "has 3 usable sequences, expected at least 64": "seq\nAC\nAG\nAT\n",
}


@pytest.mark.parametrize("fault", BAD_TABLES)
def test_bad_tables_are_refused(fault, tmp_path):
    """Dropping bad rows does not help: the table cannot be trusted."""
    path = tmp_path / "data.csv"
    path.write_text(BAD_TABLES[fault])
    refused(path, fault, drop_bad_rows=True)


BAD_FILES = {
    "codec can't decode": b"\x89PNG\r\n\x1a\n\xff\xfe",
    "ended before": gzip.compress(CSV.encode())[:40],
    "decompress": gzip.compress(CSV.encode())[:30] + b"\xff" * 300,
    "No such file": None,
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_bad_files_are_one_line(fault, tmp_path):
    path = tmp_path / "data.csv"
    if BAD_FILES[fault] is not None:
        path.write_bytes(BAD_FILES[fault])
    refused(path, fault)
