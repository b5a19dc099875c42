#!/usr/bin/env python3
"""``megatron-lpa train_tokenizer`` for a checkout."""

import sys

from megatron_lpa.command_line import run_tool
from megatron_lpa.commands.train_tokenizer import main

if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(sys.argv[1:])))
