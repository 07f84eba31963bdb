"""The commands behind `eft-kernels`, one file each; cli.py holds the parser. Nothing heavy is imported before it is needed."""
