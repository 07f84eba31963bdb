"""The commands behind `eft-kernels`, one file each; cli.py holds the parser. Heavy imports come when needed."""
