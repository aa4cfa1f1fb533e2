"""The row of versions comes from the run that pytest just made, and takes its place in the page."""

import re
from pathlib import Path

import pytest

from checks import versions

PAGE = f"""before

{versions.HEADER}
|---|
| 3.11.7 | 2.13.0+cpu | 5.19.0 | 0.23.3 | 1.15.0 | 0.21.2 | 9 | 0 | 0 | 1 | 2026-01-01 |

after
"""


def test_a_row_counts_what_ran(tmp_path, capsys):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_a(): pass\n"
        "def test_b(): pass\n"
        "def test_c(): assert False\n"
        "def test_d(absent): pass\n"
        "def test_e(): pytest.skip()\n"
    )
    row = versions.Row()
    assert pytest.main(["-q", "-p", "no:cacheprovider", "-c", "/dev/null", str(tmp_path)], plugins=[row]) == 1
    capsys.readouterr()
    fields = [field.strip() for field in row.text.strip("|").split("|")]
    assert fields[6:10] == ["4", "2", "1", "0"]  # ran, failed (an error too), skipped, minutes
    assert len(fields) == versions.HEADER.count("|") - 1
    assert all(re.match(r"\d+\.\d+", field) for field in fields[:6])


def test_a_row_replaces_the_one_of_the_same_versions():
    again = "| 3.11.7 | 2.13.0+cpu | 5.19.0 | 0.23.3 | 1.15.0 | 0.21.2 | 10 | 0 | 0 | 2 | 2026-02-01 |"
    page = versions.record(PAGE, again)
    assert page == PAGE.replace(PAGE.splitlines()[4], again)
    newer = again.replace("5.19.0", "5.24.0")
    assert versions.record(page, newer) == page.replace(again, f"{again}\n{newer}")
    with pytest.raises(ValueError, match="no table"):
        versions.record("nothing", again)


def test_the_page_has_the_table():
    assert versions.HEADER in Path(versions.PAGE).read_text()
