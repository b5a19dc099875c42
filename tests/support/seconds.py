"""Which tests take long: ``python tests/support/seconds.py report.xml`` writes ``tests/seconds.json``.

The report is pytest's: ``make test TEST_ARGS=--junitxml=report.xml``. ``conftest.py`` starts long files
first, and leaves slow tests out of ``make test-quick``. A test that is not in the file is quick, so a record
that is old does no harm.
"""

from __future__ import annotations

import json
import math
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

SECONDS = Path(__file__).parents[1] / "seconds.json"
LONG_FILE_S, SLOW_TEST_S = 3.0, 1.0


def recorded(report: Path) -> dict[str, int]:
    """Seconds of long files and, by their names in them without parameters, of the longest case of slow
    tests."""
    files: dict[str, float] = defaultdict(float)
    tests: dict[str, float] = defaultdict(float)
    for case in ElementTree.parse(report).iter("testcase"):
        file, seconds = case.attrib["classname"].replace(".", "/") + ".py", float(case.attrib["time"])
        test = f"{file}::{case.attrib['name'].partition('[')[0]}"
        files[file] += seconds
        tests[test] = max(tests[test], seconds)
    kept = [item for item in files.items() if item[1] >= LONG_FILE_S]
    kept += [item for item in tests.items() if item[1] >= SLOW_TEST_S]
    return {name: math.ceil(seconds) for name, seconds in sorted(kept)}


if __name__ == "__main__":
    SECONDS.write_text(json.dumps(recorded(Path(sys.argv[1])), indent=0) + "\n")
