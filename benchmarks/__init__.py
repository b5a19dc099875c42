"""Measurements that anyone can repeat: ``python tools/benchmark.py SUB-COMMAND``.

A sub-command is a module here with ``HELP``, ``add_arguments(parser)`` and ``run(arguments)``, named in
``tools/benchmark.py``. It imports what is slow to import inside ``run``. ``results/`` holds recorded runs.
"""
