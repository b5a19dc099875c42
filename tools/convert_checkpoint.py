#!/usr/bin/env python3
"""``megatron-lpa convert_checkpoint`` for a checkout."""

import sys

from megatron_lpa.command_line import run_tool
from megatron_lpa.commands.convert_checkpoint import main

if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(sys.argv[1:])))
