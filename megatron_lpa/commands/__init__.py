"""What users call, a module per command: ``megatron-lpa NAME``, and ``tools/NAME.py`` in a checkout."""
