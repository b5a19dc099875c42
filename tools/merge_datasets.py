#!/usr/bin/env python3
"""``megatron-lpa merge_datasets`` for a checkout."""

import sys

from megatron_lpa.command_line import run_tool
from megatron_lpa.commands.merge_datasets import main

if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(sys.argv[1:])))
