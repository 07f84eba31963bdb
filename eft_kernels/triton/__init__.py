"""Triton kernels: semantics.py (the meaning), rows.py (a row's scores), then one file per stage of a call."""
