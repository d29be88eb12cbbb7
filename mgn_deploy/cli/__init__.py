"""The command line: parse, call one function of the library, print. `app.py` holds the table of commands.

Command modules import heavy packages inside their functions, so that `--help` answers at once.
"""
