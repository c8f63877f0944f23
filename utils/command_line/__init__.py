"""The command line of every program: its parser, and what other projects' flags are here. Imports nothing heavy."""
