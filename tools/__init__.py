"""The commands: quantize, export, build, check and run, from a shell."""
